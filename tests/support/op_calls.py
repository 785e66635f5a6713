"""A small valid call of every registered op, by the names of its arguments."""

import math

import torch

N, E, Q, R = 4, 6, 3, 5
"""Atoms, main edges, middle edges, radial functions."""
C, A, S, M = 3, 2, 3, 5
"""Channels of sums over neighbours, embedding, spherical functions, channels of edges."""
INDICES = ("source", "order", "swap")
"""Endings of the names of indices."""


def names_of(namespace):
    """Return the names of all ops of a namespace."""
    found = torch._C._dispatch_get_all_op_names()
    names = {name.split("::")[1].split(".")[0] for name in found if name.startswith(f"{namespace}::")}
    return sorted(names - {"threads"})  # sets how many threads of a block the emulation has


def schema_of(namespace, name):
    """Return the arguments of an op's schema."""
    return getattr(getattr(torch.ops, namespace), name).default._schema.arguments


def limit_of(argument):
    """Return how many rows there are that an index may name."""
    return N if argument.endswith("source") else E


def _edges():
    """Pointers, sources and images of main and middle edges, with one neighbour in two images."""
    main = {"ptr": [0, 3, 3, 5, 6], "source": [2, 2, 3, 0, 0, 0], "image": [1, 0, 0, -1, 0, 0]}
    middle = {"ptr": [0, 1, 1, 3, 3], "source": [2, 0, 0], "image": [0, 0, -1]}
    return tuple({name: torch.tensor(values) for name, values in edges.items()} for edges in (main, middle))


def calls(dtype=torch.float32):
    """Return the arguments of each op by name; ops that differ by a suffix share them."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def unit(rows):
        return torch.nn.functional.normalize(draw(rows, 3), dim=1)

    main, middle = _edges()
    scales, basis = {"alpha": 0.7, "beta": 0.3}, {"cutoff": 6.0, "exponent": 5, "order": 0}
    swap = torch.arange(E) ^ 1
    rows = {"source_rows": draw(N, M), "target_rows": draw(N, M), "source": main["source"], "swap": swap}
    sums = {"m": draw(E, M), "factor": draw(E, M), "ptr": main["ptr"], "grad": draw(N, M)}
    flat = {name: draw(E, M) for name in ("x", "factor", "add", "grad", "u_x", "u_factor")}
    triplet = {"x": draw(E, C), "weight": draw(Q, A, S), "v_out": unit(Q), "v_in": unit(E), "grad": draw(Q, A * C)}
    triplet |= {f"out_{name}": x for name, x in middle.items()} | {f"in_{name}": x for name, x in main.items()}
    quadruplet = {"x": draw(E, C), "filter": draw(Q, S, C), "weight": draw(E, A, S * S), "grad": draw(E, A * C)}
    quadruplet |= {"v": unit(E), "v_middle": unit(Q)} | main | {f"middle_{name}": x for name, x in middle.items()}
    for fields in (triplet, quadruplet):
        inputs = [name for name, x in fields.items() if x.is_floating_point() and name != "grad"]
        fields |= {f"u_{name}": torch.randn_like(fields[name]) for name in inputs}
    radial = {"distance": torch.linspace(0.5, 7, E).to(dtype), "offset": torch.linspace(0, 1, R).to(dtype)}
    radial |= {"temps": torch.full((R,), 9.0, dtype=dtype), "weight": draw(R, M), "x": draw(E, M)} | basis
    fused = {"x": draw(E, 3), "weight": draw(M, 3), "basis": draw(E, 2), "filter": draw(M, 2), "factor": draw(E, M)}
    fused |= {name: rows[name] for name in ("source_rows", "target_rows", "source")} | {
        "target": rows["source"].flip(0)
    }
    fused |= {"add": draw(E, M), "more": draw(E, M), "gamma": 0.5, "filter_sum": False} | scales
    return {
        "triplet": triplet | {"to_atoms": False},
        "quadruplet": quadruplet | {"eps": 1e-4, "max_degree": 3, "mix": draw(2, A * C)},
        "pair": {"h": draw(N, C), "radial": draw(E, R), "ptr": main["ptr"], "source": main["source"]}
        | {"grad": draw(N, R * C)},
        "atom_sum": sums,
        "atom_sum_filtered": {"m": draw(E, M), "basis": draw(E, 2), "filter": draw(M, 2), "ptr": main["ptr"]},
        "edge_sum": {"x": draw(E, M), "order": torch.tensor([3, 1, 0, 5, 4, 2]), "ptr": main["ptr"]},
        "gather_add": rows | {"x": draw(E, M), "ptr": main["ptr"]},
        "activate": flat | scales,
        "swap_add": {"x": draw(E, 2 * M), "swap": swap, "u": draw(E, 2 * M), "add": draw(E, M), "grad": draw(E, M)}
        | scales,
        "linear_swap_add": {"x": draw(E, 3), "weight": draw(2 * M, 3), "swap": swap, "add": draw(E, M)} | scales,
        "quantize_rows": {"x": draw(E, M)},
        "scale_rows": {"x": draw(E, M), "scale": torch.rand(E, generator=generator)},
        "activate_rows": flat | scales | {"scale": torch.rand(E, generator=generator), "keep": True, "quantize": True},
        "radial": radial,
        "transposed": {"x": draw(E, M)},
        "product": {"a": draw(4, 3), "b": draw(3, 5)},
        "matmul": {"a": draw(4, 3), "b": draw(3, 5), "transpose_a": False, "transpose_b": False},
        "linear_activate": {"x": draw(4, 3), "weight": draw(5, 3), "factor": draw(4, 5), "add": draw(4, 5)} | scales,
        "linear_fused": fused,
        "find_neighbors": neighbor_query(),
        "isa": {},
    }


def neighbor_query():
    """A crystal of two atoms and a molecule of two."""
    return {
        "positions": torch.tensor([[0, 0, 0], [1.6, 1.5, 1.4], [0, 0, 0], [1.1, 0, 0]], dtype=torch.float64),
        "cell": torch.stack([3.1 * torch.eye(3), torch.eye(3)]).double(),
        "pbc": torch.tensor([[True] * 3, [False] * 3]),
        "ptr": torch.tensor([0, 2, 4]),
        "cutoff": torch.tensor([4.0, 5.0], dtype=torch.float64),
        "limits": torch.tensor([[30, 6, 4, 3], [9, 3, 2, 1]]),
        "quad_atom": torch.tensor([True, False, True, True]),
        "max_pairs": 10_000_000,
    }


def arguments_of(namespace, name, made):
    """Return the arguments of one op, in the order of its schema.

    Raises:
        KeyError: for an op that `calls` does not know.
    """
    ends = ("", "_", "_backward", "_double", "_mixed", "_transposed")
    (family,) = [key for key in made if name in {key + end for end in ends}]
    return {argument.name: made[family][argument.name] for argument in schema_of(namespace, name)}


EXTREMES = (0, 1, -1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
NUMBERS = (0.0, -1.0, math.nan, math.inf, -math.inf, 1e-320, 1e-45, 1e300)
