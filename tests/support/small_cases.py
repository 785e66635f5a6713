"""The ops of the table `op_cases` on small graphs, for the tests of both backends."""

import dataclasses
import functools

import op_cases
import torch
from op_cases import LOW, Draw, Sizes, randn

import ejmp
from ejmp_kernels import availability

NATIVE_ON_GPU = torch.cuda.is_available() and availability.why_unavailable("cuda") is None
DEVICE = {"native": "cuda" if NATIVE_ON_GPU else "cpu", "triton": "cpu" if availability.interpreted() else "cuda"}
CASES = tuple(name for name in op_cases.CASES if name != "pair_from_distances")
"""Names of the ops; two ops after each other are for benchmarks only."""
SMALL = Sizes(
    triplet=(20, 6, 7),
    quadruplet=(20, 14, 7),
    pair=(12, 10),
    radial=(128, 37),
    atom_sum=150,
    gather_add=37,
    swap_add=21,
    activate=(7, 301),
    linear=(17, 33, 65),
    cutoff=6.0,
    spread=4.0,
)
TINY = Sizes(
    triplet=(2, 2, 3),
    quadruplet=(2, 1, 3),
    pair=(3, 2),
    radial=(8, 3),
    atom_sum=3,
    gather_add=3,
    swap_add=3,
    activate=(2, 3),
    linear=(2, 3, 4),
    cutoff=6.0,
    spread=4.0,
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a small case is made of: a backend, the type of features, and one of four graphs."""

    backend: str
    dtype: torch.dtype
    graph: str = "full"
    """"full", "small" (in the interpreter), "tiny" (for finite differences) or "lone" (no edges)."""

    @property
    def tiny(self):
        return self.graph in {"tiny", "lone"}

    @property
    def slow(self):
        """Whether Triton's interpreter runs the case, for which the full graph is too large."""
        return self.backend == "triton" and availability.interpreted()

    @property
    def real(self):
        return torch.float32 if self.dtype in LOW else self.dtype

    @property
    def device(self):
        return DEVICE[self.backend]

    @property
    def draw(self):
        return Draw(self.dtype, torch.device(self.device))

    @property
    def sizes(self):
        if self.tiny:
            return dataclasses.replace(TINY, activate=(0 if self.graph == "lone" else 2, 3))
        return SMALL if self.backend == "native" else dataclasses.replace(SMALL, radial=(113, 37))

    def distances(self):
        """Some beyond the cutoff, and none on it: the basis has a third derivative's jump there."""
        more = torch.linspace(1, 5.9, 28).tolist() if self.backend == "triton" and not self.tiny else []
        distances = [] if self.graph == "lone" else [0.9, 1.7, 3.05, 4.4, 5.99, 6.5, 2.2, 11.0, *more]
        return torch.tensor(distances, dtype=self.real, device=self.device)

    @functools.cache  # noqa: B019 - a handful of small graphs
    def make_graph(self):
        """Return a crystal (several images of each neighbour), a lone atom and a bent molecule, or a part of them."""
        crystal = ejmp.Structure(
            numbers=[12, 8, 8],
            positions=[[0.1, 0.2, 0], [1.7, 1.5, 1.6], [0.3, 1.9, 2.2]],
            cell=[[3.1, 0, 0], [0.4, 3.3, 0], [-0.2, 0.5, 3.6]],
            pbc=True,
            tags=[1, 2, 0],
        )
        bent = ejmp.Structure(
            numbers=[6, 8, 1, 7, 1],
            positions=[[0, 0, 0], [1.2, 0.1, 0.2], [-0.6, 0.9, 0.3], [-0.5, -0.8, 1.0], [0.3, 0.4, -1.1]],
        )
        four = ejmp.Structure(numbers=bent.numbers[:4], positions=bent.positions[:4])
        lone = ejmp.Structure(numbers=[2], positions=[[0.0, 0, 0]])
        one = dataclasses.replace(crystal, numbers=[12], positions=[[0.1, 0.2, 0]], tags=[1])
        many = 18 if self.backend == "triton" else 12  # more than a tile of the interpreter's
        structures, most = {
            "full": ([crystal, lone, bent], many),
            "small": ([one, lone, four], [many, many, 4]),
            "tiny": ([four], 4) if self.slow else ([bent, lone], 30),
            "lone": ([lone], many),
        }[self.graph]
        return ejmp.build_graph(structures, 5.0 if self.tiny else 6.0, most, dtype=self.real, device=self.device)


def make_case(name, at):
    """Make the case of an op; its `call` takes no backend any more."""
    if at.slow and at.graph == "full":
        at = dataclasses.replace(at, graph="small")
    case = op_cases.CASES[name](at.make_graph(), at.sizes, at.dtype)
    if name == "radial":
        case = dataclasses.replace(case, inputs=[at.distances(), *case.inputs[1:]])
    options = {"in_place": True} if name.startswith("activate") else {}
    return dataclasses.replace(case, call=functools.partial(case.call, backend=at.backend, **options))


def derivatives(function, inputs):
    """Return value, gradients of a random projection, and gradients of one of those and of their squares."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    grad = randn(*value.shape, dtype=value.dtype, seed=7).to(value.device).requires_grad_()
    first = torch.autograd.grad(value, inputs, grad, create_graph=True)
    loss = sum((g * randn(*g.shape, dtype=g.dtype, seed=8).to(g.device)).sum() + 0.1 * (g**2).sum() for g in first)
    second = torch.autograd.grad(loss, [grad, *inputs], allow_unused=True)
    zero = [torch.zeros_like(x) if g is None else g for g, x in zip(second, [grad, *inputs], strict=True)]
    return [value.detach()], [g.detach() for g in first], zero
