"""The command line before any work begins: help texts, versions, and configuration files, all without torch."""

import json
import subprocess
import sys
import tomllib

import pytest
from support.inputs import environment

import ejmp
from ejmp import cli
from ejmp.data.store.conversion import SHARD_SIZE
from ejmp.train import main
from ejmp.train.flags import COMMANDS


def parsers(parser, words=()):
    """Yield the words of every verb, and its parser."""
    groups = parser._subparsers._group_actions if parser._subparsers else ()
    if not any(group.required for group in groups):
        yield words, parser
    for action in groups:
        for name, sub in action.choices.items():
            yield from parsers(sub, (*words, name))


VERBS = dict(parsers(cli.make_parser()))


def python(code, *arguments):
    """Run code in a process of its own, and return what it printed."""
    words = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=60, env=environment(COLUMNS="120"), check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_does_not_wait_for_torch():
    code = """if True:
        import contextlib, io, json, sys
        from ejmp import cli
        texts = []
        for words in json.loads(sys.argv[1]):
            with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
                cli.main(words)
            texts.append(text.getvalue())
        print(json.dumps([texts, sorted({"torch", "numpy"} & set(sys.modules))]))
    """
    asked = [["--version"], ["--help"], *([*words, "--help"] for words in VERBS)]
    texts, heavy = json.loads(python(code, json.dumps(asked)))
    assert not heavy
    assert texts[0].strip() == ejmp.__version__
    assert "finetune" in texts[1]
    for words, text in zip(VERBS, texts[2:], strict=True):
        assert text.startswith(f"usage: ejmp {' '.join(words)} ")


def test_training_commands_of_the_wheel():
    """They start as a module, also when deepspeed puts its flag before the command, and the help needs no torch."""
    code = """if True:
        import contextlib, runpy, sys
        for words in (["--help"], ["--local_rank=0", "finetune", "--help"]):
            sys.argv[1:] = words
            with contextlib.suppress(SystemExit):
                runpy.run_module("ejmp.train", run_name="__main__", alter_sys=True)
        print("torch" in sys.modules)
    """
    top, finetune = python(code).split("usage: ")[1:]
    assert all(name in top for name in COMMANDS)
    assert finetune.startswith("python -m ejmp.train finetune ")
    assert "--config FILE" in finetune
    assert finetune.endswith("False\n")


def test_defaults_written_twice_agree():
    """The parser cannot read these where they are defined, because torch would come with them."""
    assert VERBS["data", "convert"].get_default("shard_size") == SHARD_SIZE


def parse(words, *arguments):
    """Return what a verb's parser makes of arguments, as text that tells numbers from their names."""
    options = vars(cli.make_parser().parse_args([*words, *map(str, arguments)]))
    return {name: repr(value) for name, value in options.items() if name not in ("config_file", "run")}


REQUIRED = {
    ("data", "convert"): ("a.xyz", "b", "--format", "ase"),
    ("data", "fetch"): ("qmof", "."),
    ("prune",): ("a", "b", "--keep", "0,1"),
    ("relax",): ("a.xyz", "--model", "m", "-o", "b.xyz"),
    ("md",): ("a.xyz", "--model", "m", "-o", "b.traj"),
    ("predict",): ("a.xyz", "b.xyz", "--model", "m", "-o", "c.extxyz"),
    ("reproduce",): ("table1",),
    ("compare",): ("small", "full", "a.xyz", "-o", "page.png"),
}
"""Arguments that verbs cannot do without; others have at most positional ones, which are given a name each."""


def least(words):
    """Return arguments enough to start a verb."""
    missing = [action for action in VERBS[words]._actions if action.required and not action.option_strings]
    return REQUIRED.get(words, [f"name{i}" for i in range(len(missing))])


@pytest.mark.parametrize("words", [words for words in VERBS if words[0] != "config"], ids=" ".join)
def test_shown_configuration_reads_back(words, tmp_path, capsys):
    file = tmp_path / "made.toml"
    for given in (least(words), ()):
        assert cli.main(["config", "show", *words, *given]) == 0
        file.write_text(capsys.readouterr().out)
        tomllib.loads(file.read_text())
        assert parse(words, *(() if given else least(words)), "--config", file) == parse(words, *least(words))


