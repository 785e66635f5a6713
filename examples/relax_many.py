"""Relax many crystals at once with torch-sim: python examples/relax_many.py MODEL FRAMES RELAXED.

MODEL is what ejmp.load reads (and has one task), FRAMES a file of crystals that ASE reads, RELAXED the file to write.
You need `pip install ejmp[torchsim]`.
"""

import sys

import ase.io
import torch
import torch_sim

from ejmp.torchsim import JMPModel

path, frames, relaxed = sys.argv[1:4]

# 1. The model. Positions stay in float64, whatever the type of its weights is.
model = JMPModel(path, stress=False)

# 2. All crystals in one state, so that each step is one pass of the model.
crystals = ase.io.read(frames, ":")
state = torch_sim.io.atoms_to_state(crystals, model.device, torch.float64)

# 3. FIRE until no force is above 0.05 eV/A. (torch-sim 0.3, the last for Python 3.11, names optimisers differently.)
fire = torch_sim.Optimizer.fire if hasattr(torch_sim, "Optimizer") else torch_sim.optimizers.fire
converged = torch_sim.generate_force_convergence_fn(force_tol=0.05, include_cell_forces=False)
state = torch_sim.optimize(state, model, optimizer=fire, convergence_fn=converged, max_steps=50)

# 4. Back to ASE.
results = torch_sim.io.state_to_atoms(state)
for number, (atoms, energy) in enumerate(zip(results, state.energy.tolist(), strict=True)):
    print(f"{number}: {atoms.get_chemical_formula()} {energy:.4f} eV")
    atoms.info["relaxed_energy"] = energy
ase.io.write(relaxed, results)
