"""Readers of datasets in their original forms, one module for each family of formats."""
