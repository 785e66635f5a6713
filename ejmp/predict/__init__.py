"""Predictions in physical units: of lists of structures, and as calculators of other packages."""
