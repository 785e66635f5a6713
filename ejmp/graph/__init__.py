"""Structures and the graphs made of them: four sets of edges, batched, padded."""
