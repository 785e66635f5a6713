"""The commands `ejmp relax`, `md`, `predict` and `compare`."""

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ejmp.model.config import Precision

if TYPE_CHECKING:
    from ejmp.predict.calculator import Calculator


def add_relax(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ejmp relax` to its parser."""
    parser.set_defaults(run=_relax)
    parser.add_argument("file", type=Path, help="structure, of a format ase.io reads; of several the last")
    _add_model(parser)
    parser.add_argument("--optimizer", default="bfgs", choices=("bfgs", "fire", "lbfgs"), help="default: bfgs")
    parser.add_argument("--fmax", type=float, default=0.05, help="largest force at the end, eV/A (default: 0.05)")
    parser.add_argument("--steps", type=int, default=200, help="at most this many (default: 200)")
    parser.add_argument("--cell", action="store_true", help="relax the cell too")
    _add_output(parser, "file of the relaxed structure, by its ending (.extxyz, .traj, .cif, ...)")


def add_md(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ejmp md` to its parser."""
    parser.set_defaults(run=_md)
    parser.add_argument("file", type=Path, help="structure, of a format ase.io reads; of several the last")
    _add_model(parser)
    parser.add_argument("--ensemble", default="nve", choices=("nve", "nvt"), help="default: nve")
    parser.add_argument("--temperature", type=float, default=300.0, help="K (default: 300)")
    parser.add_argument("--steps", type=int, default=1000, help="default: 1000")
    parser.add_argument("--timestep", type=float, default=0.5, help="fs (default: 0.5)")
    parser.add_argument("--friction", type=float, default=0.01, help="of the thermostat, 1/fs (default: 0.01)")
    parser.add_argument("--every", type=int, default=10, help="steps between written frames (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of velocities and thermostat (default: 0)")
    _add_output(parser, "file of frames: .traj, .extxyz or .xyz")


def add_predict(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ejmp predict` to its parser."""
    parser.set_defaults(run=_predict)
    parser.add_argument("files", type=Path, nargs="+", help="structures, of formats ase.io reads")
    _add_model(parser)
    parser.add_argument("--stress", action="store_true", help="predict the stress of periodic structures too")
    _add_max_edges(parser)
    _add_output(parser, "extxyz file of all structures; an interrupted run goes on if it is started again")


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ejmp compare` to its parser."""
    parser.set_defaults(run=_compare)
    parser.add_argument("small", type=Path, help="one model, as ejmp.load reads it")
    parser.add_argument("full", type=Path, help="the other")
    parser.add_argument("files", type=Path, nargs="+", help="structures, of formats ase.io reads")
    _add_task(parser)
    _add_max_edges(parser)
    _add_output(parser, "picture (.png), beside which the numbers are written as .json, or the numbers alone (.json)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="what ejmp.load reads")
    _add_task(parser)


def _add_task(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", help="name of the task, if the model has several")
    parser.add_argument("--forces", default="auto", choices=("auto", "direct", "gradient"), help="default: auto")
    parser.add_argument("--device", help="default: cuda if there is one, or else cpu")
    parser.add_argument(
        "--precision", choices=(*get_args(Precision), "fp64"), help="default: that of the saved weights"
    )


def _add_max_edges(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-edges", type=int, help="main edges of a batch (default: by the free memory)")


def _add_output(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")


def _last_frame(path: Path) -> Any:
    from ejmp.predict.files import read_frames  # noqa: PLC0415

    atoms = None
    for _, atoms in read_frames([path]):  # noqa: B007 - the last one
        pass
    if atoms is None:
        raise ValueError(f"{path}: no structure in it")
    return atoms


def _calculator(options: argparse.Namespace) -> "Calculator":
    import ejmp  # noqa: PLC0415

    calculator = ejmp.Calculator(
        options.model, options.task, forces=options.forces, device=options.device, precision=options.precision
    )
    if calculator.forces is None:
        raise ValueError(f"--forces: task {calculator.task.name} has none; gradient differentiates the energy")
    return calculator


def _say(line: str) -> None:
    print(line, flush=True)


def _relax(options: argparse.Namespace) -> int:
    from ejmp.predict import dynamics, files  # noqa: PLC0415

    asked = dynamics.Relaxation(optimizer=options.optimizer, fmax=options.fmax, steps=options.steps, cell=options.cell)
    files.check_output(options.output, overwrite=options.overwrite)
    atoms = _last_frame(options.file)
    atoms.calc = _calculator(options)
    converged = dynamics.relax(atoms, asked, report=_say)
    files.write_whole(options.output, atoms.write)
    print(f"{options.output}: {'relaxed' if converged else f'not relaxed after {asked.steps} steps'}")
    return 0 if converged else 1


def _md(options: argparse.Namespace) -> int:
    from ejmp.predict import dynamics, files  # noqa: PLC0415

    names = ("ensemble", "temperature", "steps", "timestep", "friction", "every", "seed")
    asked = dynamics.Dynamics(**{name: getattr(options, name) for name in names})
    files.check_output(options.output, overwrite=options.overwrite)
    if options.output.suffix not in (".traj", ".extxyz", ".xyz"):
        raise ValueError(f"--output: expected a name that ends in .traj, .extxyz or .xyz, got {options.output}")
    atoms = _last_frame(options.file)
    atoms.calc = calculator = _calculator(options)
    if asked.ensemble == "nve" and calculator.forces == "direct":
        print("direct forces are no gradient of the energy, which they do not conserve", file=sys.stderr)
    options.output.unlink(missing_ok=True)
    drift = dynamics.run(atoms, asked, options.output, report=_say)
    print(f"{options.output}: total energy drifts by {drift:.4g} meV per atom and ps")
    return 0


def _predict(options: argparse.Namespace) -> int:
    from ejmp.predict import files  # noqa: PLC0415
    from ejmp.predict.predictor import Predictor  # noqa: PLC0415
    from ejmp.progress import progress_bar  # noqa: PLC0415

    files.check_output(options.output, overwrite=options.overwrite)
    predictor = Predictor(
        options.model,
        options.task,
        forces=options.forces,
        stress=options.stress,
        max_edges="auto" if options.max_edges is None else options.max_edges,
        device=options.device,
        precision=options.precision,
    )
    with ExitStack() as stack:
        output = stack.enter_context(
            files.ResumableFrames(options.output, _asked(options), overwrite=options.overwrite)
        )
        show = stack.enter_context(progress_bar("predict", "structures"))
        frames = files.read_frames(options.files)
        for number in range(output.done):
            if next(frames, None) is None:
                raise ValueError(f"--output: {output.part} has {output.done} structures, {number} are in the input")
        for (name, atoms), found in files.predicted(predictor, frames):
            output.append(files.with_prediction(atoms, name, found, predictor.task.target))
            show(output.done, None)
        if not output.done:
            raise ValueError("files: no structure in them")
        output.finish()
    print(f"{options.output}: {output.done} structures")
    return 0


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a run is asked, as far as its results depend on it."""
    model = sorted(options.model.iterdir()) if options.model.is_dir() else [options.model]
    names = ("task", "forces", "stress", "precision")
    return {name: getattr(options, name) for name in names} | {
        name: [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
        for name, paths in (("model", model), ("files", options.files))
    }


def _compare(options: argparse.Namespace) -> int:
    from ejmp.predict import compare, files  # noqa: PLC0415
    from ejmp.predict.predictor import Predictor  # noqa: PLC0415

    output: Path = options.output
    if output.suffix not in (".png", ".json"):
        raise ValueError(f"--output: expected a name that ends in .png or .json, got {output}")
    for path in {output, output.with_suffix(".json")}:
        files.check_output(path, overwrite=options.overwrite)
    if options.small == options.full:
        raise ValueError(f"full: expected another model than {options.small}")
    predictors = [
        Predictor(
            path,
            options.task,
            forces=options.forces,
            max_edges="auto" if options.max_edges is None else options.max_edges,
            device=options.device,
            precision=options.precision,
        )
        for path in (options.small, options.full)
    ]
    found = compare.Comparison((str(options.small), str(options.full)))
    streams = [files.predicted(predictor, files.read_frames(options.files)) for predictor in predictors]
    for ((_, atoms), small), (_, full) in zip(*streams, strict=True):
        found.add(atoms, (small, full))
    if not found.atoms:
        raise ValueError("files: no structure in them")
    result = found.result()
    if output.suffix == ".png":
        files.write_whole(output, found.picture)
    text = json.dumps(result, indent=1) + "\n"
    files.write_whole(output.with_suffix(".json"), lambda path: path.write_text(text))
    print(compare.table(result))
    return 0
