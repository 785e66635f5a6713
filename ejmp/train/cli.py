"""`ejmp search`, `ejmp prune` and `ejmp quantize`."""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from ejmp.compress.config import (
    FINAL_MLPS,
    REFIT_STRUCTURES,
    RESIDUALS,
    FinalMLPStart,
    parse_blocks,
    parse_residuals,
)

CALIBRATION = 16
"""How many training structures `ejmp quantize --keep` looks at."""


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
    final_mlp: FinalMLPStart
    """How the first layer of the final MLP is made; see `ejmp.prune`."""
    edge_channels: int | None
    """Channels of edges to keep; None: all."""
    residuals: dict[str, int]
    """Residual layers to keep in each block, by place; empty: all."""
    data: str | None
    """Record stores whose training structures say what is fitted and left out; None: the demo mix."""
    structures: int
    """How many structures are looked at."""
    seed: int
    """Seed of a random first layer."""
    overwrite: bool
    """Whether a model in the directory is replaced."""

    def __post_init__(self) -> None:
        """Check the numbers, and that nothing is asked for that has no effect."""
        if self.structures < 1:
            raise ValueError(f"--structures: expected 1 or more, got {self.structures}")
        if self.data and not self.looks_at_data:
            raise ValueError("--data: only --final-mlp refit, --edge-channels and --residuals look at structures")

    @property
    def looks_at_data(self) -> bool:
        """Whether structures are needed."""
        return self.final_mlp == "refit" or self.edge_channels is not None or bool(self.residuals)


