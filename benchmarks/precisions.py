"""What each precision of the linear maps costs in accuracy and gains in time, on one core or more.

    python benchmarks/precisions.py ../shared/spec/jmp_l_scale_factors.json OUT.json [--seconds 120]

Times are of JMP-L's scalar model with random weights on MOF-5, all precisions by turns beside the machine's products,
which give the floor: the time of all products alone. Errors against float64 are of the energies and direct forces of
JMP-L with random weights and its published scale factors, on the same MOF. What is lost on labels is measured with the
demo teacher on all its validation structures, as it is, in bf16, and stored and run in 8 bits.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path

import torch

import ejmp
from ejmp.measure import bench, workloads
from ejmp.measure.timing import Rounds
from ejmp.provenance import provenance
from ejmp.train.demo import demo_teacher
from ejmp.train.evaluate import evaluate
from ejmp.train.faults import session
from ejmp.train.search import ratio
from ejmp.train.sources import demo_mix
from ejmp_kernels.allocator import keep_freed_memory

PRECISIONS = ("fp32", "bf16", "int8")
BLOCKS = (6, 2)


def scaled_model(path: Path) -> ejmp.JMP:
    """Return JMP-L with random weights and the scale factors of a file."""
    torch.manual_seed(0)
    model = ejmp.JMP(ejmp.jmp_l(blocks=max(BLOCKS))).eval()
    for name, value in json.loads(path.read_text()).items():
        model.get_buffer(f"backbone.{name}.scale_factor").fill_(value)
    return model


@torch.no_grad()
def errors_against_float64(model: ejmp.JMP) -> dict[str, dict[str, float]]:
    """Return the errors of energies and forces by precision: norms of differences over norms."""
    graph = bench.workload_graph(workloads.framework())
    exact = copy.deepcopy(model).double()(graph.to(dtype=torch.float64))
    found = {}
    for precision in PRECISIONS:
        out = model.on(precision=precision)(graph)
        pairs = {name: (getattr(out, name), getattr(exact, name)) for name in ("energy", "forces")}
        found[precision] = {name: ((x - y).norm() / y.norm()).item() for name, (x, y) in pairs.items()}
    return found


def file_sizes(model: ejmp.JMP) -> dict[str, int]:
    """Return the bytes of a saved model, in float32 and in 8 bits."""
    with tempfile.TemporaryDirectory() as scratch:
        for weights in ("float", "int8"):
            ejmp.save(model, Path(scratch, weights), weights=weights)
        return {name: Path(scratch, name, "model.safetensors").stat().st_size for name in ("float", "int8")}


def errors_on_labels() -> dict[str, dict]:
    """Return the demo teacher's validation errors by precision, and the mean of their ratios to those of fp32."""
    teacher, sources = ejmp.load(demo_teacher()), demo_mix()
    with session("cpu") as ranks, tempfile.TemporaryDirectory() as scratch:
        ejmp.save(teacher, Path(scratch, "small"), weights="int8")
        models = {name: teacher.on(precision=name) for name in PRECISIONS}
        models["int8"] = ejmp.load(Path(scratch, "small"), precision="int8")
        errors = {name: evaluate(model, sources, ranks) for name, model in models.items()}
    return {name: {"errors": row, "over_fp32": ratio(row, errors["fp32"])} for name, row in errors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scale_factors", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0, help="for timing by turns (default: 120)")
    options = parser.parse_args()
    keep_freed_memory()
    rounds = Rounds(least=3, most=20, seconds=options.seconds, warm_ups=0)
    request = bench.BenchRequest(
        workload=workloads.framework(), blocks=BLOCKS, precisions=PRECISIONS, rounds=rounds, backend="native"
    )
    found = {"times": bench.run(request, lambda line: print(line, flush=True))}
    model = scaled_model(options.scale_factors)
    found["bytes"] = file_sizes(model)
    found["against_float64"] = errors_against_float64(model)
    found["on_labels"] = errors_on_labels()
    found["provenance"] = provenance(torch.device("cpu"))
    options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
