"""The record store: one form for every dataset, made by conversion."""
