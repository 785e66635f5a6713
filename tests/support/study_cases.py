"""A study small enough for tests: nine stores of a few demo structures each, a tiny teacher, and its command line."""

import dataclasses
import subprocess

import torch

import ejmp
from ejmp.data import Format, Part, demo
from ejmp.data.store.conversion import convert
from ejmp.study.settings import DOWNSTREAM, MIX
from ejmp.train.demo import demo_config
from ejmp.train.sources import demo_mix
from support.inputs import environment

COUNTS = {"train": 8, "val": 3, "test": 3}
"""Structures of each split of a store."""
LABELS = {("qmof", "gap"): "bandgap"}
"""Labels that have another name in the real data."""
LENGTHS = (
    *("--distill-steps", "4", "--finetune-steps", "4", "--finetune-seconds", "600"),
    *("--relevance-structures", "2", "--inference-batch", "2", "--inference-seconds", "0.1"),
)
"""Flags for runs of a few steps."""


def write_store(name, folder, splits):
    """Write the first structures of some splits of a demo dataset as a record store."""

    def parts(_):
        return [Part(name=split, count=COUNTS[split], split=split) for split in splits]

    def read(_, part):
        data = demo(name, part.split)
        smallest = sorted(range(len(data)), key=lambda i: int(data.num_atoms[i]))
        for number in sorted(smallest[: part.count]):
            targets = {LABELS.get((name, label), label): value for label, value in data[number].targets.items()}
            yield dataclasses.replace(data[number], targets=targets)

    convert(name, folder, format=Format(parts=parts, read=read))


def write_inputs(folder):
    """Write nine stores and a teacher; return the flags that name them."""
    for name in (*MIX, *DOWNSTREAM):
        write_store(name, folder / name, ("train", "val", "test") if name in DOWNSTREAM else ("train", "val"))
    config = demo_config()
    sizes = {size: 8 for size in vars(config) if size.startswith("emb_size")}
    torch.manual_seed(0)
    tasks = [dataclasses.replace(s.task, graph=ejmp.GraphSettings(cutoff=3.0, max_neighbors=5)) for s in demo_mix()]
    model = ejmp.JMP(dataclasses.replace(config, **sizes, num_radial=8), tasks=tasks)
    ejmp.save(model, folder / "teacher")
    stores = ",".join(f"{name}={folder / name}" for name in (*MIX, *DOWNSTREAM))
    return ("--teacher", str(folder / "teacher"), "--data", stores)


def start(*arguments, errors=subprocess.PIPE, **options):
    """Start `ejmp reproduce ARGUMENTS` in a process, and in a session, of its own."""
    words = ["ejmp", "reproduce", *map(str, arguments)]
    variables = environment(DS_ACCELERATOR="cpu") | options
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables, start_new_session=True
    )


def reproduce(*arguments, status=0, **options):
    """Run `ejmp reproduce ARGUMENTS`, and return what it printed on both streams."""
    process = start(*arguments, **options)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == status, (out + errors)[-3000:]
    return out, errors
