"""The profile: its counts against each other and against known sizes, the cards, the command line."""

import contextlib
import dataclasses
import json
import sys

import pytest
import torch
from support.inputs import require_8_bits
from torch.utils.flop_counter import FlopCounterMode

import ejmp
from ejmp import cli
from ejmp.measure import bench, datasheets, profile, profile_report, workloads
from ejmp.measure.flops import count_macs, graph_sizes
from ejmp.model.regions import region

TINY = ejmp.JMPConfig(
    blocks=2,
    num_tasks=1,
    direct_forces=False,
    emb_size_atom=16,
    emb_size_edge=32,
    emb_size_trip_in=8,
    emb_size_trip_out=8,
    emb_size_quad_in=4,
    emb_size_quad_out=4,
    emb_size_pair_in=8,
    emb_size_pair_out=8,
    emb_size_rbf=8,
    emb_size_cbf=4,
    emb_size_sbf=8,
    num_radial=16,
    num_before_skip=1,
    num_after_skip=1,
    num_concat=1,
)


@pytest.fixture
def graph():
    return bench.workload_graph(workloads.rocksalt(2, repeats=1))


def in_run(model, graph):
    """Work that ran, by part, measured by torch's counter."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found = profile.by_part(model, graph, counter.get_total_flops)
    assert sum(found.values()) == counter.get_total_flops()
    return found


@pytest.mark.parametrize("forces", [False, True])
def test_each_module_runs_what_was_counted(graph, forces):
    """On the reference backend, with the places of its padded tables."""
    config = dataclasses.replace(TINY, direct_forces=forces, num_tasks=2)
    model, sizes = ejmp.JMP(config, "reference"), graph_sizes(graph, padded=True)
    counted = {part: 2 * macs for part, macs in profile.analytic(config, sizes).items()}
    assert sum(counted.values()) == 2 * sum(count_macs(config, sizes).values())
    ran = in_run(model, graph)
    assert {part: work for part, work in ran.items() if work} == counted


def test_fused_layers_run_what_was_counted_where_nothing_is_saved(backend, graph):
    """Modules in which the fused ops make the same products; in the others they make fewer."""
    model = ejmp.JMP(TINY, backend)
    counted, ran = profile.analytic(TINY, graph_sizes(graph)), in_run(model, graph)
    for part in ("output block 0", "output block 2", "block 1 atom_updates", "final_mlp", "heads"):
        assert ran[part] == 2 * counted[part] > 0
    for part in counted:
        assert ran.get(part, 0) <= 2.2 * counted[part]
    assert ran.get("other", 0) == 0


def test_the_model_is_as_before(backend, graph):
    model = ejmp.JMP(TINY, backend)
    before = model(graph).energy
    found = profile.profile_model(model, graph, rounds=1)
    assert isinstance(region("block 0"), contextlib.nullcontext)  # nobody observes any more
    assert torch.equal(model(graph).energy, before)
    assert found["backend"] == backend


def test_rows_add_up_to_the_totals(backend, graph):
    found = profile.profile_model(ejmp.JMP(TINY, backend), graph, rounds=2)
    modules, ops, totals = found["modules"], found["ops"], found["totals"]
    for name in ("gmac", "gflop", "run_gflop"):
        assert sum(row[name] for row in modules) == pytest.approx(totals[name], rel=1e-12)
    assert totals["gmac"] == pytest.approx(1e-9 * sum(count_macs(TINY, graph_sizes(graph)).values()), rel=1e-12)
    assert totals["gflop"] == 2 * totals["gmac"]
    assert sum(row["gflop"] for row in ops) == pytest.approx(totals["run_gflop"], rel=1e-12)
    assert sum(row["share"] for row in ops) == pytest.approx(1)
    assert sum(row["share"] for row in modules) == pytest.approx(1)
    assert all(row["ms"] > 0 for row in modules if row["run_gflop"] > 0)
    assert all(row["calls"] > 0 for row in ops if row["gflop"] > 0)
    assert totals["tflops"] == pytest.approx(1e-3 * totals["gflop"] / (1e-3 * totals["ms"]))
    assert totals["gemm_share"] == pytest.approx(totals["tflops"] / totals["gemm_tflops"])
    assert (totals["card"], totals["mfu"]) == ("unknown", None)


def test_numbers_of_the_tiny_model(graph):
    """By hand: heads are 4 C^2 + C multiply-adds per atom; an output block's filter is rbf M per edge."""
    macs = profile.analytic(TINY, graph_sizes(graph))
    C, M, R, N, E = 16, 32, 8, graph.num_atoms, graph.main.num_edges
    assert (N, graph.num_structures) == (16, 2)
    assert macs["heads"] == N * (4 * C * C + C)
    assert macs["output block 1"] == E * R * M + N * (M * C + 2 * (3 + 3) * C * C)
    assert macs["final_mlp"] == N * (3 * C * C + 2 * 2 * C * C)
    assert macs["block 0 edge_updates"] == E * (M * M + 2 * 3 * M * M + (2 * C + M) * M)


