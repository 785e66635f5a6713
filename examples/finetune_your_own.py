"""Fine-tune on your own frames and use the result: python examples/finetune_your_own.py FRAMES START FOLDER [STEPS].

FRAMES is a file of structures with energies and forces (extxyz, traj, ...; eV and A), START a model to start from
(jmp-l.pt, or what ejmp saved), FOLDER where everything goes. You need `pip install ejmp[data,train,bench]`.
"""

import subprocess
import sys

import ase.io
from ase import units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet

import ejmp

frames, start, folder, *steps = sys.argv[1:]

# 1. One line: the frames are divided (80% training, whole compositions or stretches of a trajectory held out),
#    converted, and trained on. FOLDER/page.html has the errors, the learning curve and parity plots.
more = ["--steps", steps[0], "--validate-every", steps[0]] if steps else []
command = ["ejmp", "finetune", frames, "--start", start, "--run", folder, "--batch-size", "2", *more]
subprocess.run(command, check=True)  # noqa: S603

# 2. The result is an ASE calculator. It knows its units, its element energies and its graph.
atoms = ase.io.read(frames, 0)
atoms.calc = ejmp.Calculator(f"{folder}/final")
print(f"energy {atoms.get_potential_energy():.4f} eV, largest force {abs(atoms.get_forces()).max():.4f} eV/A")

# 3. So a short trajectory is what it always is in ASE.
MaxwellBoltzmannDistribution(atoms, temperature_K=100)
VelocityVerlet(atoms, timestep=0.5 * units.fs).run(5)
print(f"after 5 steps: {atoms.get_total_energy():.4f} eV")

# 4. Many structures at once go through the predictor.
for prediction in ejmp.Predictor(f"{folder}/final")(ase.io.read(frames, ":3")):
    print(f"{prediction.energy:.4f} {prediction.unit}")
