"""Make the demo mix: `python -m ejmp.data.generate OUT [NAME ...]`."""

import argparse
import time
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np

from ejmp.data.embedded import DEMO_DOWNSTREAM, DEMO_MIX
from ejmp.data.generate.labels import dropped
from ejmp.data.generate.recipes import RECIPES
from ejmp.data.generate.write import split_by_formula, split_frames, write
from ejmp.data.info import DatasetInfo

NAMES = DEMO_MIX + DEMO_DOWNSTREAM
"""All demo datasets. A dataset's place here is part of its seed."""
METHODS = {"oc20": "EMT of ASE", "oc22": "GFN1-xTB, Gamma point", "qmof": "GFN1-xTB, Gamma point"}
ONE_MOLECULE = ("rmd17", "md22")


def generate(folder: Path, name: str, scale: float, seed: int) -> str:
    """Make one dataset and return a line that says what was made."""
    recipe, count, shares = RECIPES[name]
    start = time.perf_counter()
    dropped.clear()
    rng = np.random.default_rng([seed, NAMES.index(name)])
    labelled = (structure for structure in recipe(rng) if structure is not None)
    structures = list(islice(labelled, round(scale * count)))
    one = name in ONE_MOLECULE
    splits = split_frames(len(structures), shares) if one else split_by_formula(structures, shares, rng)
    method = METHODS.get(name, "GFN2-xTB")
    source = f"python -m ejmp.data.generate --seed {seed}; labels: {method}; {dropped.total()} structures dropped"
    info = DatasetInfo(name=name, format="demo", split="", count=0, source=source, licence="MIT")
    infos = write(folder / f"{name}.npz", structures, splits, info)
    counts = ", ".join(f"{split} {one.count}" for split, one in infos.items())
    size = (folder / f"{name}.npz").stat().st_size / 1e6
    return f"{name}: {counts}; {size:.2f} MB; dropped {dict(dropped)}; {time.perf_counter() - start:.0f} s"


def main() -> None:
    """Make the datasets that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m ejmp.data.generate", description="Make the demo mix.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of structures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    missing = [module for module in ("ase", "tblite") if find_spec(module) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} not installed: pip install ejmp[demo]")
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        print(generate(options.folder, name, options.scale, options.seed), flush=True)


if __name__ == "__main__":
    main()
