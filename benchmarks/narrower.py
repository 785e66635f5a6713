"""Narrower blocks against fewer blocks, on a teacher whose time goes into matrix products, as JMP's does.

    python benchmarks/narrower.py teacher FOLDER                       # 65 minutes of a core
    python benchmarks/narrower.py students FOLDER --seed 0             # an hour of a core; also 1, 2
    python benchmarks/narrower.py gather FOLDER OUT.json

The demo's teacher has 64 channels of edges, where least of the time is products. This one has four blocks of 256
channels with residual layers, 6.2 million parameters, trained on the demo mix. Students have fewer blocks or channels,
without training and after distillation (`ejmp.study.front`); beside them, narrower models from random weights are
trained on the labels for as many steps. Everything goes on where it was interrupted.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

from ejmp.compress.config import parse_terms
from ejmp.model.checkpoint import load
from ejmp.model.config import JMPConfig
from ejmp.model.jmp import JMP
from ejmp.study import front
from ejmp.study.execute import untrained
from ejmp.study.settings import claim
from ejmp.train import presets
from ejmp.train.config import TrainConfig
from ejmp.train.demo import demo_config
from ejmp.train.distributed import Ranks
from ejmp.train.evaluate import evaluate
from ejmp.train.faults import session
from ejmp.train.loop import FINAL, Run, train
from ejmp.train.objective import Objective, Supervised
from ejmp.train.search import ratio
from ejmp.train.sources import demo_mix, tasks_of, with_tasks_of
from ejmp.train.start import new_model

STEPS = 300
"""Steps of each distillation, and of each model from random weights."""
CHANNELS = (256, 224, 192)
BLOCKS = (4, 3, 2, 1)


def sizes() -> JMPConfig:
    """Return the sizes of the teacher."""
    residual = ("before_skip", "after_skip", "concat", "atom", "output_after_atom", "atom_emb_layers")
    layers = {f"num_{name}": 1 for name in residual}
    return dataclasses.replace(demo_config(blocks=max(BLOCKS)), emb_size_edge=max(CHANNELS), **layers)


def run(objective: Objective, config: TrainConfig, folder: Path, ranks: Ranks) -> JMP:
    """Train, or go on, and return the model in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = Run(
        objective=objective, sources=demo_mix(), config=config, directory=folder, ranks=ranks, force=True,
        validate_first=False,
    )  # fmt: skip
    if not train(whole, resume=None).finished:
        raise SystemExit("stopped; the same command goes on")
    return load(folder / FINAL)


def teacher(folder: Path) -> None:
    """Train the teacher."""
    sources = demo_mix()
    config = dataclasses.replace(presets.teacher(), steps=4000, lr=2e-3, validate_every=2000)
    with session("cpu") as ranks:
        run(Supervised(new_model(sizes(), sources, seed=0), tasks_of(sources)), config, folder / "teacher", ranks)


def students(folder: Path, seed: int) -> None:
    """Make, distil and time the students of one seed, and the narrower models from random weights."""
    path = folder / "teacher" / FINAL
    settings = front.FrontSettings(
        model=str(path),
        data=None,
        blocks=BLOCKS,
        channels=CHANNELS,
        steps=(0, STEPS),
        precisions=("fp32",),
        terms=parse_terms(presets.DEMO_TERMS),
        structures=1000,
        seconds=60.0,
        seed=seed,
    )
    own = folder / f"seed{seed}"
    claim(own, settings)
    whole = load(path)
    sources = with_tasks_of(path, demo_mix(), whole)
    with session("cpu") as ranks:
        result = front.measure(
            own, settings, sources, ranks, report=lambda line: print(line, file=sys.stderr, flush=True)
        )
        first = result["rows"][0]["errors"]
        result["scratch"] = []
        for channels in CHANNELS[1:]:
            small = load(own / f"b{max(BLOCKS)}-w{channels}")
            model = untrained(small, max(BLOCKS), seed=seed)
            config = dataclasses.replace(
                presets.demo("distill"), steps=STEPS, validate_every=STEPS, checkpoint_every=STEPS, seed=seed
            )
            trained = run(Supervised(model, tasks_of(sources)), config, own / f"scratch-w{channels}", ranks)
            error = ratio(evaluate(trained, sources, ranks), first)
            result["scratch"].append({"channels": channels, "error": error})
    (own / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def gather(folder: Path, output: Path) -> None:
    """Write the means and spreads over seeds, and draw them."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("seed*/result.json"))]
    rows = []
    for i, row in enumerate(found[0]["rows"]):
        errors = [each["rows"][i]["error"] for each in found]
        speeds = [each["rows"][i]["speed"] for each in found]
        kept = {name: row[name] for name in ("name", "blocks", "channels", "steps", "precision", "parameters")}
        kept |= {"error": statistics.mean(errors), "errors": errors}
        kept |= {"spread": statistics.stdev(errors) if len(errors) > 1 else None}
        rows.append(kept | {"speed": statistics.median(speeds), "speeds": speeds})
    front.mark(rows)
    scratch = [
        {"channels": row["channels"], "errors": [each["scratch"][i]["error"] for each in found]}
        for i, row in enumerate(found[0]["scratch"])
    ]
    result = {"commands": __doc__, "steps": STEPS, "seeds": len(found), "provenance": found[0]["provenance"]}
    result |= {"teacher": found[0]["rows"][0]["errors"], "rows": rows, "scratch": scratch}
    output.write_text(json.dumps(result, indent=1) + "\n")
    front.picture(result, output.with_suffix(".png"))


def main() -> None:
    """Do one of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("teacher", "students", "gather"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path, nargs="?", help="of gather")
    parser.add_argument("--seed", type=int, default=0, help="of the students (default: 0)")
    options = parser.parse_args()
    if options.part == "teacher":
        teacher(options.folder)
    elif options.part == "students":
        students(options.folder, options.seed)
    else:
        gather(options.folder, options.output)


if __name__ == "__main__":
    main()
