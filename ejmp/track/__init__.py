"""Keeping track of speed: two commits compared without crying wolf, exact gates, and the history of a machine."""
