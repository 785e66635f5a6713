"""The small teacher that ships with the package: JMP's six blocks and heads at a fraction of the widths.

It was pre-trained on the demo mix, by `python -m ejmp.train.make_teacher`, so that pruning and distilling can be tried
in minutes on two cores. Nothing measured with it says anything about JMP-L.
"""

import json
from pathlib import Path

from ejmp.data.store.durable import hash_file
from ejmp.model.config import JMPConfig

TEACHER = Path(__file__).parent / "teacher"
"""Folder of the teacher: the model as `ejmp.load` reads it, its recipe with the hash of its weights, and its log."""
RECIPE = "recipe.json"
"""File that says how the teacher was made."""


def demo_config(*, blocks: int = 6) -> JMPConfig:
    """Return the sizes of the demo model: 0.7 M parameters at six blocks, which have no residual layers.

    Args:
        blocks: number of interaction blocks.
    """
    return JMPConfig(
        blocks=blocks,
        emb_size_atom=64,
        emb_size_edge=64,
        emb_size_trip_in=16,
        emb_size_trip_out=16,
        emb_size_quad_in=8,
        emb_size_quad_out=8,
        emb_size_pair_in=16,
        emb_size_pair_out=16,
        emb_size_rbf=16,
        emb_size_cbf=8,
        emb_size_sbf=16,
        num_radial=64,
        num_before_skip=0,
        num_after_skip=0,
        num_concat=0,
        num_atom=0,
        num_output_after_atom=0,
        num_atom_emb_layers=0,
    )


def demo_teacher(folder: Path = TEACHER) -> Path:
    """Return the folder of the demo teacher, after comparing its weights with their hash.

    Args:
        folder: where it is.

    Raises:
        ValueError: if the teacher is damaged or not there, naming its folder.
    """
    try:
        expected = json.loads((folder / RECIPE).read_text())["hash"]
        found = hash_file(folder / "model.safetensors")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"demo teacher: {folder} is not whole ({error}); install ejmp again") from error
    if found != expected:
        raise ValueError(f"demo teacher: {folder} is damaged: its weights have hash {found}; install ejmp again")
    return folder
