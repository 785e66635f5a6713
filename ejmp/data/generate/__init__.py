"""How the demo mix is made: `python -m ejmp.data.generate OUT [NAME ...]`, with `pip install ejmp[demo]`.

There are four sets to pre-train on and five to fine-tune on, like the real ones but small enough to train on in
minutes. Labels are real physics, not those of the real sets: GFN-xTB (tblite) and effective medium theory (ASE's EMT).
Energies are total energies in eV, forces their negative gradients in eV/A, of exactly the positions that are stored
(rounded to float32 first). Where self-consistency fails or a force is beyond 50 eV/A (5 eV/A of EMT, whose crude
adsorbates would else set the whole loss) the structure is dropped and counted.

| set | like | what | labels |
| --- | --- | --- | --- |
| oc20 | OC20 S2EF | slabs of one or two of Al, Ni, Cu, Pd, Ag, Pt, Au with an adsorbate of H, C, N, O: two steps of a \
relaxation, and a frame with heat (100 to 1000 K) and lateral strain (3%) | EMT |
| oc22 | OC22 S2EF | slabs of 14 oxides (rocksalt, rutile, fluorite, wurtzite), with swapped cations, vacancies, \
adsorbates: two steps and two frames of the same kinds | GFN1-xTB |
| ani1x | ANI-1x | random molecules of H, C, N, O in 4 frames from 50 to 2000 K | GFN2-xTB |
| transition1x | Transition-1x | 4 images of a hydrogen shift (elastic bands at their start and after 10 steps), 4 of \
a bond pulled apart by up to 1.8 A or a group turned by up to 180 degrees | GFN2-xTB |
| rmd17 | rMD17 aspirin | frames 20 fs apart of Langevin dynamics at 500 K | GFN2-xTB |
| qm9 | QM9 | relaxed molecules; energy, target "gap" (HOMO-LUMO, eV), no forces | GFN2-xTB |
| spice | SPICE | a molecule with 2 to 5 waters in 4 frames from 200 to 800 K | GFN2-xTB |
| md22 | MD22 Ac-Ala3-NHMe | as rmd17; the peptide (42 atoms) is built by replacing hydrogens, then relaxed | GFN2-xTB |
| qmof | QMOF | frameworks of ideal nets (diamond, cubic, honeycomb, Hofmann clathrates) after at most 8 steps of \
relaxation, and with heat and strain; target "gap", forces too | GFN1-xTB |

Heat is simulated by the classical normal modes of a model of pair springs (`thermal`), except in the dynamics. Periodic
GFN1-xTB is at the Gamma point of small cells: a smooth potential energy surface with true gradients, not a converged
one. EMT's parameters for H, C, N and O are crude. Forces on fixed atoms (tag 0) are stored as they are; `fixed` marks
the atoms.

The sets are split by formula: no formula is in two splits, and every element of val and test is in train. As in
ANI-1x's rule, val and test take shuffled formulas until each has its tenth. The frames of the two dynamics are shuffled
with RandomState(42) as those of rMD17 and MD22 are, 70/10/20. The linear reference is least squares of minimum norm on
the training split; "forces" in the statistics is the root mean square of the free atoms' components.

Everything is seeded. What ASE computes repeats to rounding. What tblite computes repeats on the same machine; on others
the dynamics drift apart. All nine sets take some 60 minutes of one core.
"""
