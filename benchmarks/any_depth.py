r"""What a model costs that was pre-trained for every number of blocks: its errors beside those of the demo's teacher.

    ejmp pretrain --any-depth --steps 5000 --batch-size 16 --lr 3e-3 --warmup-steps 300 --cosine-end 0.02 \
        --ema 0.995 --seed 0 --run RUN                          # half an hour of a core
    python benchmarks/any_depth.py OUT.json RUN [RUN ...]           # a run for each seed

The demo's teacher (`python -m ejmp.train.make_teacher`) was trained with the same settings, for six blocks only.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import torch

import ejmp
from ejmp.data import MixSampler
from ejmp.measure.bench import make_models
from ejmp.measure.timing import Rounds, by_turns, median_ratio
from ejmp.provenance import provenance
from ejmp.train.demo import demo_config, demo_teacher
from ejmp.train.evaluate import evaluate
from ejmp.train.faults import session
from ejmp.train.loop import FINAL
from ejmp.train.objective import Objective, Supervised
from ejmp.train.search import ratio
from ejmp.train.sources import TaskData, demo_mix, loader_of, tasks_of
from ejmp.train.start import new_model

CPU = torch.device("cpu")


def step_cost(sources: list[TaskData], rounds: int = 20) -> dict[str, float]:
    """Return what a training step costs when the first two blocks, and all more, learn to do alone.

    "over_plain" is the median over rounds of the time of a step over that of a plain step on the same batch; "plain_ms"
    and "any_depth_ms" are medians in ms. Optimiser and gradient clipping, which cost both the same, are left out.
    """
    sizes = demo_config()
    loader = loader_of(
        sources, "train", MixSampler(sizes=[len(s.split("train")) for s in sources], batch_size=16, seed=0)
    )
    batch = next(iter(loader.batches()))

    def step(config: ejmp.JMPConfig) -> Objective:
        return Supervised(new_model(config, sources, seed=0).train(), tasks_of(sources))

    objectives = {
        "plain": step(sizes),
        "any_depth": step(dataclasses.replace(sizes, depths=tuple(range(2, sizes.blocks + 1)))),
    }
    calls = {name: lambda each=each: each(batch).total.backward() for name, each in objectives.items()}
    found = by_turns(calls, CPU, Rounds(least=rounds))
    medians = {f"{name}_ms": 1e3 * statistics.median(times) for name, times in found.items()}
    return {"over_plain": median_ratio(found["any_depth"], found["plain"]), **medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run that was trained to its end")
    options = parser.parse_args()
    sources, rows = demo_mix(), []
    cost = step_cost(sources)
    print(f"a step of pretrain --any-depth takes {cost['over_plain']:.2f} x a plain one")
    with session("cpu") as ranks:
        plain = evaluate(ejmp.load(demo_teacher()), sources, ranks)
        for run in options.runs:
            model = ejmp.load(run / FINAL)
            if model.config.depths is None:
                parser.error(f"{run}: this model was not trained with --any-depth")
            for blocks, pruned in make_models(sorted(model.config.depths, reverse=True), model).items():
                errors = evaluate(pruned, sources, ranks)
                rows.append({"run": run.name, "blocks": blocks, "errors": errors, "over_plain": ratio(errors, plain)})
                print(
                    f"{run.name}, {blocks} blocks: {rows[-1]['over_plain']:.3f} x the plain teacher's error of forces"
                )
    result = {"commands": __doc__, "step": cost, "plain": plain, "rows": rows, "provenance": provenance(CPU)}
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
