"""The units of the datasets in eV and A, of CODATA 2022: `ase.units.create_units("2022")` agrees to 1e-12."""

HARTREE = 27.211386245988
"""One hartree, eV."""
BOHR = 0.529177210544
"""One bohr, A."""
KCAL_PER_MOL = 0.0433641042418
"""One kcal/mol, eV; 1 cal is 4.184 J."""
