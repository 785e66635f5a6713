"""The page of a made-up study: well formed, complete, self-contained, and safe from the names in it."""

import copy
import json
import re
import sys

import pytest
from support.pages import Page

from ejmp.study.figures import STRATEGIES
from ejmp.study.page import write_study_page
from ejmp.train.markup import COLORS, PAGE, number

pytest.importorskip("matplotlib")
MACHINE = {"cpu": "EPYC 9R14", "cores": 2}


def errors(mean, spread=None, seeds=()):
    return {"mean": mean, "spread": spread, "seeds": list(seeds)}


STUDY = {
    "command": "ejmp reproduce all --seeds 3",
    "seeds": 3,
    "commit": "abc1234",
    "machine": MACHINE,
    "demo": True,
    "table1": {
        "columns": ["oc20", "ani1x"],
        "unit": "meV/A",
        "rows": [
            {
                "strategy": "teacher", "blocks": 6, "published": {"oc20": 17.0, "ani1x": 22.5},
                "values": {"oc20": errors(250.0), "ani1x": errors(80.25)},
            },
            {
                "strategy": "br", "blocks": 4, "published": {"oc20": 65.3, "ani1x": 443.4},
                "values": {"oc20": errors(512.34, 3.21, [509.13, 515.55]), "ani1x": errors(160.5, 0.44)},
            },
            {
                "strategy": "zero", "blocks": None, "published": None,
                "values": {"oc20": errors(1023.6), "ani1x": {"mean": None, "spread": None, "seeds": []}},
            },
        ],
    },
    "table2": {
        "dataset": "qmof",
        "batch": 4,
        "rows": [
            {
                "blocks": 6, "structures_per_s": 61.234, "gmacs": 2.6123, "gflops": 5.2246, "parameters": 812345,
                "published": {"throughput": 19.1, "gflops": 1.74, "parameters": 160.9e6},
            },
            {
                "blocks": 3, "structures_per_s": 122.468, "gmacs": 1.30615, "gflops": 2.6123, "parameters": 406172,
                "published": {"throughput": 30.8, "gflops": 0.87, "parameters": 81.9e6},
            },
        ],
    },
    "fig2": {"labels": ["embedding", "block 0"], "energy": [41.25, 58.75], "forces": [33.5, 66.5]},
    "fig3": {
        "tasks": [
            {
                "dataset": "rmd17", "label": "rMD17 aspirin", "unit": "meV/A",
                "rows": [
                    {"strategy": name, "blocks": 6 if name == "teacher" else 4, "mean": 40.5 + i, "spread": 1.25,
                     "seeds": [39.1 + i, 41.9 + i]}
                    for i, name in enumerate(STRATEGIES)
                ],
            },
            {
                "dataset": "qmof", "label": "QMOF gap", "unit": "eV",
                "rows": [{"strategy": "br", "blocks": b, "mean": 0.7 / b, "spread": None, "seeds": []} for b in (2, 3)],
            },
        ]
    },
    "fig4": {
        "tasks": [
            {
                "dataset": "qm9", "label": "QM9 U0", "unit": "meV",
                "curves": [{"blocks": b, "seconds": [0.0, 10.5, 321.7], "error": [900.5, None, 33.25]} for b in (6, 4)],
            }
        ]
    },
    "runs": [
        {
            "name": "br-4-seed0", "kind": "distill", "seconds": 73.42, "steps": 1234, "command": "run --blocks 4",
            "config": {"lr": 0.0003}, "commit": "abc1234", "machine": MACHINE,
        }
    ],
}  # fmt: skip


def write(folder, study):
    (folder / "study.json").write_text(json.dumps(study))
    path = write_study_page(folder)
    assert path == folder / "index.html"
    assert path.stat().st_size < 1e6
    page = Page(path.read_text(encoding="utf-8"))
    page.check()
    return page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write(tmp_path_factory.mktemp("study"), STUDY)


def leaves(value):
    """Every number of a value of JSON but spreads, which are rounded as their means are."""
    if isinstance(value, dict):
        value = [below for name, below in value.items() if name not in {"machine", "config", "spread"}]
    if isinstance(value, list):
        return [number for below in value for number in leaves(below)]
    return [value] if isinstance(value, int | float) else []


def shows(word, value):
    """Whether a word is a value, or the value rounded to three significant digits or more."""
    digits = len(word.replace(".", "").lstrip("0"))
    return float(word) == value or (digits >= 3 and word == f"{value:.{len(word.partition('.')[2])}f}")


