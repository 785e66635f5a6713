"""Predictions in physical units: of many structures, as an ASE calculator, and the commands that use them."""
