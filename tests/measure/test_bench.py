"""The benchmark itself: workloads, the gate, the memory meter, the table, the command line."""

import json
import sys
import zipfile

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.neighborlist import neighbor_list

import ejmp
from ejmp import cli
from ejmp.measure import bench, memory, report, workloads
from ejmp_kernels import availability


def test_framework_is_mof_5():
    """Zn4O(BDC)3, two formula units in the primitive cell, with the bond lengths of the published structure."""
    (atoms,) = workloads.framework().structures
    assert atoms.get_chemical_formula() == "C48H24O26Zn8"
    for pair, low, high, per_cell in (("ZnO", 1.90, 1.96, 32), ("CC", 1.37, 1.50, 48), ("CH", 0.9, 1.1, 24)):
        elements = {"ZnO": {30, 8}, "CC": {6}, "CH": {6, 1}}[pair]
        i, j, d = neighbor_list("ijd", atoms, 2.0)
        bonds = [x for a, b, x in zip(i, j, d, strict=True) if {atoms.numbers[a], atoms.numbers[b]} == elements]
        bonds = [x for x in bonds if x < high]
        assert len(bonds) == 2 * per_cell
        assert low < min(bonds)


@pytest.mark.parametrize("name", workloads.BUILT_IN)
def test_built_in_workloads_make_graphs(name):
    workload = workloads.BUILT_IN[name]()
    graph = bench.workload_graph(workload)
    assert graph.num_structures == len(workload.structures)
    assert graph.quad_edges.num_edges > 0


def test_slab_has_oc20s_tags():
    (atoms,) = workloads.slab().structures
    assert np.bincount(atoms.get_tags()).tolist() == [27, 9, 2]
    assert set(atoms.symbols[atoms.get_tags() == 2]) == {"C", "O"}


def test_structures_from_file_folder_and_zip(tmp_path):
    water, ethanol = molecule("H2O"), molecule("CH3CH2OH")
    ase.io.write(tmp_path / "b.extxyz", [water, ethanol])
    (tmp_path / "folder").mkdir()
    ase.io.write(tmp_path / "folder" / "a.xyz", ethanol)
    ase.io.write(tmp_path / "folder" / "b.xyz", water)
    ase.io.write(tmp_path / "POSCAR", bulk("Cu"), format="vasp")
    ase.io.write(tmp_path / "a.traj", [ethanol, water])
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("__MACOSX/._b.xyz", "junk")
        archive.write(tmp_path / "folder" / "b.xyz", "deep/b.xyz")
        archive.write(tmp_path / "a.traj", "a.traj")
        archive.write(tmp_path / "POSCAR", "copper/POSCAR")
    sizes = [len(atoms) for atoms in workloads.read_structures(tmp_path / "c.zip", most=9)]
    assert sizes == [9, 3, 1, 3]
    assert workloads.from_files(tmp_path / "b.extxyz", most=2).max_neighbors == [30, 30]
    assert len(workloads.read_structures(tmp_path / "b.extxyz", most=5)) == 2
    assert len(workloads.read_structures(tmp_path / "folder")[0]) == 9
    assert len(workloads.read_structures(tmp_path / "folder", select="b*")[0]) == 3
    workload = workloads.from_files(tmp_path / "c.zip", select="*.xyz")
    assert (workload.name, workload.cutoff) == ("b.xyz", 8.0)
    assert workloads.from_files(tmp_path / "c.zip", select="POSCAR").cutoff == 19.0
    with pytest.raises(ValueError, match="no structure"):
        workloads.read_structures(tmp_path / "folder", select="z*")
    (tmp_path / "folder" / "0.cif").write_text("nonsense")
    with pytest.raises(ValueError, match=r"0\.cif"):
        workloads.read_structures(tmp_path / "folder")
    with pytest.raises(FileNotFoundError):
        workloads.read_structures(tmp_path / "nowhere")


def test_the_gate_stops_a_wrong_model(tiny_config, monkeypatch):
    model = ejmp.JMP(tiny_config)
    errors = bench.check_model(model, ("fp32", "bf16"))
    assert 0 < errors["fp32"] < 1e-5 < errors["bf16"] < 0.1
    monkeypatch.setitem(bench.GATE, "bf16", errors["bf16"] / 2)
    with pytest.raises(RuntimeError, match="3 blocks, bf16"):
        bench.check_model(model, ("bf16",))
    with torch.no_grad():
        model.backbone.int_blocks[0].dense_ca.linear.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"3 blocks: .*error nan"):
        bench.check_model(model, ("fp32",))


