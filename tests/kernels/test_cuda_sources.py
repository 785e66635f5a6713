"""The CUDA sources, checked without a GPU: nvcc compiles them, and emulated by g++ they equal the CPU ops."""

import dataclasses
import shutil

import pytest
import torch
from support.attack_ops import BAD, attack, table
from support.build_native import KERNELS, build_emulated, run_compiler
from support.inputs import load_golden, require_native
from support.tolerances import relative_error, tolerance

import ejmp
from ejmp_kernels import registry, unfused
from ejmp_kernels.neighbors import UNLIMITED

require_native()

DTYPES = [torch.float64, torch.float32]
CHANNELS = (5, 20, 64)
pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPES = [(5, 1, 3), (20, 5, 8), (64, 16, 7)]  # channels, basis, spherical


def compiler(name):
    path = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}") or shutil.which(f"/usr/local/bin/{name}")
    if path is None:
        pytest.skip(f"there is no {name}")
    return path


def test_nvcc_compiles(tmp_path):
    nvcc = compiler("nvcc")
    release = run_compiler(nvcc, "--version").split("release ")[1]
    targets = ["70", "80", "90"] if release.startswith("12.") else ["80", "90"]
    flags = [f"-gencode=arch=compute_{x},code=sm_{x}" for x in targets]
    flags += ["-std=c++20", "-Xcompiler", "-Wall,-fPIC", "-Wno-deprecated-gpu-targets", "-shared", "-cudart", "none"]
    # without optimisation, which takes half the time and finds the same errors, too much shared memory among them
    flags += ["-Xcicc", "-O0", "-Xptxas", "-O0"]
    output = run_compiler(nvcc, *flags, *KERNELS, "-o", tmp_path / "kernels.so")
    assert "warning" not in output, output


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The file with the CUDA ops of csrc/bindings/cuda.cpp, for the CPU."""
    require_native()
    compiler("g++")
    return str(build_emulated(tmp_path_factory.mktemp("emulated") / "kernels.so"))


@pytest.fixture(scope="module")
def emulated(library):
    """The CUDA ops of csrc/bindings/cuda.cpp, run on the CPU under the name torch.ops.ejmp_emulated."""
    torch.ops.load_library(library)
    return torch.ops.ejmp_emulated


def equal(emulated, name, expected, *arguments):
    """One thread per block must agree with the CPU, and several threads in either order with one in every bit.

    Memory is poisoned, so that what a kernel forgets to write shows.
    """
    first = None
    for threads in (1, 5, -5):
        emulated.threads(threads)
        results = getattr(emulated, name)(*arguments)
        results = [results] if isinstance(results, torch.Tensor) else results
        first = first or results
        for result, want, same in zip(results, expected, first, strict=True):
            error = relative_error(result, want)
            assert error <= tolerance("op on another device", want.dtype), (
                f"{threads} threads: relative error {error:.1e}"
            )
            assert torch.equal(result, same), f"{threads} threads"


def pointers(counts):
    return torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])


@dataclasses.dataclass
class Edges:
    """Edges with random sources, few enough sources and images that one neighbour appears several times over."""

    ptr: torch.Tensor
    source: torch.Tensor
    image: torch.Tensor

    @classmethod
    def random(cls, degrees, seed):
        generator = torch.Generator().manual_seed(seed)
        ptr = pointers(torch.tensor(degrees))
        num_edges = int(ptr[-1])
        source = torch.randint(len(degrees), (num_edges,), generator=generator)
        return cls(ptr, source, torch.randint(-1, 2, (num_edges,), generator=generator))

    @property
    def ids(self):
        return [self.ptr, self.source, self.image]

    @property
    def num_edges(self):
        return len(self.source)

    @property
    def target(self):
        return torch.repeat_interleave(self.ptr.diff())


def random_like(shapes, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def all_orders(emulated, name, values, along, grad, options):
    """The op, its backward and its second backward against the CPU's."""
    for suffix, inputs in (("", []), ("_backward", [grad]), ("_double", [*along, grad])):
        arguments = [*inputs, *values, *options]
        expected = getattr(torch.ops.ejmp, name + suffix)(*arguments)
        expected = [expected] if isinstance(expected, torch.Tensor) else expected
        equal(emulated, name + suffix, expected, *arguments)


