"""What keeping some layers in 16 bits, and training for 8 bits, change in the errors of a model in 8-bit integers.

    ejmp distill --blocks 4 --steps 400 --batch-size 8 --run PLAIN
    ejmp distill --blocks 4 --steps 400 --batch-size 8 --precision int8 --run ROUNDED
    python benchmarks/eight_bits.py PLAIN ROUNDED OUT.json

Errors are those of all validation structures of the demo mix: of the demo teacher with the N worst layers in bfloat16,
as `ejmp quantize --keep N` chooses them, over its own in float32; and of both students in 8 bits over the first's in
float32.
"""

import argparse
import json
from pathlib import Path

import torch

import ejmp
from ejmp.compress.calibration import keep_in_bf16, layer_errors
from ejmp.provenance import provenance
from ejmp.train.cli import CALIBRATION
from ejmp.train.demo import demo_teacher
from ejmp.train.evaluate import evaluate
from ejmp.train.faults import session
from ejmp.train.search import ratio
from ejmp.train.sources import demo_mix, graphs_of

KEPT = (0, 4, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain", type=Path, help="run of a student distilled in float32")
    parser.add_argument("rounded", type=Path, help="run of the same with --precision int8")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    teacher, sources = ejmp.load(demo_teacher()), demo_mix()
    alone = layer_errors(teacher, list(graphs_of(teacher, sources, CALIBRATION)))
    students = {
        name: ejmp.load(run / "final") for name, run in (("plain", options.plain), ("rounded", options.rounded))
    }
    with session("cpu") as ranks:
        exact = evaluate(teacher, sources, ranks)
        kept = {}
        for count in KEPT:
            model = keep_in_bf16(teacher, list(alone)[:count]).on(precision="int8")
            kept[count] = ratio(evaluate(model, sources, ranks), exact)
        plain = evaluate(students["plain"], sources, ranks)
        trained = {
            name: ratio(evaluate(student.on(precision="int8"), sources, ranks), plain)
            for name, student in students.items()
        }
    found = {"layers": alone, "kept": kept, "trained": trained, "provenance": provenance(torch.device("cpu"))}
    options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
