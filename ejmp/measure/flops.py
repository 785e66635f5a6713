"""Count the multiply-adds of a forward pass from the config and the sizes of a graph.

Convention: what is counted are the multiply-adds (MAC) of matrix products, as fvcore counts them; a GFLOP here is two
per multiply-add, as torch.utils.flop_counter has it. Elementwise work is not counted. The many-body sums are counted
as the model defines them, seven (or 49) spherical functions per triplet (or quadruplet).
"""

from dataclasses import dataclass

from ejmp.graph.graph import AtomGraph
from ejmp.model.angle_tables import angle_tables
from ejmp.model.config import JMPConfig


@dataclass(frozen=True, kw_only=True)
class GraphSizes:
    """How much of everything a graph has."""

    atoms: int
    edges: int
    atom_edges: int
    quad_edges: int
    pairs: int
    pair_terms: int
    """Terms of the sum over pairs: as many as pairs, more in a padded table."""
    edge_to_edge: int
    """Triplets b->a, c->a of main edges."""
    atom_to_edge: int
    edge_to_atom: int
    quad_inputs: int
    """Triplets d->b->a into the middle edge of quadruplets."""
    quad_outputs: int
    """Triplets b->a<-c of middle and output edges."""
    quadruplets: int


def graph_sizes(graph: AtomGraph, *, padded: bool = False) -> GraphSizes:
    """Count a graph's edges, triplets and quadruplets.

    Args:
        graph: a batch.
        padded: count every place of the reference backend's padded tables instead of what is really there.
    """
    tables = angle_tables(graph, 1)
    quads = tables.quadruplets
    masks = {
        "edge_to_edge": tables.edge_to_edge.valid,
        "atom_to_edge": tables.atom_to_edge.valid,
        "edge_to_atom": tables.edge_to_atom.valid,
        "quad_inputs": quads.inputs_valid,
        "quad_outputs": quads.middles_valid,
        "quadruplets": quads.valid,
    }
    return GraphSizes(
        atoms=graph.num_atoms,
        edges=graph.main.num_edges,
        atom_edges=graph.atom_edges.num_edges,
        quad_edges=graph.quad_edges.num_edges,
        pairs=graph.atom_pairs.num_edges,
        pair_terms=tables.pairs.numel() if padded else graph.atom_pairs.num_edges,
        **{name: mask.numel() if padded else int(mask.sum()) for name, mask in masks.items()},
    )


def count_macs(config: JMPConfig, sizes: GraphSizes, *, direct_forces: bool = True) -> dict[str, int]:
    """Return the multiply-adds of one forward pass, by part of the model.

    Args:
        config: the model.
        sizes: of the batch, from `graph_sizes`.
        direct_forces: count the force branch if the model has one.
    """
    forces = direct_forces and config.direct_forces
    blocks = config.blocks
    parts = {
        "bases": _bases(config, sizes),
        "angles": _angles(sizes),
        "edge_embedding": sizes.edges * (2 * config.emb_size_atom + config.num_radial) * config.emb_size_edge,
    }
    parts |= {name: blocks * value for name, value in _block(config, sizes).items()}
    parts["output_blocks"] = (blocks + 1) * _output_block(config, sizes, forces=forces)
    parts["final_mlp"] = _final_mlp(config, config.emb_size_atom) * sizes.atoms
    parts["heads"] = config.num_tasks * _head(config, config.emb_size_atom) * sizes.atoms
    if forces:
        parts["final_mlp"] += _final_mlp(config, config.emb_size_edge) * sizes.edges
        parts["heads"] += config.num_tasks * _head(config, config.emb_size_edge) * sizes.edges
    return parts


def _bases(c: JMPConfig, n: GraphSizes) -> int:
    radial = (5 * n.edges + n.atom_edges + n.pairs) * c.emb_size_rbf
    circular = (2 * n.edges + n.atom_edges + n.quad_edges) * c.num_spherical * c.emb_size_cbf
    spherical = n.edges * c.num_spherical**2 * c.emb_size_sbf
    return c.num_radial * (radial + circular + spherical)


