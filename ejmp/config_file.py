"""Flags from a file: `--config FILE` reads what could be written on the command line, `ejmp config show` prints it."""

import argparse
import difflib
import importlib
import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from reprlib import Repr
from typing import Any

from ejmp.limits import RefusedFileError, read_whole

_BRIEF = Repr()
_BRIEF.maxlevel = 2  # lists in YAML can hold each other, and be endless when they are written out
_FLAG, _DEST = "--config", "config_file"
_HELP = "flags by their names without dashes, in a .toml, .yaml or .json file; what is given here as well wins"


class Parser(argparse.ArgumentParser):
    """A parser of which every command takes `--config FILE`, once `take_config` is called.

    The file names flags without their leading dashes, with dashes or underscores within, and positional arguments as
    the usage text does. Values are checked as they are on the command line, whose own values win; of flags that exclude
    each other the file's gives way to the command line's.
    """

    def take_config(self) -> None:
        """Add `--config` to the commands below this parser, or to this one if there are none."""
        for command in self.commands().values():
            command.add_argument(_FLAG, dest=_DEST, type=Path, metavar="FILE", help=_HELP)

    def commands(self) -> dict[tuple[str, ...], "Parser"]:
        """Return the parser of each command by its words; this parser, by no words, if it is one without commands."""
        groups = self._groups()
        below = [
            ((name, *words), parser)
            for group in groups
            for name, command in group.choices.items()
            for words, parser in command.commands().items()
        ]
        return dict(below) if any(group.required for group in groups) else {(): self, **dict(below)}

    def _groups(self) -> list[Any]:
        return [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]  # noqa: SLF001

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse arguments as argparse does, with what a `--config` among them says as the defaults."""
        if not any(action.dest == _DEST for action in self._actions):
            return super().parse_known_args(args, namespace)
        args = sys.argv[1:] if args is None else args
        if args and any(args[0] in group.choices for group in self._groups()):  # a command below, which has its own
            return super().parse_known_args(args, namespace)
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        finder.add_argument(_FLAG, dest=_DEST, type=Path)
        try:
            found = getattr(finder.parse_known_args(args)[0], _DEST)
        except argparse.ArgumentError:
            found = None  # no name follows, which the parser itself says below
        if found is not None:
            try:
                self._take(read(found), args)
            except (ValueError, OSError, ModuleNotFoundError) as error:
                self.error(f"{found}: {error}")
        parsed, rest = super().parse_known_args(args, namespace)
        if getattr(parsed, _DEST) != found:
            self.error(f"{_FLAG}: expected to be written in full, got a part of it")
        return parsed, rest

    def _named(self) -> dict[str, argparse.Action]:
        """Return what a file may name: the flags and positional arguments, by name."""
        return {
            _name(action): action
            for action in self._actions
            if action.help != argparse.SUPPRESS and action.dest not in ("help", _DEST) and action not in self._groups()
        }

    def _take(self, values: dict[str, Any], args: Sequence[str]) -> None:
        """Make values of a file the defaults."""
        named = self._named()
        taken: dict[argparse.Action, Any] = {}
        for key, value in values.items():
            name = key.replace("_", "-")
            if name not in named:
                near = difflib.get_close_matches(name, named, 1, cutoff=0.5)
                guess = f"is it {near[0]}?" if near else f"known are {', '.join(named)}"
                raise ValueError(f"{key}: there is no such flag; {guess}")
            checked = _checked(name, named[name], value)
            if value is not False:  # a switch that stays off excludes nothing
                taken[named[name]] = checked
        written = [word.partition("=")[0] for word in args if word.startswith("--") and word != "--"]
        for group in self._mutually_exclusive_groups:
            members = group._group_actions  # noqa: SLF001
            known = [action for action in members if action in taken]
            if len(known) > 1:
                raise ValueError(f"{' and '.join(map(_name, known))} exclude each other")
            options = [option for action in members for option in action.option_strings]
            if any(option.startswith(word) for option in options for word in written):
                taken = {action: value for action, value in taken.items() if action not in members}
            elif known:
                group.required = False
        for action, value in taken.items():
            _relax(action)
            action.default = value

    def show(self, words: Sequence[str]) -> str:
        """Return the effective configuration of a command as TOML that `--config` reads back.

        What has no default, or one that depends on the data, is a comment.

        Args:
            words: the command, such as "data", "convert", and flags, none of which is required.

        Raises:
            ValueError: if there is no such command.
        """
        commands = self.commands()
        command = max((verb for verb in commands if tuple(words[: len(verb)]) == verb), key=len, default=None)
        if command is None:
            near = difflib.get_close_matches(" ".join(words[:2]), [" ".join(verb) for verb in commands], 1)
            known = f"is it {near[0]!r}?" if near else f"expected one of {', '.join(' '.join(v) for v in commands)}"
            raise ValueError(f"{' '.join(words) or 'no command'}: {known}")
        return commands[command]._effective(words[len(command) :])  # noqa: SLF001

    def _effective(self, args: Sequence[str]) -> str:
        for group in self._mutually_exclusive_groups:
            group.required = False
        required = {action for action in self._actions if action.required}
        for action in self._actions:
            _relax(action)
        given = vars(self.parse_args(args))
        lines = []
        for name, action in self._named().items():
            known = action.dest in given and (given[action.dest] is not None or action.default == argparse.SUPPRESS)
            value = given.get(action.dest)
            if known and value not in ((), []):
                lines.append(f"{name} = {_toml(value)}")
            else:
                lines.append(f"# {name}: {action.help or 'no default'}{' (required)' * (action in required)}")
        return "\n".join(lines) + "\n"


def read(path: Path) -> dict[str, Any]:
    """Return what a configuration file says, by name.

    Raises:
        ValueError: if its name does not end in .toml, .yaml, .yml or .json, it does not hold names and values, or it
            is not a regular file, or a larger one than `ejmp.limits` allows.
        OSError: if it cannot be read.
        ModuleNotFoundError: if it is YAML and pyyaml is not installed.
    """
    try:
        values = _parsed(path)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected names and values, got {type(values).__name__}")  # noqa: TRY004 - of a file, not of an argument
    return {str(name): value for name, value in values.items()}


def _parsed(path: Path) -> Any:
    kind = path.suffix.lower()
    if kind == ".toml":
        return tomllib.loads(_text(path))
    if kind == ".json":
        return json.loads(_text(path))
    if kind not in (".yaml", ".yml"):
        raise ValueError(f"expected a name that ends in .toml, .yaml, .yml or .json, got {path.name}")
    try:
        yaml = importlib.import_module("yaml")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("YAML needs pyyaml: pip install pyyaml, or write TOML", name="yaml") from error
    try:
        return yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _text(path: Path) -> str:
    try:
        return read_whole(path, "config_bytes").decode()
    except RefusedFileError as error:
        raise ValueError(error.problem) from error  # whoever asked for the file names it


def _name(action: argparse.Action) -> str:
    """Return the name of a flag or positional argument in a file."""
    longest = max(action.option_strings, key=len, default=action.dest)
    return longest.lstrip("-").replace("_", "-")


def _relax(action: argparse.Action) -> None:
    """Let an argument be left out."""
    if not action.option_strings:
        action.nargs = {None: "?", "+": "*"}.get(action.nargs, action.nargs)  # pyright: ignore[reportArgumentType, reportCallIssue]
    action.required = False


def _checked(name: str, action: argparse.Action, value: Any) -> Any:
    """Return a value of a file as the command line would have given it.

    Raises:
        ValueError: if the command line would have refused it.
    """
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false, got {_BRIEF.repr(value)}")
        return action.const if value else action.default
    many = action.nargs not in (None, "?")
    items = value if isinstance(value, list) else [value]
    if isinstance(value, list) != many and (not many or isinstance(action.nargs, int)):
        raise ValueError(f"{name}: expected {'a list' if many else 'one value'}, got {_BRIEF.repr(value)}")
    if (action.nargs == "+" and not items) or (isinstance(action.nargs, int) and len(items) != action.nargs):
        raise ValueError(
            f"{name}: expected a list of {action.nargs if items else '1 or more'}, got {_BRIEF.repr(value)}"
        )
    found = [_converted(name, action, item) for item in items]
    return found if many else found[0]


def _converted(name: str, action: argparse.Action, item: Any) -> Any:
    if isinstance(item, bool | dict | list) or item is None:
        raise ValueError(f"{name}: expected text or a number, got {_json(item)}")
    kind: Any = action.type or str
    try:
        value = kind(str(item))
    except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
        expected = action.metavar if isinstance(action.metavar, str) else getattr(kind, "__name__", "another")
        raise ValueError(f"{name}: expected {expected}, got {item!r}") from error
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, action.choices))}, got {item!r}")
    return value


def _json(item: Any) -> str:
    return json.dumps(item) if isinstance(item, bool) or item is None else _BRIEF.repr(item)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps("none" if value is None else str(value), ensure_ascii=False)