def add_prune(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ejmp prune` to its parser."""
    parser.set_defaults(run=_prune)
    parser.add_argument("model", type=Path, help="what ejmp.load reads")
    parser.add_argument("out", type=Path, help="directory to write")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--blocks", type=int, help="keep this many interaction blocks, the first ones")
    kept.add_argument("--keep", metavar="0,1,...", help="keep exactly these, numbered from 0")
    text = "keep this many channels of edges in all blocks; least squares make up for the others"
    parser.add_argument("--edge-channels", type=int, metavar="N", help=text)
    text = f"keep so many residual layers of edges in each block; places: {', '.join(RESIDUALS)}"
    parser.add_argument("--residuals", metavar="PLACE=NUMBER,...", help=text)
    text = "how the final MLP's first layer is made: sliced (default), random, or refitted to what it gave before"
    parser.add_argument("--final-mlp", default="sliced", choices=FINAL_MLPS, help=text)
    text = "record stores to fit on, named as the model's tasks; default: the embedded demo mix"
    parser.add_argument("--data", metavar="NAME=FOLDER,...", help=text)
    text = f"how many of their structures to fit on; default: {REFIT_STRUCTURES}"
    parser.add_argument("--structures", type=int, metavar="N", default=REFIT_STRUCTURES, help=text)
    parser.add_argument("--seed", type=int, default=0, help="seed of a random layer, and of the choice of structures")
    parser.add_argument("--overwrite", action="store_true", help="replace a model at OUT")


def _prune(options: argparse.Namespace) -> int:
    import torch  # noqa: PLC0415

    import ejmp  # noqa: PLC0415
    from ejmp.train.sources import graphs_of, mix_of, with_tasks_of  # noqa: PLC0415

    request = PruneRequest(
        model=options.model,
        out=options.out,
        blocks=options.blocks,
        keep=None if options.keep is None else parse_blocks(options.keep),
        final_mlp=options.final_mlp,
        edge_channels=options.edge_channels,
        residuals=parse_residuals(options.residuals) if options.residuals else {},
        data=options.data,
        structures=options.structures,
        seed=options.seed,
        overwrite=options.overwrite,
    )
    torch.manual_seed(request.seed)
    model = ejmp.load(request.model)
    graphs = None
    if request.looks_at_data:
        sources = with_tasks_of(request.model, mix_of(request.data), model)
        graphs = graphs_of(model, sources, request.structures, seed=request.seed)
    small = ejmp.prune(
        model,
        blocks=request.blocks,
        keep=request.keep,
        final_mlp=request.final_mlp,
        edge_channels=request.edge_channels,
        residuals=request.residuals,
        data=graphs,
    )
    ejmp.save(small, request.out, overwrite=request.overwrite)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    kept = ", ".join(map(str, small.config.kept_blocks or ()))
    channels = f"; {small.config.emb_size_edge} channels of edges" if request.edge_channels else ""
    print(f"{request.out}: blocks {kept}{channels}; {after:,} of {before:,} parameters")
    return 0


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """Find out which interaction blocks of a saved model to keep."""

    model: Path
    """Unpruned model, as `ejmp.load` reads it."""
    data: str | None
    """Record stores to try subsets on; None: the demo mix."""
    structures: int
    """Largest number of validation structures of each."""
    refit: int
    """Number of the best subsets of each size that are refitted and compared again."""
    refit_structures: int
    """How many training structures they are refitted on."""
    output: Path | None
    """File to write everything to that was found, as JSON."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, least in (("structures", 1), ("refit", 0), ("refit_structures", 1)):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: expected {least} or more, got {getattr(self, name)}")


def add_search(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ejmp search` to its parser."""
    parser.set_defaults(run=_search)
    parser.add_argument("model", type=Path, help="unpruned model, what ejmp.load reads")
    text = "record stores, named as the model's tasks; default: the embedded demo mix"
    parser.add_argument("--data", metavar="NAME=FOLDER,...", help=text)
    text = "at most this many validation structures of each (default: 64)"
    parser.add_argument("--structures", type=int, metavar="N", default=64, help=text)
    text = "refit the final MLP of this many of the best subsets of each size, and compare again (default: 0)"
    parser.add_argument("--refit", type=int, metavar="N", default=0, help=text)
    text = f"training structures to refit on; default: {REFIT_STRUCTURES}"
    parser.add_argument("--refit-structures", type=int, metavar="N", default=REFIT_STRUCTURES, help=text)
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the errors of all subsets, and the scores")


def _search(options: argparse.Namespace) -> int:
    import ejmp  # noqa: PLC0415
    from ejmp.provenance import provenance  # noqa: PLC0415
    from ejmp.train.search import search, text_of, to_json  # noqa: PLC0415
    from ejmp.train.sources import mix_of, with_tasks_of  # noqa: PLC0415

    request = SearchRequest(
        model=options.model,
        data=options.data,
        structures=options.structures,
        refit=options.refit,
        refit_structures=options.refit_structures,
        output=options.output,
    )
    model = ejmp.load(request.model)
    found = search(
        model,
        with_tasks_of(request.model, mix_of(request.data), model),
        structures=request.structures,
        refit=request.refit,
        refit_structures=request.refit_structures,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(text_of(found), end="")
    if request.output is not None:
        content = to_json(found) | {"provenance": provenance(model.device)}
        request.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """Store a model's weights in 8 bits."""

    model: Path
    """Model to store, as `ejmp.load` reads it."""
    out: Path
    """Directory to write it to."""
    data: str | None
    """Record stores whose validation structures say what it costs; None: nothing is measured."""
    structures: int
    """Largest number of validation structures of each."""
    keep: int
    """How many layers stay in 16 bits: those whose rounding to 8 changes most on training structures of `data`."""
    overwrite: bool
    """Whether a model in the directory is replaced."""

    def __post_init__(self) -> None:
        """Check the numbers, and that there is data where it is needed."""
        if self.structures < 1:
            raise ValueError(f"--structures: expected 1 or more, got {self.structures}")
        if self.keep < 0:
            raise ValueError(f"--keep: expected 0 or more, got {self.keep}")
        if self.keep and self.data is None:
            raise ValueError("--keep: needs --data, on which layers are chosen")


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ejmp quantize` to its parser."""
    parser.set_defaults(run=_quantize)
    parser.add_argument("model", type=Path, help="what ejmp.load reads")
    parser.add_argument("out", type=Path, help="directory to write; ejmp.load reads it as any other")
    text = "record stores, named as the model's tasks: compare errors in float32 with those of --precision int8"
    parser.add_argument("--data", metavar="NAME=FOLDER,...", help=text)
    text = "at most this many validation structures of each (default: 200)"
    parser.add_argument("--structures", type=int, metavar="N", default=200, help=text)
    text = f"layers that stay in 16 bits: those that change most on {CALIBRATION} training structures (default: 0)"
    parser.add_argument("--keep", type=int, metavar="N", default=0, help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace a model at OUT")


def _quantize(options: argparse.Namespace) -> int:
    import ejmp  # noqa: PLC0415
    from ejmp.compress.calibration import keep_in_bf16, layer_errors  # noqa: PLC0415
    from ejmp.train.evaluate import evaluate, table  # noqa: PLC0415
    from ejmp.train.faults import session  # noqa: PLC0415
    from ejmp.train.sources import at_most, graphs_of, mix_of, with_tasks_of  # noqa: PLC0415

    request = QuantizeRequest(
        model=options.model,
        out=options.out,
        data=options.data,
        structures=options.structures,
        keep=options.keep,
        overwrite=options.overwrite,
    )
    model, chosen = ejmp.load(request.model), []
    if request.data is not None:
        sources = with_tasks_of(request.model, mix_of(request.data), model)
        chosen = [at_most(source, "val", request.structures, seed=0) for source in sources]
        if request.keep:
            errors = layer_errors(model, list(graphs_of(model, sources, CALIBRATION)))
            model = keep_in_bf16(model, list(errors)[: request.keep])
            print("layers that stay in 16 bits, and by how much each alone changes what the model says in 8:")
            print("\n".join(f"    {name}  {errors[name]:.2e}" for name in model.config.bf16_layers))
    ejmp.save(model, request.out, overwrite=request.overwrite, weights="int8")
    size = (request.out / "model.safetensors").stat().st_size
    numbers = sum(parameter.numel() for parameter in model.parameters())
    print(f"{request.out}: {size:,} bytes, {8 * size / numbers:.1f} bits per parameter")
    if chosen:
        small = ejmp.load(request.out)
        models = {"fp32": model, "bf16": model.on(precision="bf16"), "int8": small.on(precision="int8")}
        with session("cpu") as ranks:
            print(table({name: evaluate(each, chosen, ranks) for name, each in models.items()}))
    return 0
