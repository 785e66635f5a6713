"""A step of `ejmp.Calculator` over the model's own time on the same graph, by turns: what ASE and the graph cost.

Also the share of the model's time that does not depend on what it computes (Python, dispatch, allocation, reading the
weights): the time of the same calls on a molecule of two atoms.

`python benchmarks/bench_calculator.py --output benchmarks/results/calculator_cpu.json`
"""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import torch
from ase import Atoms
from ase.build import molecule

import ejmp
from ejmp.data import demo
from ejmp.measure.timing import Rounds, by_turns, median_ratio, summarise
from ejmp.measure.workloads import slab
from ejmp.predict.quantities import quantities
from ejmp.provenance import provenance
from ejmp.train.demo import demo_config

LIMITS = {"demo": 1.3, "jmp-s": 1.05, "jmp-l": 1.05}
"""Largest ratio that is accepted, by model."""
STEP = 1e-3
"""How far an atom moves between two steps, A."""


def cases(names):
    """Yield name, model and atoms of each case."""
    graph = ejmp.GraphSettings(cutoff=6.0, max_neighbors=20)
    for model, forces in itertools.product(names, ("direct", "gradient")):
        if model == "demo":
            config, atoms = dataclasses.replace(demo_config(), num_tasks=1), molecule("CH3CH2OH")
            atoms.set_tags(2)
        elif model == "jmp-s":
            frame = demo("rmd17")[0]
            config, atoms = dataclasses.replace(ejmp.jmp_s(), num_tasks=1), Atoms(frame.numbers, frame.positions)
            atoms.set_tags(2)
        elif forces == "direct":
            config, atoms = dataclasses.replace(ejmp.jmp_l(), num_tasks=1), slab().structures[0]
            graph = ejmp.GraphSettings()
        else:
            continue  # a step of it takes a minute on two cores, and the calculator's share is smaller still
        torch.manual_seed(0)
        task = ejmp.Task(name=model, forces=forces, graph=graph)
        yield f"{model} {forces}", ejmp.JMP(config, tasks=[task]), atoms


def measure(model, atoms, rounds):
    """Check that both give the same forces, then time both; the model runs on the graph of the calculator's step."""
    calculator = ejmp.Calculator(model)
    atoms.calc = calculator
    task = calculator.task
    sign = itertools.cycle((1, -1))

    def step():
        atoms.positions[0, 0] += STEP * next(sign)
        return atoms.get_forces(), atoms.get_potential_energy()

    def alone():
        return quantities(calculator.model, graph, task, forces=calculator.forces)

    two = ejmp.build_graph([ejmp.Structure(numbers=[1, 1], positions=[[0, 0, 0], [0.74, 0, 0]])], settings=task.graph)

    def idle():
        return quantities(calculator.model, two, task, forces=calculator.forces)

    forces = atoms.get_forces()
    graph = calculator.graph(atoms)
    assert torch.equal(alone().forces, torch.from_numpy(forces))
    times = by_turns({"calculator": step, "model": alone, "two atoms": idle}, graph.device, rounds)
    return {
        "atoms": graph.num_atoms,
        "edges": graph.main.num_edges,
        "ms": {name: summarise([1e3 * seconds for seconds in values]) for name, values in times.items()},
        "ratio": median_ratio(times["calculator"], times["model"]),
        "overhead_share": median_ratio(times["two atoms"], times["model"]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(LIMITS), choices=LIMITS)
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each case (default: 20)")
    parser.add_argument("--output", type=Path, metavar="JSON")
    options = parser.parse_args()
    result = {"benchmark": "calculator", "provenance": provenance(torch.device("cpu")), "rows": []}
    for name, model, atoms in cases(options.models):
        row = measure(model, atoms, Rounds(least=3, most=200, seconds=options.seconds))
        row |= {"case": name, "limit": LIMITS[name.split()[0]]}
        result["rows"].append(row)
        print(
            f"{name}: {row['atoms']} atoms, {row['edges']} edges, ratio {row['ratio']:.3f} (limit {row['limit']}), "
            f"overhead {100 * row['overhead_share']:.0f}%"
        )
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
