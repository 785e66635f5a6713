"""Make a model smaller: which blocks matter, cut the others, distil what is left."""
