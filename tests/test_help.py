"""The command line before any work begins: help texts, versions, and configuration files, all without torch."""

import json
import subprocess
import sys

from support.inputs import environment

import ejmp
from ejmp import cli
from ejmp.data.store.conversion import SHARD_SIZE


def parsers(parser, words=()):
    """Yield the words of every verb, and its parser."""
    groups = parser._subparsers._group_actions if parser._subparsers else ()
    if not groups:
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


def test_defaults_written_twice_agree():
    """The parser cannot read these where they are defined, because torch would come with them."""
    assert VERBS["data", "convert"].get_default("shard_size") == SHARD_SIZE
