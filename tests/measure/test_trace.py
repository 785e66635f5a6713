"""The Chrome trace: a file that JSON reads, with our ops inside the parts of the model inside the steps."""

import gzip
import json

import pytest

import ejmp
from ejmp.measure import bench, workloads
from ejmp.measure.trace import write_trace
from ejmp.train.demo import demo_config


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_spans_lie_in_each_other(name, tmp_path):
    model = ejmp.JMP(demo_config(blocks=1)).eval()
    graph = bench.workload_graph(workloads.rocksalt(1, repeats=1))
    path = tmp_path / "new" / name
    write_trace(model, graph, path, steps=2)
    text = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
    spans = [event for event in json.loads(text)["traceEvents"] if event.get("ph") == "X"]
    named = {}
    for span in spans:
        named.setdefault(span["name"], []).append((span["ts"], span["ts"] + span["dur"]))
    assert len(named["step 0"]) == len(named["step 1"]) == 1
    assert "step 2" not in named
    steps = sorted(named["step 0"] + named["step 1"])
    assert len(named["block 0"]) == 2
    for (start, stop), block in zip(steps, sorted(named["block 0"]), strict=True):
        assert start <= block[0] <= block[1] <= stop
    ours = [op for op in named if op.startswith("ejmp::")]
    assert ours
    for op in ours:
        assert all(any(start <= a <= b <= stop for start, stop in steps) for a, b in named[op])


def test_a_file_that_cannot_be_written(tmp_path):
    graph = bench.workload_graph(workloads.rocksalt(1, repeats=1))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_trace(ejmp.JMP(demo_config(blocks=1)), graph, tmp_path / "file" / "trace.json")
