"""Structures, and the graphs made of them: batched, with four sets of edges, padded to few shapes."""
