"""What the public JMP code calls the sizes of a model, and what they are called here."""

from collections.abc import Mapping
from typing import Any

NAMES = {
    "num_blocks": "blocks",
    "emb_size_atom": "emb_size_atom",
    "emb_size_edge": "emb_size_edge",
    "emb_size_trip_in": "emb_size_trip_in",
    "emb_size_trip_out": "emb_size_trip_out",
    "emb_size_quad_in": "emb_size_quad_in",
    "emb_size_quad_out": "emb_size_quad_out",
    "emb_size_aint_in": "emb_size_pair_in",
    "emb_size_aint_out": "emb_size_pair_out",
    "emb_size_rbf": "emb_size_rbf",
    "emb_size_cbf": "emb_size_cbf",
    "emb_size_sbf": "emb_size_sbf",
    "num_radial": "num_radial",
    "num_spherical": "num_spherical",
    "num_before_skip": "num_before_skip",
    "num_after_skip": "num_after_skip",
    "num_concat": "num_concat",
    "num_atom": "num_atom",
    "num_output_afteratom": "num_output_after_atom",
    "num_atom_emb_layers": "num_atom_emb_layers",
    "num_global_out_layers": "num_global_out_layers",
    "num_elements": "num_elements",
    "absolute_rbf_cutoff": "rbf_cutoff",
}
"""Our name of each of upstream's sizes."""

FIXED = {
    "activation": "scaled_silu",
    "quad_interaction": True,
    "atom_edge_interaction": True,
    "edge_atom_interaction": True,
    "atom_interaction": True,
    "scale_basis": False,
    "unique_basis_per_layer": False,
    "learnable_rbf": False,
    "forces_coupled": False,
    "rbf": {"name": "gaussian"},
    "rbf_spherical": None,
    "cbf": {"name": "spherical_harmonics"},
    "sbf": {"name": "legendre_outer"},
    "qint_tags": [1, 2],
}
"""Settings of upstream that a JMP model has one value of."""

NO_ATOMS = (
    "expected 1 or more: with no layer after them, upstream leaves the atoms' features out of its output blocks, "
    "which this model always adds"
)
"""Why upstream's models whose output blocks have no layers after the atoms' features are refused."""


def sizes_from_upstream(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate upstream's `BackboneConfig` into arguments of `ejmp.JMPConfig`.

    Args:
        config: upstream's names and values.

    Raises:
        ValueError: if a size is missing, or a setting asks for something JMP does not use.
    """
    for name, expected in FIXED.items():
        if config.get(name, expected) != expected:
            raise ValueError(f"upstream config: {name}: only {expected!r} is supported, got {config[name]!r}")
    missing = [name for name in NAMES if name not in config]
    if missing:
        raise ValueError(f"upstream config: missing {', '.join(missing)}")
    sizes = {ours: config[theirs] for theirs, ours in NAMES.items()}
    if sizes["num_output_after_atom"] == 0:
        raise ValueError(f"upstream config: num_output_afteratom: {NO_ATOMS}")
    return {
        "direct_forces": bool(config.get("direct_forces", True) and config.get("regress_forces", True)),
        "envelope_exponent": config.get("envelope", {}).get("exponent", 5),
        "energy_reduction": "sum" if config.get("extensive", True) else "mean",
        **sizes,
    }