@pytest.mark.parametrize("part", ["table1", "table2", "fig2", "fig3", "fig4", "runs"])
def test_every_number_can_be_read(page, part):
    words = {word for cell in page.cells for word in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", cell)}
    values = leaves(STUDY[part])
    assert values
    for value in values:
        assert any(shows(word, value / scale) for word in words for scale in (1, 1e3, 1e6)), value


@pytest.mark.parametrize(
    "cell",
    [
        "512.3 ± 3.2\nx 2.05", "160.5 ± 0.4\nx 2.00", "65.3\nx 3.84", "443.4\nx 19.71", "1024\nx 4.09",
        "BR (sliced)\n4 blocks", "509.1, 515.5", "122.5\nx 2.00", "30.8\nx 1.61", "1.306\nx 0.50", "2.612\nx 0.50",
        "0.870\nx 0.50", "406.2 k\nx 0.50", "81.9 M\nx 0.51", "58.8", "66.5", "40.50 ± 1.25",
        "321.7", "33.25", "73.42", "1234", "cpu EPYC 9R14, cores 2",
    ],
)  # fmt: skip
def test_cells(page, cell):
    """Ratios by hand: 512.34 / 250 = 2.049, 65.3 / 17 = 3.841, 443.4 / 22.5 = 19.707, 30.8 / 19.1 = 1.613, ..."""
    assert cell in page.cells


def test_what_is_said(page):
    assert all(name in page.text for name in STRATEGIES.values())
    assert "ejmp reproduce all --seeds 3" in page.text
    assert "do not compare in meV/A" in page.text
    assert '"lr": 0.0003' in page.text
    links = {found["href"] for found in page.named("a")}
    assert links == {"study.json", "study.csv"}
    alts = [found["aria-label"] for found in page.named("svg")]
    assert len(alts) == 6
    assert "ours, BR (sliced): 4 blocks 2.05, 6 blocks 1.00; published, BR (sliced): 4 blocks 3.84, 6" in alts[0]
    assert "ours, BR (sliced): 4 blocks 2.00, 6 blocks 1.00; published, BR (sliced): 4 blocks 19.71, 6" in alts[1]
    assert "block 0 58.8" in alts[2]
    assert "QM9 U0, error in meV" in alts[5]
    assert "from 900.5 to 33.25 in 321.7 s" in alts[5]
    assert "interaction blocks" in page.texts  # text of a drawing stays text
    assert page.text.count("predicting zero: 40.50 meV/A") == 1


@pytest.mark.parametrize("part", ["table1", "table2", "fig2", "fig3", "fig4", "runs"])
def test_absent_parts_are_left_out(tmp_path, part):
    headings = {"table1": "Table 1", "table2": "Table 2", "fig2": "Figure 2", "fig3": "Figure 3", "fig4": "Figure 4"}
    headings["runs"] = "How each number was made"
    found = write(tmp_path, {name: value for name, value in STUDY.items() if name != part})
    assert {name for name, title in headings.items() if title in found.text} == headings.keys() - {part}


def test_nothing_but_a_table(tmp_path):
    """Without teacher, published values or spreads there are no ratios, and real data is not called a demo."""
    rows = [{"strategy": "br", "blocks": 3, "values": {"oc20": errors(5.0)}, "published": None}]
    part = {"columns": ["oc20"], "unit": "meV/A", "rows": rows}
    (tmp_path / "study.json").write_text(json.dumps({"demo": False, "table1": part}))
    found = Page(write_study_page(tmp_path).read_text(encoding="utf-8"))
    assert "5.000" in found.cells
    assert not [cell for cell in found.cells if "\nx " in cell]
    assert "demo" not in found.text


HOSTILE = """<script>alert("1")</script>&amp;'"$\\frac$ id="x" url(#y)"""


def hostile(value):
    """A value of JSON whose free texts are hostile; strategies and names of datasets are among them."""
    if isinstance(value, dict):
        return {name: hostile(below) for name, below in value.items()}
    if isinstance(value, list):
        return [hostile(below) for below in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_texts(tmp_path):
    study = hostile(copy.deepcopy(STUDY))
    for row in study["table1"]["rows"]:
        row["values"] = {HOSTILE: errors(1.0)}
        row["published"] = None
    study["table1"]["columns"] = [HOSTILE]
    found = write(tmp_path, study)
    assert found.text.count(HOSTILE) > 20
    assert all(HOSTILE in alt for alt in [found.named("svg")[i]["aria-label"] for i in (0, 1, 3)])
    assert any(HOSTILE in text and text.startswith("error, ") for text in found.texts)  # a label inside a drawing


@pytest.mark.parametrize("name", ["table1", "table2", "fig3", "fig4"])
def test_what_is_not_measured_yet(tmp_path, name):
    """Of a study that is under way, a part can be there without a row or a task; rows can lack values."""
    study = copy.deepcopy(STUDY)
    part = study[name]
    for key in part.keys() & {"rows", "tasks"}:
        part[key] = []
    found = write(tmp_path, study)
    assert {"table1": "Table 1", "table2": "Table 2", "fig3": "Figure 3", "fig4": "Figure 4"}[name] not in found.text
    assert "How each number was made" in found.text
    study = copy.deepcopy(STUDY)
    for row in study["table1"]["rows"]:
        row["values"] = {}
    for row in study["table2"]["rows"]:
        row.update(gmacs=None, published=None)
    for row in study["fig3"]["tasks"][0]["rows"]:
        row["mean"] = None
    assert "65.3\nx 3.84" in write(tmp_path, study).cells


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "study.json").write_text(json.dumps(STUDY))
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib.*pip install ejmp\[bench\] brings it"):
        write_study_page(tmp_path)


def test_missing_study(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_study_page(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.000"), (None, "-"), (float("nan"), "-"), (1234.56, "1235"), (0.012345, "0.01235"), (99999, "99999"),
        (-3.14159, "-3.142"), (1.5e12, "1.500e+12"), (3e-9, "3.000e-09"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


def luminance(color):
    """Relative luminance of #rrggbb or #rgb by WCAG 2."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast():
    """Lines and bars have a contrast of 3 with both papers, text one of 4.5 (WCAG 2)."""
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", part)) for part in re.split(r"@media \(prefers", PAGE)[:2])
    for scheme in (light, dark):
        paper = luminance(scheme["paper"])
        for least, colors in ((3, COLORS), (4.5, [scheme[name] for name in ("ink", "faint", "link")])):
            for color in colors:
                high, low = sorted([luminance(color), paper], reverse=True)
                assert (high + 0.05) / (low + 0.05) >= least, (color, scheme)
