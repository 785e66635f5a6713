"""`ejmp prune`."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ejmp.compress.config import parse_blocks


@dataclass(frozen=True, kw_only=True)
class PruneRequest:
    """Keep some interaction blocks of a saved model."""

    model: Path
    """Model to prune, as `ejmp.load` reads it."""
    out: Path
    """Directory to write the smaller model to."""
    blocks: int | None
    """Number of blocks to keep, the first ones; None: `keep` says which."""
    keep: tuple[int, ...] | None
    """Numbers of the blocks to keep; None: `blocks` says how many."""
    final_mlp: Literal["sliced", "random"]
    """How the first layer of the final MLP is made; see `ejmp.prune`."""
    seed: int
    """Seed of a random first layer."""
    overwrite: bool
    """Whether a model in the directory is replaced."""


def add_prune(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ejmp prune` to its parser."""
    parser.set_defaults(run=_prune)
    parser.add_argument("model", type=Path, help="what ejmp.load reads")
    parser.add_argument("out", type=Path, help="directory to write")
    kept = parser.add_mutually_exclusive_group(required=True)
    kept.add_argument("--blocks", type=int, help="keep this many, the first ones")
    kept.add_argument("--keep", metavar="0,1,...", help="keep exactly these, numbered from 0")
    parser.add_argument("--final-mlp", default="sliced", choices=("sliced", "random"), help="default: sliced")
    parser.add_argument("--seed", type=int, default=0, help="seed of --final-mlp random (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model at OUT")


def _prune(options: argparse.Namespace) -> int:
    import torch  # noqa: PLC0415

    import ejmp  # noqa: PLC0415

    request = PruneRequest(
        model=options.model,
        out=options.out,
        blocks=options.blocks,
        keep=None if options.keep is None else parse_blocks(options.keep),
        final_mlp=options.final_mlp,
        seed=options.seed,
        overwrite=options.overwrite,
    )
    torch.manual_seed(request.seed)
    model = ejmp.load(request.model)
    small = ejmp.prune(model, blocks=request.blocks, keep=request.keep, final_mlp=request.final_mlp)
    ejmp.save(small, request.out, overwrite=request.overwrite)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    kept = ", ".join(map(str, small.config.kept_blocks or ()))
    print(f"{request.out}: blocks {kept}; {after:,} of {before:,} parameters")
    return 0
