r"""What a model costs that was pre-trained for every number of blocks: its errors beside those of the demo's teacher.

    ejmp pretrain --any-depth --steps 5000 --batch-size 16 --lr 3e-3 --warmup-steps 300 --cosine-end 0.02 \
        --ema 0.995 --seed 0 --run RUN                          # half an hour of a core
    python benchmarks/any_depth.py OUT.json RUN [RUN ...]           # a run for each seed

The demo's teacher (`python -m ejmp.train.make_teacher`) was trained with the same settings, for six blocks only.
"""

import argparse
import json
from pathlib import Path

import torch

import ejmp
from ejmp.measure.bench import make_models
from ejmp.provenance import provenance
from ejmp.train.demo import demo_teacher
from ejmp.train.evaluate import evaluate
from ejmp.train.faults import session
from ejmp.train.loop import FINAL
from ejmp.train.search import ratio
from ejmp.train.sources import demo_mix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run that was trained to its end")
    options = parser.parse_args()
    sources, rows = demo_mix(), []
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
    result = {"commands": __doc__, "plain": plain, "rows": rows, "provenance": provenance(torch.device("cpu"))}
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