def _angles(n: GraphSizes) -> int:
    """Count three multiply-adds for every cosine."""
    triplets = n.edge_to_edge + n.atom_to_edge + n.edge_to_atom + n.quad_inputs + n.quad_outputs
    return 3 * (triplets + n.quadruplets)


def _block(c: JMPConfig, n: GraphSizes) -> dict[str, int]:
    atom, edge, rbf = c.emb_size_atom, c.emb_size_edge, c.emb_size_rbf
    update = rbf * edge * n.edges + (edge * atom + 2 * c.num_atom * atom * atom) * n.atoms
    concat = (2 * atom + edge) * edge
    residual = 2 * (c.num_before_skip + c.num_after_skip + c.num_concat) * edge * edge
    return {
        "edge_to_edge": _triplet(c, n.edges, edge, n.edges, n.edge_to_edge, n.edges, 2 * edge),
        "quadruplets": _quadruplet(c, n),
        "atom_to_edge": _triplet(c, n.atom_edges, atom, n.edges, n.atom_to_edge, n.edges, 2 * edge)
        + (n.atoms - n.atom_edges) * atom * atom,  # the first layer acts on atoms, before they are gathered
        "edge_to_atom": _triplet(c, n.edges, edge, n.atom_edges, n.edge_to_atom, n.atoms, atom),
        "atom_pairs": _pair(c, n),
        "edge_updates": n.edges * (edge * edge + residual + concat),
        "atom_updates": update + 2 * c.num_atom_emb_layers * atom * atom * n.atoms,
    }


def _triplet(
    c: JMPConfig, rows_in: int, width_in: int, rows_mid: int, triplets: int, rows_out: int, width_out: int
) -> int:
    size_in, size_out, basis = c.emb_size_trip_in, c.emb_size_trip_out, c.emb_size_cbf
    inputs = rows_in * (width_in * width_in + c.emb_size_rbf * width_in + width_in * size_in)
    sums = (triplets + rows_mid * basis) * c.num_spherical * size_in
    return inputs + sums + rows_out * (basis * size_in * size_out + size_out * width_out)


def _quadruplet(c: JMPConfig, n: GraphSizes) -> int:
    edge, size_in, size_out = c.emb_size_edge, c.emb_size_quad_in, c.emb_size_quad_out
    inputs = n.edges * (edge * edge + c.emb_size_rbf * edge + edge * size_in)
    middles = n.quad_inputs * c.emb_size_cbf * (c.num_spherical + size_in)
    sums = (n.quadruplets + n.edges * c.emb_size_sbf) * c.num_spherical**2 * size_in
    return inputs + middles + sums + n.edges * (c.emb_size_sbf * size_in * size_out + 2 * size_out * edge)


def _pair(c: JMPConfig, n: GraphSizes) -> int:
    atom, size_in, size_out, rbf = c.emb_size_atom, c.emb_size_pair_in, c.emb_size_pair_out, c.emb_size_rbf
    per_atom = atom * size_in + rbf * size_in * size_out + size_out * atom
    return n.atoms * per_atom + n.pair_terms * rbf * size_in


def _output_block(c: JMPConfig, n: GraphSizes, *, forces: bool) -> int:
    atom, edge = c.emb_size_atom, c.emb_size_edge
    energy = n.edges * c.emb_size_rbf * edge
    energy += n.atoms * (edge * atom + 2 * (c.num_atom + c.num_output_after_atom) * atom * atom)
    return energy + (n.edges * (2 * c.num_atom * edge * edge + c.emb_size_rbf * edge) if forces else 0)


def _final_mlp(c: JMPConfig, size: int) -> int:
    return (c.blocks + 1) * size * size + 2 * c.num_global_out_layers * size * size


def _head(c: JMPConfig, size: int) -> int:
    return size if c.head == "linear" else 4 * size * size + size
