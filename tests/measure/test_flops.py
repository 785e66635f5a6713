"""The analytic FLOP count against two independent counters, and the sizes it is made from."""

import dataclasses

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch.utils.flop_counter import FlopCounterMode

import ejmp
from ejmp.measure import workloads
from ejmp.measure.bench import workload_graph
from ejmp.measure.flops import count_macs, graph_sizes
from ejmp.measure.profile import ByNumbers


@pytest.mark.parametrize("workload", [workloads.slab, workloads.molecules])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blocks": 1, "direct_forces": False, "num_tasks": 1},
        {"num_concat": 0},
        {"blocks": 1, "head": "linear", "forces_coupled": True},
    ],
)
@torch.no_grad()
def test_count_equals_both_counters(tiny_config, workload, options):
    """On the reference backend, which computes every place of its padded tables."""
    config = dataclasses.replace(tiny_config, **options)
    model, graph = ejmp.JMP(config, "reference"), workload_graph(workload())
    macs = sum(count_macs(config, graph_sizes(graph, padded=True)).values())
    with FlopCounterMode(display=False) as counter:
        model(graph)
    assert 2 * macs == counter.get_total_flops()
    analysis = FlopCountAnalysis(ByNumbers(model, graph), (graph.atomic_numbers,))
    analysis.unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False)
    assert macs == analysis.total()


def test_padding_is_not_work():
    graph = workload_graph(workloads.slab())
    real, padded = graph_sizes(graph), graph_sizes(graph, padded=True)
    assert real.quadruplets < padded.quadruplets
    assert (real.edges, real.pairs) == (padded.edges, padded.pairs)
    config = ejmp.jmp_l(scalar=True)
    parts = [count_macs(config, sizes) for sizes in (real, padded)]
    assert all(parts[0][name] <= parts[1][name] for name in parts[0])


def test_work_is_proportional_to_blocks():
    """The published 6:5:4:3:2, and dense layers on edges are almost everything."""
    sizes = graph_sizes(workload_graph(workloads.framework()))
    work = [sum(count_macs(ejmp.jmp_l(blocks=b, scalar=True), sizes).values()) for b in (6, 5, 4, 3, 2)]
    assert [w / work[0] * 6 for w in work] == pytest.approx([6, 5, 4, 3, 2], rel=0.02)
    assert work[0] / sizes.edges == pytest.approx(281e6 / 2, rel=0.1)
