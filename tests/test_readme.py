"""The pages: their examples run, their commands start, what they name exists, their figures are in the JSON files."""

import ast
import dataclasses
import importlib
import math
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from support.page_tables import TABLES, graph_growth, infos, result

import ejmp
from ejmp import cli
from ejmp.measure import report

ROOT = Path(__file__).parents[1]
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PATHS}
WORDS = {name: " ".join(text.split()) for name, text in PAGES.items()}
"""The pages with every line break and indentation replaced by one space."""
EXAMPLES = {
    f"{name}-{i}": code
    for name, text in PAGES.items()
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
}
PRINTED = {
    "README.md-0": ["(9, 3)"],
    "docs/prediction.md-0": ["(9, 3) ['eV', 'eV']"],
    "docs/training.md-0": ["torch.Size([2, 4]) torch.Size([12, 4, 3])", "27082752 18558464"],
    "docs/data.md-0": ["[8 1 1] (3, 3)"],
}
PUBLIC_JMP = "README.md-1"
"""The example that needs the public JMP code; it can only be parsed here."""


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 140


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small stand-in for the published weights, in their format."""
    made = tmp_path_factory.mktemp("examples")
    sizes = dataclasses.replace(ejmp.jmp_s(blocks=2), emb_size_atom=32, emb_size_edge=32)
    torch.save({"state_dict": ejmp.JMP(sizes).state_dict()}, made / "jmp-l.pt")
    return made


def test_every_example_is_known():
    assert set(EXAMPLES) == {*PRINTED, PUBLIC_JMP}
    assert "jmp" in {node.module.split(".")[0] for node in imports_from(EXAMPLES[PUBLIC_JMP])}


def imports_from(code):
    return [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]


@pytest.mark.parametrize("name", PRINTED)
def test_example_runs(name, folder):
    run = subprocess.run(
        [sys.executable, "-c", EXAMPLES[name]], capture_output=True, text=True, check=False, cwd=folder
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == PRINTED[name]


def code_lines(text):
    """What a page shows as code: indented lines and fenced shell without their comments, and spans in backticks."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from (" ".join(line.split("#")[0].split()) for line in re.findall(r"(?m)^ {4,}(\S.*)$", prose))
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))


def commands():
    """Every command on the pages, as it is started, with all flags it is given anywhere: ("ejmp", "data", "info")."""
    found = {}
    for text in PAGES.values():
        for line in code_lines(text):
            for part in line.split(";"):
                words = shlex.split(part, posix=False)
                for command, rest in started(words):
                    flags = {word.split("=")[0] for word in rest if word.startswith("--")}
                    found.setdefault(command, set()).update(flags - {"--help"})
    return found


def started(words):
    """The commands of ours that a line starts, whatever launcher is before them, each with the words after it."""
    for i, word in enumerate(words):
        after = words[i + 1 :]
        if word == "ejmp" and after and re.fullmatch(r"[a-z]+", after[0]):
            if after[0] == "data" and len(after) > 1:
                yield from ((("ejmp", "data", verb), after[2:]) for verb in after[1].split("|"))
            elif after[0] == "bench" and len(after) > 1 and after[1] in ("compare", "bisect", "history"):
                depth = 3 if after[1] == "history" else 2
                yield ("ejmp", *after[:depth]), after[depth:]
            elif after[0] != "data":
                yield ("ejmp", after[0]), after[1:]
        elif re.fullmatch(r"launch/\w+\.py", word) or (word.endswith(".py") and words[i - 1] == "python"):
            yield ("python", word), after
        elif word == "-m" and words[i - 1] == "python":
            yield ("python", "-m", after[0]), after[1:]
        elif word == "pytest" and after and after[0].startswith("benchmarks/"):
            yield ("pytest", "benchmarks/"), after[1:]  # all suites have the same flags
        elif word == "make" and i == 0 and after and re.fullmatch(r"[a-z][a-z-]*", after[0]):
            yield ("make", after[0]), []


COMMANDS = commands()


def test_all_kinds_of_commands_are_found():
    verbs = {command[1] for command in COMMANDS if command[0] == "ejmp"}
    assert verbs == {
        "bench", "profile", "report", "doctor", "data", "prune", "relevance", "search",
        "pretrain", "distill", "finetune", "evaluate", "relax", "md", "predict", "compare", "config", "export",
        "reproduce", "pareto", "quantize",
    }  # fmt: skip
    assert {command[0] for command in COMMANDS} == {"ejmp", "python", "pytest", "make"}
    assert COMMANDS["ejmp", "bench"] >= {"--structures", "--select", "--compare", "--seconds"}
    assert COMMANDS["python", "launch/distill.py"] >= {"--blocks", "--teacher", "--data"}


