"""The CUDA sources, checked without a GPU: nvcc compiles them, and emulated by g++ they equal the CPU ops."""

import ctypes
import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import require_native
from tolerances import relative_error

FOLDER = Path(__file__).parents[1] / "csrc/cuda"
KERNELS = sorted(FOLDER.glob("*.cu"))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
CHANNELS = (5, 20, 64)
SHAPES = [(5, 1, 3), (20, 5, 8), (64, 16, 7)]  # channels, basis, spherical


def compiler(name):
    path = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}") or shutil.which(f"/usr/local/bin/{name}")
    if path is None:
        pytest.skip(f"there is no {name}")
    return path


def run_compiler(*command):
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


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


class Emulated:
    """The kernels as a shared library whose functions take sizes and arrays in the order of csrc/cuda/emulated.cpp."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        for name in ("quadruplet_workspace", "cells_bytes", "lists_bytes"):
            getattr(self.library, f"ejmp_{name}").restype = ctypes.c_int64
        self.threads(1)

    def threads(self, count):
        self.library.ejmp_threads(count)

    def call(self, name, sizes, arrays, eps=0.0):
        assert all(x is None or x.is_contiguous() for x in arrays)
        function = getattr(self.library, f"ejmp_{name}")
        function.restype = ctypes.c_char_p
        error = function(
            arrays[-1].dtype == torch.float64,
            (ctypes.c_int64 * len(sizes))(*sizes),
            ctypes.c_double(eps),
            (ctypes.c_void_p * len(arrays))(*[None if x is None else x.data_ptr() for x in arrays]),
        )
        if error:
            raise RuntimeError(error.decode())

    def check(self, name, sizes, inputs, expected, *, scratch=(), eps=0.0):
        """One thread per block must agree with the CPU, and several threads in either order with one in every bit.

        What is written to is poisoned before each run, as are the `scratch` bytes.
        """
        first = None
        for threads in (1, 5, -5):
            results = [torch.full_like(x, torch.nan) for x in expected]
            poisoned = [torch.full((size,), -1, dtype=torch.int8) for size in scratch]
            self.threads(threads)
            self.call(name, sizes, [*inputs, *poisoned, *results], eps)
            first = first or results
            for result, want, same in zip(results, expected, first, strict=True):
                error = relative_error(result, want)
                assert error <= TOLERANCE[want.dtype], f"{threads} threads: relative error {error:.1e}"
                assert torch.equal(result, same), f"{threads} threads"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    require_native()
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    flags = ["-shared", "-fPIC", "-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
    flags += ["-DEJMP_EMULATE", "-x", "c++"]
    run_compiler(compiler("g++"), *flags, *KERNELS, FOLDER / "emulated.cpp", "-o", library)
    return Emulated(library)


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

    def by_source(self):
        counts = self.source.bincount(minlength=len(self.ptr) - 1)
        return [pointers(counts), self.source.sort(stable=True).indices]


def random_like(shapes, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_along(values, along):
    """Inputs in the order of the library: each value and its direction."""
    return [x for pair in zip(values, along, strict=True) for x in pair]


@dataclasses.dataclass
class Problem:
    """An op on a random graph; `second`: with directions."""

    values: list
    along: list
    grad: torch.Tensor

    def directions(self, second):
        return self.along if second else [None] * len(self.values)

    def expected(self, op, options):
        """The results of the op, of its backward and, of both, of the second backward, on the CPU."""
        forward, backward, double = (getattr(torch.ops.ejmp, op + suffix) for suffix in ("", "_backward", "_double"))
        second = double(*self.along, self.grad, *self.values, *options)
        return forward(*self.values, *options), backward(self.grad, *self.values, *options), second[0], second[1:]


OUT_DEGREES, IN_DEGREES = (3, 0, 19, 1, 9, 0), (40, 7, 16, 0, 33, 0)
MIDDLE_DEGREES = (2, 0, 4, 3, 0, 2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("to_atoms", [False, True])
@pytest.mark.parametrize(("channels", "A", "S"), SHAPES)
def test_triplet_equals_cpu(emulated, channels, A, S, to_atoms, dtype):
    out, into = Edges.random(OUT_DEGREES, 1), Edges.random(IN_DEGREES, 2)
    N = len(OUT_DEGREES)
    shapes = [(into.num_edges, channels), (out.num_edges, A, S), (out.num_edges, 3), (into.num_edges, 3)]
    values = random_like(shapes, 3, dtype)
    values[2:] = [v / v.norm(dim=1, keepdim=True) for v in values[2:]]
    rows = N if to_atoms else out.num_edges
    problem = Problem(values, random_like(shapes, 4, dtype), *random_like([(rows, A * channels)], 5, dtype))
    masked = (out.target[:, None] == into.target) & (out.source[:, None] == into.source)
    assert (masked & (out.image[:, None] == into.image)).any()
    expected = problem.expected("triplet", [*out.ids, *into.ids, to_atoms])
    sizes = [N, channels, A, S, to_atoms]
    for second in (False, True):
        inputs = [*out.ids, *into.ids, *with_along(values, problem.directions(second))]
        emulated.check("triplet", sizes, inputs, [expected[2 * second]])
        emulated.check("triplet_backward", sizes, [*inputs, problem.grad, None], expected[2 * second + 1])


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


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_quadruplet_equals_cpu(emulated, shape, dtype):
    main, middle = Edges.random(OUT_DEGREES, 6), Edges.random(MIDDLE_DEGREES, 7)
    assert min(masked_quadruplets(main, middle)) > 0
    problem = Problem(*quadruplet_inputs(main, middle, shape, dtype))
    eps = 1e-6 if dtype == torch.float64 else 1e-4
    expected = problem.expected("quadruplet", [*main.ids, *middle.ids, eps])
    num_rows = main.ptr.diff()[middle.source]
    row_ptr = pointers(num_rows)
    sizes = [len(OUT_DEGREES), *shape, int(row_ptr[-1])]
    rows = [row_ptr, *middle.by_source()]
    wide = dtype == torch.float64
    for second in (False, True):
        inputs = [*main.ids, *middle.ids, *with_along(problem.values, problem.directions(second)), *rows]
        scratch = [emulated.library.ejmp_quadruplet_workspace(wide, sizes[4], shape[0], x, second) for x in (0, 1)]
        emulated.check("quadruplet", sizes, inputs, [expected[2 * second]], scratch=scratch[:1], eps=eps)
        inputs += [problem.grad, None]
        emulated.check("quadruplet_backward", sizes, inputs, expected[2 * second + 1], scratch=scratch[1:], eps=eps)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("num_radial", [16, 37])
def test_pair_equals_cpu(emulated, num_radial, channels, dtype):
    edges = Edges.random(IN_DEGREES, 11)
    N, E = len(IN_DEGREES), edges.num_edges
    h, radial, grad = random_like([(N, channels), (E, num_radial), (N, num_radial * channels)], 12, dtype)
    ids, sizes = [edges.ptr, edges.source], [N, channels, num_radial]
    inputs = [*ids, h, radial]
    emulated.check("pair", sizes, inputs, [torch.ops.ejmp.pair(h, radial, *ids)])
    expected = torch.ops.ejmp.pair_backward(grad, h, radial, *ids)
    emulated.check("pair_backward", sizes, [*inputs, edges.target, *edges.by_source(), grad], expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_sums_equal_cpu(emulated, channels, dtype):
    edges = Edges.random(IN_DEGREES, 13)
    N, E = len(IN_DEGREES), edges.num_edges
    m, factor, grad = random_like([(E, channels), (E, channels), (N, channels)], 14, dtype)
    sizes, (by_source, order) = [N, channels], edges.by_source()
    expected = torch.ops.ejmp.atom_sum(m, factor, edges.ptr)
    emulated.check("edge_sum", sizes, [m, factor, None, edges.ptr], [expected])
    expected = torch.ops.ejmp.edge_sum(m, order, by_source)
    emulated.check("edge_sum", sizes, [m, None, order, by_source], [expected])
    expected = torch.ops.ejmp.atom_sum_backward(grad, m, factor, edges.ptr)
    emulated.check("atom_sum_backward", sizes, [grad, m, factor, edges.ptr], expected)


def test_too_many_spherical_functions(emulated):
    ids = [torch.zeros(1, dtype=torch.long), None, None]
    with pytest.raises(RuntimeError, match=r"spherical must be in 1\.\.8 on a GPU, got 9"):
        emulated.call("triplet", [0, 1, 1, 9, 0], [*ids, *ids, *[None] * 8, torch.empty(0)])


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
    ]


@pytest.mark.parametrize("threads", [1, 5, -5])
def test_neighbors_equal_cpu(emulated, threads):
    query = neighbor_query()
    expected = torch.ops.ejmp.find_neighbors(*query)
    B, N = len(query[1]), len(query[0])

    def poisoned(size, dtype=torch.int64):
        return torch.full(size, -1, dtype=dtype)

    emulated.threads(threads)
    cells = poisoned([emulated.library.ejmp_cells_bytes(B, N)], torch.int8)
    list_ptr = poisoned([N + 1])
    emulated.call("count_neighbors", [B, N], [*query, cells, list_ptr])
    num_found = int(list_ptr[-1])
    lists = poisoned([emulated.library.ejmp_lists_bytes(num_found)], torch.int8)
    ptr = poisoned([4, N + 1])
    emulated.call("list_neighbors", [B, N, num_found], [*query, cells, list_ptr, lists, ptr])
    sets = [[poisoned([n]), poisoned([n, 3], torch.int32)] for n in ptr[:, -1].tolist()]
    swap = poisoned([int(ptr[1, -1])])
    arrays = [*query, list_ptr, lists, ptr, *(x for pair in sets for x in pair), swap]
    emulated.call("pack_neighbors", [B, N, num_found], arrays)
    for j, (source, offset) in enumerate(sets):
        for result, want in zip((source, offset, ptr[j]), expected[3 * j : 3 * j + 3], strict=True):
            assert torch.equal(result, want), f"edge set {j}"
    assert torch.equal(swap, expected[12])
