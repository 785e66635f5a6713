"""Records: what is written is read back, what is damaged, foreign or of another version is named and skipped."""

import json
import statistics

import pytest
from support.inputs import ROOT
from support.track_cases import MACHINE, record

from ejmp.track.machine import machine_key
from ejmp.track.schema import VERSION, Record, read_lines, records_of

RESULTS = ROOT / "benchmarks" / "results"


def test_round_trip():
    made = record(reference_seconds=(3e-3, 3.3e-3, 3.6e-3), gflop=0.1, product_gflops=200.0, gbytes=0.01)
    again = Record.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made
    assert made.median == 1.1e-3
    assert made.speedup == pytest.approx(3.0)
    assert made.product_share == pytest.approx(0.1 / 1.1e-3 / 200)
    assert made.copy_share is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seconds": ()}, "seconds: expected one or more"),
        ({"seconds": (0.0,)}, "seconds: expected positive numbers, got 0.0"),
        ({"seconds": (float("nan"),)}, "seconds: expected positive"),
        ({"name": ""}, "name: expected a name"),
        ({"machine": "fast"}, "machine: expected dict, got 'fast'"),
        ({"error": "small"}, "error: expected"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        record(**fields)


def test_bad_lines_are_named_and_skipped(tmp_path):
    good = json.dumps(record().to_dict())
    lines = [
        good,
        good[: len(good) // 2],
        '{"benchmark": "someone else\'s"}',
        json.dumps(record().to_dict() | {"schema": 0}),
        json.dumps(record().to_dict() | {"schema": VERSION + 1}),
        json.dumps(record().to_dict() | {"unknown": 1}),
        json.dumps(record().to_dict() | {"seconds": ["slow"]}),
        "[1, 2]",
        "\xff\xfe",
        "",
        good,
    ]
    path = tmp_path / "quick.jsonl"
    path.write_bytes("\n".join(lines).encode("latin-1"))
    reading = read_lines(path)
    assert len(reading.records) == 2
    said = [problem.removeprefix(f"{path}:") for problem in reading.problems]
    assert [problem.partition(":")[0] for problem in said] == [str(n) for n in range(2, 10)]
    words = ["damaged", "foreign", "older", "newer", "foreign", "seconds: expected positive", "foreign", "damaged"]
    assert all(word in problem for word, problem in zip(words, said, strict=True))


def test_old_files_of_pytest_benchmark_are_read():
    for name in ("kernels_cpu", "graph_cpu", "training_cpu", "data_cpu"):
        reading = records_of(RESULTS / f"{name}.json")
        content = json.loads((RESULTS / f"{name}.json").read_text())
        assert not reading.problems
        assert len(reading.records) == len(content["benchmarks"])
        assert {r.suite for r in reading.records} == {name.removesuffix("_cpu")}


def test_values_of_an_old_file():
    path = RESULTS / "kernels_cpu.json"
    (bench,) = [b for b in json.loads(path.read_text())["benchmarks"] if b["name"].endswith("quadruplet-forward]")]
    (found,) = [r for r in records_of(path).records if r.name == bench["name"]]
    info = bench["extra_info"]
    assert found.median == pytest.approx(1e-3 * info["ms"])
    assert found.speedup == pytest.approx(info["reference_ms"] / info["ms"])
    assert found.product_share == pytest.approx(info["share_of_gemm_rate"])
    assert found.copy_share == pytest.approx(info["share_of_copy_rate"])
    assert found.peak_bytes == pytest.approx(info["peak_mib"] * 2**20, abs=1)
    assert found.commit == info["commit"].removesuffix("-dirty")
    assert found.machine["cpu"] == info["cpu"]
    assert found.sizes["edges"] == info["edges"]


def test_records_inside_pytest_benchmarks_json(tmp_path):
    inside = record("atom_sum/backward")
    benches = [{"name": "a", "stats": {"median": 1.0}, "extra_info": {"record": inside.to_dict()}}]
    benches += [{"name": "b", "stats": {}, "extra_info": {}}]
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"benchmarks": benches}))
    reading = records_of(path)
    assert reading.records == (inside,)
    assert len(reading.problems) == 1
    assert "b: " in reading.problems[0]


def test_a_comparison_gives_records_of_head(tmp_path):
    rows = [
        {"name": "machine/product", "head_seconds": [2e-3, 1e-3, 3e-3]},
        {"name": "pair/forward", "head_seconds": [5e-3, 4e-3]},
        {"name": "never/timed", "head_seconds": []},
    ]
    result = {"benchmark": "compare", "rows": rows, "machine": MACHINE, "date": "2026"}
    path = tmp_path / "track.json"
    path.write_text(json.dumps(result | {"head": {"commit": "f" * 40, "dirty": True}}))
    product, pair = records_of(path).records
    assert (pair.name, pair.commit, pair.dirty, pair.suite) == ("pair/forward", "f" * 40, True, "compare")
    assert pair.product_gflops == pytest.approx(2e-9 * 384**3 / statistics.median(product.seconds))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"rows": []}')
    (tmp_path / "b.json").write_text("{")
    for name in ("a.json", "b.json"):
        with pytest.raises(ValueError, match=rf"{name}: expected"):
            records_of(tmp_path / name)


def test_machine_keys():
    """What makes times differ makes keys differ; a name of a person's own, such as the Python version, does not."""
    key = machine_key(MACHINE)
    assert key.startswith("epyc-9r14-1-threads-")
    assert machine_key(MACHINE | {"python": "3.12.0", "triton": "3.7"}) == key
    others = [MACHINE | {"torch": "2.14"}, MACHINE | {"threads": 2}, MACHINE | {"cpu": "Xeon"}]
    gpu = MACHINE | {"device": "cuda", "gpu": "NVIDIA H100", "driver": "1", "mig": False}
    others += [gpu, gpu | {"mig": True}, gpu | {"driver": "2"}]
    assert len({key, *map(machine_key, others)}) == 7