def help_of(command, capsys):
    """What a command says of itself: `ejmp` here, for its start alone takes seconds; make, what it would do."""
    if command[0] == "ejmp":
        with pytest.raises(SystemExit) as ended:
            cli.main([*command[1:], "--help"])
        return ended.value.code, capsys.readouterr().out
    tools = {"python": [sys.executable], "pytest": [sys.executable, "-m", "pytest"]}
    words = ["make", "--dry-run", command[1]] if command[0] == "make" else [*tools[command[0]], *command[1:], "--help"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    return run.returncode, run.stdout or run.stderr


@pytest.mark.parametrize("command", COMMANDS, ids="-".join)
def test_command_starts_and_has_its_flags(command, capsys):
    status, text = help_of(command, capsys)
    assert status == 0, text
    missing = {flag for flag in COMMANDS[command] if not re.search(rf"{flag}\b", text)}
    assert not missing, f"{' '.join(command)} has no {missing}"


def test_ejmp_is_a_command():
    run = subprocess.run(
        [Path(sys.executable).with_name("ejmp"), "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == ejmp.__version__


def test_every_named_file_exists():
    for page, text in PAGES.items():
        named = re.findall(r"`((?:benchmarks|launch|csrc|kernels|ejmp|tests|docs|\.github|\.ci)/[\w./]*)`", text)
        linked = [str(Path(page).parent / target) for target in re.findall(r"\]\(([\w./-]+)\)", text)]
        missing = [name for name in named + linked if "NAME" not in name and not (ROOT / name).exists()]
        assert not missing, f"{page} names {missing}"


def test_every_named_object_exists():
    """`ejmp.x.y(...)` on a page is something that can be imported."""
    for page, text in PAGES.items():
        for name in re.findall(r"`(ejmp(?:_kernels)?(?:\.\w+)+)[^/`]*`", text):
            owner, *rest = name.split(".")
            value = importlib.import_module(owner)
            for part in rest:
                owner += f".{part}"
                value = getattr(value, part, None) or importlib.import_module(owner)
            assert value is not None, f"{page} names {name}"


def test_architecture_names_every_file():
    """Each module of ejmp and of the kernels has its line, or a folder inside its room has one."""
    page, missing = PAGES["docs/architecture.md"], []
    for room in ("ejmp", "kernels/ejmp_kernels"):
        for path in sorted((ROOT / room).rglob("*.py")):
            name = path.relative_to(ROOT)
            rows = [f"`{name}`", *(f"`{folder}/`" for folder in name.parents if len(folder.parts) > 2)]
            if path.name != "__init__.py" and not any(row in page for row in rows):
                missing.append(str(name))
    assert not missing, f"docs/architecture.md does not say what these hold: {missing}"


@pytest.mark.parametrize("name", TABLES)
def test_table_is_the_committed_result(name):
    page, make = TABLES[name]
    assert make() in PAGES[page]


def test_every_table_with_figures_is_compared():
    made = {make() for _, make in TABLES.values()}
    for page, text in PAGES.items():
        for found in re.findall(r"(?m)(?:^\|.*\n)+", text):
            if re.search(r"\| *\d[\d.,]* ", found):
                assert found.rstrip("\n") in made, f"{page} has a table that no test compares:\n{found}"


def test_block_counts():
    found = result("blocks_mof_cpu")
    assert [row["blocks"] for row in found["rows"]] == [6, 5, 4, 3, 2] * 2
    assert "dirty" not in found["provenance"]["commit"]
    assert textwrap.indent(report.summary(found), "    ") in PAGES["docs/benchmarks.md"]


def test_training_figures():
    words = WORDS["docs/training.md"]
    found = infos("training_cpu").values()
    (step,) = (info for info in found if "speedup" in info)
    seconds, peak = step["seconds"], step["peak_mib"]
    assert f"takes {seconds['native']:.1f} s native and {seconds['reference']:.1f} s reference" in words
    assert f"{step['speedup']:.2f} times as fast" in words
    assert f"{100 * step['memory_ratio']:.0f}% of the memory ({peak['native']:.0f} of {peak['reference']:.0f}" in words
    floor = f"{step['over_floor']:.2f} times what its {step['products_gflop']:,.0f} GFLOP of matrix products"
    assert floor in words
    for info in found:
        if "energy_error" in info:
            assert f"{info['energy_error']:.0e} and {info['gradient_force_error']:.0e} in {info['precision']}" in words


def test_eight_bit_figures():
    found, words = result("eight_bits_cpu"), WORDS["docs/benchmarks.md"]
    kept, trained = found["kept"], found["trained"]
    assert len({f"{kept[count]:.3f}" for count in ("4", "16", "64")}) == 1
    assert f"are {kept['0']:.3f} times those in fp32, and {kept['4']:.3f} times with the 4, 16 or 64 layers" in words
    assert f"has {trained['plain']:.3f} times its own errors in fp32" in words
    assert f"(400 steps, one seed) {trained['rounded']:.3f} times these" in words


def test_refitted_students_after_distillation():
    rows = result("refit_cpu")["distilled"]["rows"]
    means = [math.exp(np.mean([math.log(r["over_sliced"]) for r in rows if r["blocks"] == b])) for b in (5, 4, 3, 2)]
    first, second, third, last = (f"{mean:.3f}" for mean in means)
    assert f"are {first}, {second}, {third} and {last} times those of sliced ones" in WORDS["docs/training.md"]


def test_distillation_figure():
    (found,) = infos("distill_cpu").values()
    assert f"costs {found['step_over_parts']:.2f} times its parts" in WORDS["docs/training.md"]


def table1():
    """Mean force errors by strategy and blocks, then by dataset."""
    rows = result("study_cpu")["table1"]["rows"]
    return {
        (row["strategy"], row["blocks"]): {name: value["mean"] for name, value in row["values"].items()} for row in rows
    }


def test_the_study_says_what_the_paper_says():
    """Fewer blocks are worse, distillation wins back most of what cutting costs, and the teacher beats nothing."""
    errors = table1()
    for name in ("oc20", "oc22", "ani1x", "transition1x"):
        teacher = errors["teacher", 6][name]
        assert teacher < 0.5 * errors["zero", None][name]
        for strategy in ("br", "br_kd"):
            found = [errors[strategy, blocks][name] for blocks in (5, 4, 3, 2)]
            assert sorted(found) == found
        for blocks in (5, 4):
            cut, taught = errors["br", blocks][name], errors["br_kd", blocks][name]
            assert cut - taught > 0.7 * (cut - teacher)


def test_calculator_figures():
    ratios = {row["case"]: row["ratio"] for row in result("calculator_cpu")["rows"]}
    words = WORDS["docs/prediction.md"]
    assert f"{ratios['demo direct']:.2f} (direct) or {ratios['demo gradient']:.2f} (gradient) times" in words
    assert f"{ratios['jmp-l direct']:.2f} times what JMP-L takes on a slab" in words
    shares = {row["case"]: f"{100 * row['overhead_share']:.0f}%" for row in result("calculator_cpu")["rows"]}
    assert f"{shares['jmp-s direct']} (direct) or {shares['jmp-s gradient']} (gradient) is what two atoms" in words
    assert all(row["ratio"] <= row["limit"] for row in result("calculator_cpu")["rows"])


def test_compiled_kernels():
    found = result("triton_compile")
    kernels, words = found["kernels"], WORDS["docs/backends.md"]
    spilled = max(row["stack"] for row in kernels if row["dtype"] != "float64")
    assert f"{len(kernels)} kernels, by type" in words
    assert f"spills more than {spilled} bytes" in words
    assert "dirty" not in found["provenance"]["commit"]


def test_graph_building_figures():
    words = WORDS["docs/benchmarks.md"]
    ms = {name: found["median"] for name, found in result("blocks_mof_cpu")["graph_ms"].items()}
    assert f"takes {ms['native']:.0f} ms" in words
    assert f"{ms['reference']:.0f} ms ({ms['reference'] / ms['native']:.1f} times as long)" in words
    points = [(math.log(atoms), math.log(ms)) for atoms, ms in graph_growth()]
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
    assert f"grows as atoms^{slope:.2f}" in words


def test_smoothness_figures():
    words, found = WORDS["docs/smoothness.md"], result("limits")["neighbor_boundaries"][0]
    jump, times = found["largest_jump"], found["crossings"]
    assert f"({found['system'].split(';')[0]}), {found['boundary_crossings']} such boundaries" in words
    assert f"{jump['main']:.1e} at a change of main edges ({times['main']} crossings)" in words
    assert f"{jump['atom_edges']:.1e} of atom edges ({times['atom_edges']})" in words
    assert f"{jump['quad_edges']:.1e} of quad edges ({times['quad_edges']})" in words
    assert f"it changed by {found['energy_change_along_path']:.1e}" in words
