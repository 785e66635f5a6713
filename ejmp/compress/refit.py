"""The final MLP's first layer after a cut, by least squares: what the cut blocks told it, from what is left."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ejmp.graph.graph import AtomGraph
from ejmp.model.jmp import JMP

RIDGES = tuple(10.0**power for power in range(-9, 2))
"""Ridges that are tried, as shares of a column's sum of squares; no correction at all is tried as well."""
HELD_OUT = 5
"""Every fifth structure decides on the ridge."""


@torch.no_grad()
def refit(student: JMP, teacher: JMP, kept: Sequence[int], graphs: Iterable[AtomGraph]) -> None:
    """Fit the first layer of a pruned model's final MLP to the value which that layer had before the cut.

    Before its activation the layer is linear in the outputs X of the blocks. With W the sliced weights and z the
    teacher's value, the correction D of the weights minimises

        sum |z - X (W + D)^T|^2 + ridge * sum_k |X_k|^2 |D_k|^2

    over atoms in the energy branch and over edges in the force branch. The normal equations are summed in float64, so
    memory does not grow with the number of graphs. The ridge is the one that leaves the least error on every fifth
    structure when the others are fitted; the correction with it is then fitted to all of them. Where no block is
    missing the weights stay as they are, to the last bit.

    Args:
        student: model with the sliced layer, which is changed.
        teacher: model that it was made of.
        kept: numbers of the teacher's blocks that the student has.
        graphs: graphs that both models take; no labels are needed.

    Raises:
        ValueError: if there are fewer than five structures, or a feature is not finite.
    """
    first_ones = list(kept) == list(range(len(kept)))  # then the student's features are those of the teacher
    equations: dict[str, _NormalEquations] = {}
    structures = 0
    for number, graph in enumerate(graphs):
        given = teacher.features(graph)
        own = given if first_ones else student.features(graph)
        held = (torch.arange(graph.num_structures, device=graph.device) + structures) % HELD_OUT == HELD_OUT - 1
        structures += graph.num_structures
        for branch, x, wanted, structure in (
            ("E", own.x_E, given.x_E, graph.batch),
            ("F", own.x_F, given.x_F, graph.batch[graph.main.target]),
        ):
            if not wanted:
                continue
            inputs = torch.cat(x[: len(kept) + 1], 1).double()
            value = torch.cat(wanted, 1).double() @ _weight(teacher, branch).double().T
            if not (inputs.isfinite().all() and value.isfinite().all()):
                raise ValueError(f"refit: graph {number}: a feature is not finite")
            missing = value - inputs @ _weight(student, branch).double().T
            for part in (False, True):
                rows = held[structure] == part
                equations.setdefault(branch, _NormalEquations(inputs, missing)).add(part, inputs[rows], missing[rows])
    if structures < HELD_OUT:
        raise ValueError(f"refit: expected graphs of {HELD_OUT} structures or more, got {structures}")
    for branch, found in equations.items():
        weight = _weight(student, branch)
        weight.copy_((weight.double() + found.correction().T).to(weight.dtype))


def _weight(model: JMP, branch: str) -> Tensor:
    """Return the weights of the first layer of a branch's final MLP, [C, (blocks + 1) C]."""
    return model.get_parameter(f"backbone.out_mlp_{branch}.out_mlp.0.linear.weight")


class _NormalEquations:
    """Sums over the rows of inputs X and wanted values Y, apart for those fitted (False) and those held out (True).

    Args:
        inputs: rows of X, for their number of columns.
        values: rows of Y, likewise.
    """

    def __init__(self, inputs: Tensor, values: Tensor) -> None:
        both = (False, True)
        self.gram = {part: inputs.new_zeros(inputs.shape[1], inputs.shape[1]) for part in both}
        self.moment = {part: inputs.new_zeros(inputs.shape[1], values.shape[1]) for part in both}

    def add(self, part: bool, inputs: Tensor, values: Tensor) -> None:
        """Add rows."""
        self.gram[part] += inputs.T @ inputs
        self.moment[part] += inputs.T @ values

    def correction(self) -> Tensor:
        """Return D^T of `refit`, [columns of X, columns of Y]."""
        best, least = None, 0.0  # of no correction, but for the square of Y, which all have
        for ridge in RIDGES:
            found = solve(self.gram[False], self.moment[False], ridge)
            if found is not None:
                error = (found * (self.gram[True] @ found - 2 * self.moment[True])).sum().item()
                if error < least:
                    best, least = ridge, error
        moment = self.moment[False] + self.moment[True]
        whole = None if best is None else solve(self.gram[False] + self.gram[True], moment, best)
        return torch.zeros_like(moment) if whole is None else whole


def solve(gram: Tensor, moment: Tensor, ridge: float) -> Tensor | None:
    """Return the minimum of least squares with a ridge, or None if rounding leaves no positive definite matrix.

    Args:
        gram: X^T X, [n, n] float64.
        moment: X^T Y, [n, m] float64.
        ridge: as a share of each column's sum of squares.
    """
    size = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    scaled = gram / size[:, None] / size
    scaled.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if failed:
        return None
    return torch.cholesky_solve(moment / size[:, None], factor) / size[:, None]
