"""`ejmp export`."""

import argparse
from pathlib import Path


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ejmp export` to its parser."""
    parser.set_defaults(run=_export)
    parser.add_argument("model", type=Path, help="what ejmp.load reads")
    parser.add_argument("out", type=Path, help="NAME.pt2 for an AOTInductor package, else a directory of safetensors")
    parser.add_argument("--task", help="name of one of the model's tasks (default: the only one)")
    parser.add_argument(
        "--forces", default="auto", choices=("auto", "direct", "gradient", "none"), help="default: auto"
    )
    parser.add_argument("--device", default="cpu", help="what the package is for: cpu or cuda (default: cpu)")
    parser.add_argument("--atoms", type=int, nargs="+", default=[3, 12, 40], help="sizes to verify (default: 3 12 40)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at OUT")


def _export(options: argparse.Namespace) -> int:
    import ejmp  # noqa: PLC0415

    model = ejmp.load(options.model, device=options.device)
    if options.out.suffix != ".pt2":
        ejmp.save(model, options.out, overwrite=options.overwrite)
        print(f"{options.out}: safetensors, config and tasks")
        return 0
    forces = None if options.forces == "none" else options.forces
    differences = ejmp.export.write_package(
        model, options.out, task=options.task, forces=forces, atoms=options.atoms, overwrite=options.overwrite
    )
    found = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    print(f"{options.out}: relative difference from the model: {found}")
    return 0