def test_every_kind_of_value(tmp_path, capsys):
    """Lists, pairs, switches, choices, `none`, numbers and text; the file is written in three languages."""
    flags = (
        *("--track", "tensorboard", "wandb", "--betas", "0.8", "0.9", "--resume", "--ema", "none", "--lr", "3e-4"),
        *("--clip-kind", "norm", "--run", 'a "quoted" földer', "--early-stop", "7", "--data", "a=b"),
    )
    assert cli.main(["config", "show", "finetune", *flags]) == 0
    shown = capsys.readouterr().out
    values = tomllib.loads(shown)
    assert values["betas"] == [0.8, 0.9]
    assert values["resume"] is True
    (tmp_path / "a.toml").write_text(shown)
    (tmp_path / "a.json").write_text(json.dumps({name.replace("-", "_"): value for name, value in values.items()}))
    expected = parse(["finetune"], *flags)
    assert parse(["finetune"], "--config", tmp_path / "a.toml") == expected
    assert parse(["finetune"], "--config", tmp_path / "a.json") == expected
    yaml = pytest.importorskip("yaml")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values, allow_unicode=True))
    assert parse(["finetune"], "--config", tmp_path / "a.yaml") == expected
    assert parse(["finetune"], f"--config={tmp_path / 'a.yml'}".replace("yml", "yaml")) == expected


def test_command_line_wins(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('blocks = 2\nseed = 3\nmodel = "from-file"\nout = "there"\noverwrite = false\n')
    found = cli.make_parser().parse_args(["prune", "--config", str(file)])
    assert (found.blocks, found.seed, str(found.model), str(found.out)) == (2, 3, "from-file", "there")
    found = cli.make_parser().parse_args(["prune", "mine", "--keep", "1", "--seed", "4", "--config", str(file)])
    assert (found.blocks, found.keep, found.seed, str(found.model)) == (None, "1", 4, "mine")
    file.write_text('models = ["a", "b"]\n')
    assert [str(m) for m in cli.make_parser().parse_args(["evaluate", "--config", str(file)]).models] == ["a", "b"]
    found = cli.make_parser().parse_args(["evaluate", "c", "--config", str(file)])
    assert [str(m) for m in found.models] == ["c"]


WRONG = {
    "seconts = 1\n": "seconts: there is no such flag; is it seconds?",
    "x = 1\n": "x: there is no such flag; known are workload, structures, ",
    'seconds = "long"\n': "seconds: expected float, got 'long'",
    "seconds = [1, 2]\n": "seconds: expected one value, got [1, 2]",
    "small = 1\n": "small: expected true or false, got 1",
    "batch = true\n": "batch: expected text or a number, got true",
    "batch = 1.5\n": "batch: expected int, got 1.5",
    "blocks = []\n": "blocks: expected a list of 1 or more, got []",
    'backend = "cuda"\n': "backend: expected one of auto, reference, native, triton, got 'cuda'",
    "[bench]\nbatch = 2\n": "bench: there is no such flag; is it batch?",
    "batch = \n": "Invalid value (at line 1, column 9)",
}


@pytest.mark.parametrize("text", WRONG)
def test_refusals(text, tmp_path, capsys):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--config", str(tmp_path / "a.toml")])
    assert stop.value.code == 2
    assert f"ejmp bench: error: {tmp_path / 'a.toml'}: {WRONG[text]}" in capsys.readouterr().err


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit):
        cli.main([str(argument) for argument in arguments])
    return capsys.readouterr().err


def test_refused_files(tmp_path, capsys, monkeypatch):
    for name, text in (("a.ini", ""), ("a.yaml", "seconds: 1"), ("b.toml", 'blocks = 1\nkeep = "1"'), ("a.json", "[]")):
        (tmp_path / name).write_text(text)
    (tmp_path / "b.json").write_text('{"betas": [1]}')
    assert "expected a name that ends in .toml, .yaml, .yml or .json" in refusal(
        capsys, "bench", "--config", tmp_path / "a.ini"
    )
    assert "No such file" in refusal(capsys, "bench", "--config", tmp_path / "none.toml")
    assert "expected names and values, got list" in refusal(capsys, "bench", "--config", tmp_path / "a.json")
    assert "blocks and keep exclude each other" in refusal(capsys, "prune", "a", "b", "--config", tmp_path / "b.toml")
    assert "betas: expected a list of 2, got [1]" in refusal(capsys, "finetune", "--config", tmp_path / "b.json")
    assert "expected to be written in full" in refusal(capsys, "bench", "--conf", tmp_path / "b.toml")
    assert "expected one argument" in refusal(capsys, "bench", "--config")
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert "pip install pyyaml" in refusal(capsys, "bench", "--config", tmp_path / "a.yaml")


def test_launch_scripts_take_files(tmp_path, monkeypatch):
    (tmp_path / "a.toml").write_text('device = "cpu"\nlr = 0.5\n')
    monkeypatch.setattr(main, "run", lambda name, options: (name, COMMANDS[name].request(options)))
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", str(tmp_path / "a.toml"), "--seed", "5"])
    name, request = main.main("pretrain")
    assert (name, request.device, request.run.config.lr, request.run.config.seed) == ("pretrain", "cpu", 0.5, 5)


def test_unknown_verbs_of_config_show(capsys):
    assert cli.main(["config", "show", "benhc"]) == 2
    assert "benhc: is it 'bench'?" in capsys.readouterr().err
    assert cli.main(["config", "show"]) == 2
    assert "expected one of bench, " in capsys.readouterr().err