def test_a_known_card_has_a_utilisation(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H200")
    found = profile.totals(10**12, 10**12, 0.01, 400e3, device, "bf16")
    assert found["tflops"] == pytest.approx(200)
    assert found["mfu"] == pytest.approx(200 / 989.5)
    assert found["gemm_share"] == pytest.approx(0.5)
    assert found["card"] == "H200 SXM"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Tesla V100-SXM2-32GB")
    found = profile.totals(10**12, 10**12, 0.01, 400e3, device, "bf16")
    assert (found["card"], found["mfu"]) == ("V100 SXM2", None)
    sizes = {"atoms": 1, "edges": 1, "quadruplets": 0}
    line = profile_report.totals_lines({"totals": found, "sizes": sizes, "device": "V", "precision": "bf16"})
    assert "MFU: unknown, the datasheet of V100 SXM2 has no bf16" in line


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("Tesla V100-PCIE-16GB", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_cards(name, bf16):
    card = datasheets.find(name)
    assert bf16 == (card and card.tflops.get("bf16"))
    if card is not None:
        assert card.tflops["fp16"] >= 2 * card.tflops["fp32"]
        assert "datasheet" in card.source


def test_command_line(tmp_path, capsys):
    output = tmp_path / "deep" / "profile.json"
    arguments = ["profile", "--device", "cpu", "--small", "--blocks", "1", "--workload", "rocksalt", "--rounds", "1"]
    assert cli.main([*arguments, "--backend", "reference", "--output", str(output)]) == 0
    printed, result = capsys.readouterr().out, json.loads(output.read_text())
    for word in ("multiply-adds", "block 0 quadruplets", "aten::", "MFU: unknown", "backbone.int_blocks.0"):
        assert word in printed
    assert profile_report.text(result) in printed
    assert {row["module"] for row in result["modules"]} >= {"bases", "angles", "block 0 atom_pairs", "output block 1"}
    assert {"cpu", "torch", "commit", "date"} <= set(result["provenance"])


def test_eight_bits(tmp_path):
    """The products are those of bfloat16, and counted."""
    require_8_bits()
    arguments = ["profile", "--device", "cpu", "--small", "--blocks", "1", "--workload", "rocksalt", "--rounds", "1"]
    done = {}
    for precision in ("bf16", "int8"):
        output = tmp_path / f"{precision}.json"
        assert cli.main([*arguments, "--precision", precision, "--no-fvcore", "--output", str(output)]) == 0
        done[precision] = json.loads(output.read_text())
    assert done["int8"]["totals"]["run_gflop"] == done["bf16"]["totals"]["run_gflop"]
    (products,) = [op for op in done["int8"]["ops"] if op["op"] == "onednn::qlinear_pointwise"]
    assert products["gflop"] > 0.8 * done["int8"]["totals"]["run_gflop"]


def test_a_missing_package_is_named_before_measuring(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fvcore", None)
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    monkeypatch.setattr(profile, "random_model", None)  # nothing is made
    assert cli.main(["profile", "--small", "--workload", "rocksalt"]) == 2
    assert "pip install ejmp[bench]" in capsys.readouterr().err


def test_command_line_refuses_bad_input(capsys):
    assert cli.main(["profile", "--blocks", "0"]) == 2
    assert "--blocks" in capsys.readouterr().err
    assert cli.main(["profile", "--workload", "slab", "--structures", "x"]) == 2
