"""Units of the datasets in eV and A: CODATA 2022, as `ase.units.create_units("2022")` has them (to 1e-12)."""

HARTREE = 27.211386245988
"""eV."""
BOHR = 0.529177210544
"""A."""
KCAL_PER_MOL = 0.0433641042418
"""eV; 1 cal is 4.184 J."""