def test_the_gate_stops_wrong_blocks(tiny_config):
    full = ejmp.JMP(tiny_config)
    assert bench.check_model(ejmp.prune(full, blocks=2), ("fp32",), full)
    with pytest.raises(RuntimeError, match="block 2 gives something else"):
        bench.check_model(ejmp.prune(full, keep=(0, 2)), ("fp32",), full)


def test_storage_peak_counts_bytes():
    kept = torch.zeros(1000)
    with memory.StoragePeak([kept]) as meter:
        doubled = kept.view(10, 100) * 2
        (doubled + 1).sum()
        del doubled
        kept.clone()
    assert meter.held == 0
    assert meter.peak == 2 * 4000 + 4


def test_comparison_with_the_reference(tmp_path, capsys, monkeypatch):
    from support.inputs import require_native

    require_native()
    ase.io.write(tmp_path / "water.xyz", molecule("H2O"))
    output = tmp_path / "blocks.json"
    arguments = ["bench", "--structures", str(tmp_path / "water.xyz"), "--small", "--blocks", "2", "--seconds", "0"]
    assert (
        cli.main([*arguments, "--precision", "fp32", "--backend", "native", "--compare", "--output", str(output)]) == 0
    )
    (row,) = json.loads(output.read_text())["rows"]
    assert row["speedup"] > 0
    assert row["reference_ms"]["samples"] == row["ms"]["samples"]
    assert min(row["peak_memory_mib"], row["reference_peak_memory_mib"]) > 0
    assert "x of reference" in capsys.readouterr().out
    monkeypatch.setattr(availability, "why_triton_unavailable", lambda _device=None: "Triton is not installed")
    assert cli.main([*arguments, "--backend", "triton"]) == 2
    assert "Triton" in capsys.readouterr().err


def test_blocks_benchmark_end_to_end(tmp_path, capsys):
    ase.io.write(tmp_path / "water.xyz", molecule("H2O"))
    output = tmp_path / "deep" / "blocks.json"
    arguments = ["bench", "--structures", str(tmp_path / "water.xyz"), "--small", "--blocks", "3", "2"]
    assert cli.main([*arguments, "--precision", "fp32", "--seconds", "0", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(output.read_text())
    rows = result["rows"]
    assert [row["parameters"] for row in rows] == [22_190_848, 15_509_760]
    assert rows[0]["ratio"]["structures_per_s"] == 1.0
    assert 1.3 < rows[0]["gmac"] / rows[1]["gmac"] < 1.55
    assert rows[0]["atoms_per_s"] == pytest.approx(3 * rows[0]["structures_per_s"])
    assert rows[0]["gemm_share"] == pytest.approx(
        rows[0]["gflop"] / rows[0]["ms"]["median"] * 1e3 / max(v["median"] for v in result["gemm_gflops"].values())
    )
    assert all(row["peak_memory_mib"] > 0 and row["ms"]["samples"] >= 2 for row in rows)
    assert {"cpu", "torch", "commit", "date", "load_before"} <= set(result["provenance"])
    assert report.table(result) in printed
    assert "multiply-adds" in printed
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_command_line_refuses_bad_input(tmp_path, capsys):
    assert cli.main(["bench", "--structures", str(tmp_path / "none.xyz")]) == 2
    assert "none.xyz" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["bench", "--precision", "fp4"])
    for wrong in (["--batch", "2"], ["--cutoff", "3"], ["--structures", "x", "--workload", "slab"]):
        assert cli.main(["bench", *wrong]) == 2
    ase.io.write(tmp_path / "alone.xyz", ase.Atoms("He"))
    assert cli.main(["bench", "--structures", str(tmp_path / "alone.xyz")]) == 2
    assert "nothing to measure" in capsys.readouterr().err


def test_a_missing_package_is_named_before_measuring(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", "--output", "never.json"]) == 2
    assert "pip install ejmp[bench]" in capsys.readouterr().err
