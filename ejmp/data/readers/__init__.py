"""Readers of datasets in their original forms."""