OUT_DEGREES, IN_DEGREES = (3, 0, 19, 1, 9, 0), (40, 7, 16, 0, 33, 0)
MIDDLE_DEGREES = (2, 0, 4, 3, 0, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to_atoms", [False, True])
@pytest.mark.parametrize(("channels", "A", "S"), SHAPES)
def test_triplet_equals_cpu(emulated, channels, A, S, to_atoms, dtype):
    out, into = Edges.random(OUT_DEGREES, 1), Edges.random(IN_DEGREES, 2)
    N = len(OUT_DEGREES)
    shapes = [(into.num_edges, channels), (out.num_edges, A, S), (out.num_edges, 3), (into.num_edges, 3)]
    values = random_like(shapes, 3, dtype)
    values[2:] = [v / v.norm(dim=1, keepdim=True) for v in values[2:]]
    rows = N if to_atoms else out.num_edges
    masked = (out.target[:, None] == into.target) & (out.source[:, None] == into.source)
    assert (masked & (out.image[:, None] == into.image)).any()
    (grad,) = random_like([(rows, A * channels)], 5, dtype)
    all_orders(emulated, "triplet", values, random_like(shapes, 4, dtype), grad, [*out.ids, *into.ids, to_atoms])


def quadruplet_inputs(main, middle, shape, dtype):
    """Values with middle edges that are main edges too, some edges along a middle edge, and random ones."""
    channels, A, S = shape
    E, Q = main.num_edges, middle.num_edges
    shapes = [(E, channels), (Q, S, channels), (E, A, S * S), (E, 3), (Q, 3)]
    values = random_like(shapes, 8, dtype)
    values[3:] = [v / v.norm(dim=1, keepdim=True) for v in values[3:]]
    degrees = main.ptr.diff()
    q = int(degrees[middle.source].nonzero()[0])
    values[3][main.ptr[middle.source[q]]] = -values[4][q]  # d, b and a on one line
    q = int(degrees[middle.target].nonzero()[-1])
    values[3][main.ptr[middle.target[q]]] = values[4][q]  # c, b and a on one line
    return values, random_like(shapes, 9, dtype), *random_like([(E, A * channels)], 10, dtype)


def masked_quadruplets(main, middle):
    """How many (q, d) have d = a, (e, q) have c = b, and (e, q, d) have d = c."""
    e, q, d = main, middle, main
    d_is_a = (d.target == q.source[:, None]) & (d.source == q.target[:, None]) & (d.image == -q.image[:, None])
    c_is_b = (e.target == q.target[:, None]) & (e.source == q.source[:, None]) & (e.image == q.image[:, None])
    meet = (e.target[:, None] == q.target)[:, :, None] & (d.target == q.source[:, None])
    same = (e.source[:, None, None] == d.source) & ((e.image[:, None] - q.image)[:, :, None] == d.image)
    return int(d_is_a.sum()), int(c_is_b.sum()), int((meet & same).sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_quadruplet_equals_cpu(emulated, shape, dtype):
    main, middle = Edges.random(OUT_DEGREES, 6), Edges.random(MIDDLE_DEGREES, 7)
    assert min(masked_quadruplets(main, middle)) > 0
    inputs = quadruplet_inputs(main, middle, shape, dtype)
    eps = 1e-6 if dtype == torch.float64 else 1e-4
    all_orders(emulated, "quadruplet", *inputs, [*main.ids, *middle.ids, eps, max(OUT_DEGREES)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("num_radial", [16, 37])
def test_pair_equals_cpu(emulated, num_radial, channels, dtype):
    edges = Edges.random(IN_DEGREES, 11)
    N, E = len(IN_DEGREES), edges.num_edges
    h, radial, grad = random_like([(N, channels), (E, num_radial), (N, num_radial * channels)], 12, dtype)
    ids = [edges.ptr, edges.source]
    equal(emulated, "pair", [torch.ops.ejmp.pair(h, radial, *ids)], h, radial, *ids)
    expected = torch.ops.ejmp.pair_backward(grad, h, radial, *ids)
    equal(emulated, "pair_backward", expected, grad, h, radial, *ids)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_sums_equal_cpu(emulated, channels, dtype):
    edges = Edges.random(IN_DEGREES, 13)
    N, E = len(IN_DEGREES), edges.num_edges
    m, factor = random_like([(E, channels), (E, channels)], 14, dtype)
    (grad,) = random_like([(N, channels)], 14, torch.float32 if dtype == torch.bfloat16 else dtype)
    order = edges.source.sort(stable=True).indices
    by_source = pointers(edges.source.bincount(minlength=N))
    cases = {"atom_sum": (m, factor, edges.ptr), "edge_sum": (m, order, by_source)}
    cases["atom_sum_backward"] = (grad, m, factor, edges.ptr)
    for name, arguments in cases.items():
        expected = getattr(torch.ops.ejmp, name)(*arguments)
        equal(emulated, name, [expected] if isinstance(expected, torch.Tensor) else expected, *arguments)


def test_bad_input(emulated):
    x, ids = torch.zeros(0, 1), torch.zeros(1, dtype=torch.long)
    none, v = ids[:0], torch.zeros(0, 3)
    with pytest.raises(RuntimeError, match=r"spherical must be in 1\.\.8 on a GPU, got 9"):
        emulated.triplet(x, torch.zeros(0, 1, 9), v, v, ids, none, none, ids, none, none, False)
    with pytest.raises(ValueError, match="pair: radial must be Double"):
        emulated.pair(torch.zeros(2, 3).double(), torch.zeros(0, 4), torch.zeros(3, dtype=torch.long), none)


def neighbor_query():
    """Structures with ties, images of one neighbour, atoms far outside the cell or far apart, and lone atoms."""
    generator = torch.Generator().manual_seed(15)
    lattice = 2.0 * torch.cartesian_prod(*[torch.arange(3.0, dtype=torch.float64)] * 3)
    structures = [
        (lattice, 6.0 * torch.eye(3), [True, True, True], 4.0, [60, 12, 8, 5]),
        (
            lattice[:1] + 0.3,
            torch.tensor([[0.0, 1.5, 1.5], [1.5, 0, 1.5], [1.5, 1.5, 0]]),
            [True] * 3,
            7.0,
            [500, 30, 20, 8],
        ),
        (lattice[:1], torch.eye(3), [False] * 3, 5.0, [1000, 30, 20, 8]),
        (40 * lattice, torch.eye(3), [False] * 3, 100.0, [9, 6, 4, 2]),
        (lattice[:2], torch.eye(3), [False] * 3, 1.0, [1000, 30, 20, 8]),
    ]
    for b in range(6):
        cell = torch.diag(3 + 4 * torch.rand(3, generator=generator)) + torch.rand(3, 3, generator=generator)
        pbc = (torch.rand(3, generator=generator) < 0.6).tolist()
        positions = (7 * torch.rand(8, 3, generator=generator, dtype=torch.float64) - 3) @ cell.double()
        structures.append((positions, cell, pbc, 4.0 + b, [1000, 30, 20, 8] if b % 2 else [25, 10, 6, 25]))
    positions, cell, pbc, cutoff, limits = zip(*structures, strict=True)
    num_atoms = sum(map(len, positions))
    return [
        torch.cat(positions),
        torch.stack(cell).double(),
        torch.tensor(pbc),
        pointers(torch.tensor([len(x) for x in positions])),
        torch.tensor(cutoff, dtype=torch.float64),
        torch.tensor(limits),
        torch.rand(num_atoms, generator=generator) < 0.5,
        1_000_000,
    ]


@pytest.mark.parametrize("threads", [1, 5, -5])
def test_neighbors_equal_cpu(emulated, threads):
    query = neighbor_query()
    expected = torch.ops.ejmp.find_neighbors(*query)
    emulated.threads(threads)
    for result, want in zip(emulated.find_neighbors(*query), expected, strict=True):
        assert torch.equal(result, want)


def test_all_pairs_equal_cpu(emulated):
    """What `ejmp_kernels.neighbors` asks for where ties are kept: every pair, and none of the other sets."""
    query = neighbor_query()
    query[5] = torch.tensor([UNLIMITED, 0, 0, 0]).expand(len(query[5]), 4)
    expected = torch.ops.ejmp.find_neighbors(*query)
    assert [len(expected[k]) for k in (3, 6, 9)] == [0, 0, 0]
    emulated.threads(2)
    for result, want in zip(emulated.find_neighbors(*query), expected, strict=True):
        assert torch.equal(result, want)


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        (0, lambda x: x.index_fill(0, torch.tensor([5]), torch.nan), "positions, cell and cutoff must be finite"),
        (0, lambda x: 1e10 * x, "no atom may be far outside"),
        *((1, lambda x, s=scale: s * x, "the cell must have a volume") for scale in (0.0, 1e-200, 1e103, 1e300)),
        (4, lambda x: 0 * x + torch.nan, "cutoff must be in"),
        (7, lambda x: 1000, "pairs of atoms are within reach"),
    ],
)
def test_impossible_searches_are_refused_as_on_the_cpu(emulated, argument, change, message):
    query = neighbor_query()
    query[argument] = change(query[argument])
    messages = []
    for ops in (emulated, torch.ops.ejmp):
        with pytest.raises(ValueError, match=message) as error:
            ops.find_neighbors(*query)
        messages.append(str(error.value).split("\n")[0])
    assert messages[0] == messages[1]


def test_no_argument_ends_the_process(library):
    counts, _ = attack("emulated", 3000, library=library)
    assert not [outcome for _, outcome in counts if outcome in BAD], table(counts)


def test_model_equals_golden(emulated, monkeypatch, tiny):
    """The forward as a GPU runs it: CUDA kernels of graph ops, plain torch between the products."""

    class OnGpu:
        def __getattr__(self, name):
            by_torch = {op.__name__: op for op in unfused.OPS}
            products = name in ("matmul", "linear_activate")
            return by_torch.get(name) or getattr(torch.ops.ejmp if products else emulated, name)

    monkeypatch.setitem(registry._ops, "native", OnGpu())
    emulated.threads(1)
    golden = load_golden("ethanol")
    out = ejmp.JMP.forward(tiny, golden.graph())
    assert relative_error(out.energy, golden.values["energy"]) <= 1e-9
    assert relative_error(out.forces, golden.values["forces"]) <= 1e-9
