"""TRL's parser, with positional forms, strict names and strict YAML.

`TrlParser` reads dataclasses of arguments, from a command line and from the YAML file of `--config`. It has no
positional arguments and ignores what it does not know, so the words of a command line are looked at first: positionals
become the options that they stand for, and a word or a key that means nothing is an error with the nearest name.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from trl import TrlParser


POSITIONALS = {
    "MODEL": "model_name_or_path",
    "DATA": "dataset_name",
    "OUTPUT_DIR": "output_dir",
    "OUTPUT_FILE": "output_file",
}
"""The arguments that may be given without their names, in the order that all commands keep."""

MOST_VALUES = 100_000
"""Values in a config file at most, those that aliases repeat counted each time."""


@dataclass(frozen=True)
class Parsed:
    """
    What a command line says.

    Args:
        arguments (`tuple`):
            An instance of each dataclass, in their order.
        words (`list[str]`):
            The command line once more, with options in the place of positionals and without the launcher's words.
        launcher_words (`list[str]`):
            The command line's words for `accelerate launch`.
        launcher_config (`list[str]`):
            What the config file holds for `accelerate launch`, as words of a command line.
    """

    arguments: tuple[Any, ...]
    words: list[str]
    launcher_words: list[str]
    launcher_config: list[str]


class Parser(TrlParser):
    """
    The parser of a command.

    Args:
        prog (`str`):
            What the command is called in messages.
        arguments (`type` or `tuple[type, ...]`):
            A dataclass, or several.
        positionals (`Sequence[str]`):
            Keys of :data:`POSITIONALS`, in their order.
        description (`str`, *optional*):
            What the help says first.
    """

    def __init__(
        self,
        prog: str,
        arguments: type | tuple[type, ...],
        positionals: Sequence[str] = (),
        description: str | None = None,
    ):
        dataclass_types: Any = arguments if isinstance(arguments, tuple) else (arguments,)
        super().__init__(
            dataclass_types,
            prog=prog,
            description=description,
            # The defaults that matter are in the sentences of the help.
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--config", metavar="FILE.yaml", help="YAML file with any of these arguments.")
        self.positionals = {name: POSITIONALS[name] for name in positionals}
        self.options: Mapping[str, argparse.Action] = self._option_string_actions
        # What may be a text or a bool, TRL's parser takes for a bool alone.
        for name, hint in self._hints().items():
            if {str, bool} <= {*get_args(hint)}:
                self.options[f"--{name}"].type = _text_or_bool
        required = {action.dest for action in self.options.values() if action.required}
        shown = [name if dest in required else f"[{name}]" for name, dest in self.positionals.items()]
        self.short_form = " ".join([prog, *shown])
        self.usage = f"{self.short_form} [--OPTION VALUE ...]"

    def _hints(self) -> dict[str, Any]:
        """The type of each argument, as its dataclass declares it."""
        return {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}

    def error(self, message: str) -> NoReturn:
        """Say in one line what is wrong, and exit with status 2, as argparse does."""
        self.exit(2, f"{self.prog}: {message}\n")

    def parse(self, words: Sequence[str], launcher_options: Mapping[str, argparse.Action] | None = None) -> Parsed:
        """
        Read a command line, and the YAML file that it names.

        Exits with a message if anything is wrong.

        Args:
            words (`Sequence[str]`):
                The command line, without the command's name.
            launcher_options (`Mapping[str, argparse.Action]`, *optional*):
                The options of `accelerate launch`, which are then allowed as well, here and in the YAML file.

        Returns:
            [`Parsed`]: The arguments, and the words of a command line that means the same.
        """
        launcher = launcher_options or {}
        # A name that both have is ours, as it is for `trl`.
        positionals, groups = self._split(words, {**launcher, **self.options})
        if any(name in ("-h", "--help") for name, _ in groups):
            self.print_help()
            self.exit()
        config: dict[str, Any] = {}
        own_words: list[str] = []
        launcher_words: list[str] = []
        given: set[str] = set()
        for name, group in groups:
            if name not in self.options:
                launcher_words += group
                continue
            action = self.options[name]
            # The last one would win, and nobody would miss the others. (Of single values it is meant to: scripts put
            # their defaults first, and what the user adds behind.)
            if action.dest in given and action.nargs == "+":
                self.error(f"{name} is given twice; give all its values at once: {name} A B ...")
            if action.dest in given and action.dest == "config":
                self.error("--config is given twice; put all arguments into one file")
            given.add(action.dest)
            if action.dest == "config":
                value = self._value_of(group)
                config = self._read_config(value, launcher)
                group = ["--config", value]  # the one spelling that TrlParser looks for
            own_words += group
        stand_ins = self._options_of(positionals, given, config)
        # In front, where no list of values takes them in.
        own_words = [*stand_ins.values(), *own_words]
        present = given | config.keys() | stand_ins.keys()
        # argparse would name them by their options, in both spellings.
        if missing := [
            name
            for name, dest in self.positionals.items()
            if self.options[f"--{dest}"].required and dest not in present
        ]:
            self.error(f"{', '.join(missing)} missing; write {self.short_form}, or see {self.prog} --help")
        try:
            # Behind the dataclasses comes a namespace with `config`, which TrlParser has read by then.
            *found, _, launcher_config, _ = self.parse_args_and_config(
                own_words, return_remaining_strings=True, separate_remaining_strings=True
            )
        except (ValueError, TypeError) as error:  # of the dataclasses' own checks
            self.error(str(error))
        return Parsed(tuple(found), own_words, launcher_words, launcher_config)

    def _split(
        self, words: Sequence[str], options: Mapping[str, argparse.Action]
    ) -> tuple[list[str], list[tuple[str, list[str]]]]:
        """The positionals of a command line, and its options with the words of each."""
        positionals: list[str] = []
        groups: list[tuple[str, list[str]]] = []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if word == "--":
                return [*positionals, *rest], groups
            if not _is_option(word):
                positionals.append(word)
                continue
            name, equals, _ = word.partition("=")
            if name not in options:
                self.error(f"unknown argument {name}; {self._nearest(name, options)}")
            group = [word]
            if not equals:
                count = _most_values(options[name], rest)
                group += rest[:count]
                del rest[:count]
            groups.append((name, group))
        return positionals, groups

    def _value_of(self, group: list[str]) -> str:
        if len(group) == 2:
            return group[1]
        if "=" not in group[0]:
            self.error(f"{group[0]} needs a value")
        return group[0].partition("=")[2]

    def _options_of(self, values: list[str], given: set[str], config: dict[str, Any]) -> dict[str, str]:
        """
        What positionals stand for: `--NAME=VALUE` by name.

        One that is too many, or whose value is given by its name already, is an error.
        """
        if len(values) > len(self.positionals):
            self.error(
                f"{values[len(self.positionals)]!r} belongs to no argument; write {self.short_form} --OPTION ..."
            )
        found = {}
        for value, (name, dest) in zip(values, self.positionals.items(), strict=False):
            if dest in given or dest in config:
                where = f"--{dest}" if dest in given else f"{dest} in the config file"
                self.error(f"{name} is given twice: as {value!r}, the word in its place, and by {where}")
            found[dest] = f"--{dest}={value}"  # with `=`, as a value may begin with `-`
        return found

    def _nearest(self, name: str, options: Mapping[str, argparse.Action]) -> str:
        """The fix for an unknown option: what it begins or ends, such as `split`, or else what it looks most like."""
        name = name.lstrip("-").replace("-", "_")
        # Of the spellings with `_` and with `-` the first.
        known = list(dict.fromkeys(action.option_strings[0].lstrip("-") for action in options.values()))
        near = [option for option in known if option.startswith(name)]
        near = near or [option for option in known if option.endswith(f"_{name}")]
        near = near or difflib.get_close_matches(name, known, n=1)
        if not near or len(near) > 4:
            return f"see {self.prog} --help for the arguments there are"
        return f"did you mean {' or '.join(f'--{option}' for option in near)}?"

    def _read_config(self, path: str, launcher: Mapping[str, argparse.Action]) -> dict[str, Any]:
        """
        The YAML file of `--config`, checked.

        TrlParser reads it again. Before it does, the file must be known to fit into memory once it is written out: a
        few lines of aliases of aliases are billions of values. Tags that make Python objects are refused by YAML's
        safe reader.
        """
        import yaml

        try:
            config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            values = _count_values(config, {})
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.error(f"--config {path}: it cannot be read: {error}")
        except RecursionError:
            self.error(f"--config {path}: it is nested too deeply, or holds itself")
        if values > MOST_VALUES:
            self.error(f"--config {path}: its aliases stand for more than {MOST_VALUES} values; write them out")
        if not isinstance(config, dict):
            self.error(f"--config {path}: it must hold a mapping, lines of NAME: VALUE")
        destinations = {action.dest for action in self.options.values()} - {"config", "help"}
        for key in config:
            # `env` holds environment variables, which TrlParser sets.
            if key not in destinations and key != "env" and f"--{key}" not in launcher:
                fix = self._nearest(str(key), {**launcher, **self.options})
                self.error(f"--config {path}: unknown argument {key}; {fix}")
        if not launcher:
            self._check_types(path, config)
        return config

    def _check_types(self, path: str, config: dict[str, Any]) -> None:
        """
        Exit with a message if a value of a config file is not of its argument's type.

        A default is not converted by argparse as a word of the command line is, nor held to the choices, unless it is
        a text. TRL's own dataclasses, which take more types than they declare, do this for themselves.
        """
        hints = self._hints()
        for name, value in config.items():
            if name not in hints:
                continue
            action = self.options[f"--{name}"]
            # None is in no list of choices, and yet may be a default.
            if action.choices is not None and value is not None and value not in action.choices:
                self.error(f"--config {path}: {name}: {value!r} is none of {', '.join(map(str, action.choices))}")
            is_converted = isinstance(value, str) and action.nargs != "+"
            if not is_converted and not _fits(value, hints[name]):
                kind = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
                self.error(f"--config {path}: {name}: {value!r} is not of type {kind}")


def _is_option(word: str) -> bool:
    """Whether argparse takes a word for an option, and not for a value: not `-1`, nor `-` itself."""
    if not word.startswith("-") or word == "-" or " " in word.partition("=")[0]:
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


def _most_values(action: argparse.Action, rest: list[str]) -> int:
    """How many of the words that follow an option are its values."""
    following = next((index for index, word in enumerate(rest) if _is_option(word)), len(rest))
    if action.nargs is None:
        return min(following, 1)
    if isinstance(action.nargs, int):
        return min(following, action.nargs)
    if action.nargs != "?":
        return following
    # A switch, such as `--plain`, may have a value or none; what is no value of it is left for what comes next.
    try:
        if following:
            action.type(rest[0])  # type: ignore[misc, operator]
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return 0
    return min(following, 1)


def _text_or_bool(word: str) -> str | bool:
    return {"true": True, "false": False}.get(word.lower(), word)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as written in a dataclass of arguments."""
    kind = get_origin(hint)
    if kind is Literal:
        return value in get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if kind is list:
        return isinstance(value, list) and all(_fits(one, get_args(hint)[0]) for one in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if hint is float else hint)


def _count_values(value: Any, counts: dict[int, int]) -> int:
    """How many values there are when nothing is shared; `counts` holds those of the lists and dicts by their ids."""
    if not isinstance(value, list | dict):
        return 1
    if id(value) not in counts:
        counts[id(value)] = MOST_VALUES + 1  # if it is met again inside of itself, there is no end
        parts: Iterable[Any] = [*value, *value.values()] if isinstance(value, dict) else value
        counts[id(value)] = 1 + sum(_count_values(part, counts) for part in parts)
    return counts[id(value)]
