"""Steps of training that several benchmarks time, and a batch for them."""

import torch

import ejmp
from ejmp.data.sampling.batch import Batch


def train_on_gradient_forces(model: ejmp.JMP, graph: ejmp.AtomGraph) -> float:
    """Differentiate a loss on energies and gradient forces by every parameter; return the loss.

    The forces are a derivative themselves, so every op is differentiated twice.
    """
    model.zero_grad(set_to_none=True)
    positions = graph.positions.clone().requires_grad_()
    energy = model(graph.with_positions(positions)).energy[:, 0]
    (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
    loss = (energy**2).mean() + (gradient**2).sum()
    loss.backward()
    return loss.item()


def zero_labels(graph: ejmp.AtomGraph) -> Batch:
    """Return a batch whose energies and forces are all zero: a step costs the same whatever they are."""
    B, N, device = graph.num_structures, graph.num_atoms, graph.device
    return Batch(
        graph=graph,
        energy=torch.zeros(B, dtype=torch.float64, device=device),
        forces=torch.zeros(N, 3, device=device),
        fixed=torch.zeros(N, dtype=torch.bool, device=device),
        targets={},
        dataset=torch.zeros(B, dtype=torch.int64, device=device),
        ids=("",) * B,
        position=0,
    )
