"""How a command line and a YAML file become arguments: positionals, names, types, and what is said of mistakes."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from disco_trl.cli.parser import POSITIONALS, Parser


@dataclass(kw_only=True)
class Arguments:
    """Every type that the commands' arguments have."""

    model_name_or_path: str
    dataset_name: str | None = None
    output_file: str
    count: int = 1
    share: float | None = None
    plain: bool = False
    shared: bool = True
    seeds: list[int] = field(default_factory=lambda: [0])
    words: list[str] = field(default_factory=list)
    device: Literal["cpu", "cuda"] | None = None
    counted: str | bool = "no"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"--count {self.count} must be at least 1")


@pytest.fixture
def parser() -> Parser:
    return Parser("disco-trl test", Arguments, ("MODEL", "DATA", "OUTPUT_FILE"))


@pytest.fixture
def refused(parser, capsys):
    """`refused(words)` is the one line that is said of them."""

    def refuse(*words: str) -> str:
        with pytest.raises(SystemExit) as exit_info:
            parser.parse(words)
        assert exit_info.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("disco-trl test: ") and said.count("\n") == 1
        return said

    return refuse


def write(path: Path, values: object) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


# Positionals


@pytest.mark.parametrize(
    "words",
    [
        ["m", "d", "o", "--count", "3", "--plain", "--seeds", "1", "2"],
        ["--plain", "m", "--count=3", "d", "--seeds", "1", "2", "--", "o"],
        ["--seeds", "1", "2", "--plain", "True", "m", "d", "--count", "3", "o"],
        ["m", "d", "--output_file", "o", "--count", "3", "--plain", "--seeds", "1", "2"],
        ["m", "d", "--output-file=o", "--count", "3", "--plain", "yes", "--seeds", "1", "2"],
    ],
)
def test_positionals_may_stand_anywhere(parser, words):
    parsed = parser.parse(words)
    [args] = parsed.arguments
    assert args == Arguments(
        model_name_or_path="m", dataset_name="d", output_file="o", count=3, plain=True, seeds=[1, 2]
    )
    # The words without positionals mean the same.
    assert Parser("disco-trl test", Arguments).parse(parsed.words).arguments == (args,)


def test_a_number_below_zero_and_a_dash_are_values(parser):
    [args] = parser.parse(["-", "-1", "o", "--share", "-0.5", "--words", "a b", "-"]).arguments
    assert (args.model_name_or_path, args.dataset_name, args.share, args.words) == ("-", "-1", -0.5, ["a b", "-"])


@pytest.mark.parametrize(("word", "value"), [("True", True), ("false", False), ("all", "all")])
def test_a_text_or_a_bool(parser, word, value):
    parsed = parser.parse(["model", "data", "out", "--counted", word])
    assert parsed.arguments[0].counted == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "d", "o", "x"], "'x' belongs to no argument; write disco-trl test MODEL [DATA] OUTPUT_FILE"),
        (["m", "d", "--model_name_or_path", "n"], "MODEL is given twice: as 'm', .* and by --model_name_or_path"),
        (["--model_name_or_path", "n", "d"], "MODEL is given twice: as 'd'"),
        (["m"], "OUTPUT_FILE missing; write disco-trl test MODEL [DATA] OUTPUT_FILE, or see disco-trl test --help"),
        ([], "MODEL, OUTPUT_FILE missing"),
        (["m", "d", "o", "--seeds", "1", "--seeds", "2"], "--seeds is given twice; give all its values at once"),
        # Names
        (["m", "d", "o", "--cuont", "2"], "unknown argument --cuont; did you mean --count?"),
        (["m", "d", "o", "--model", "x"], "unknown argument --model; did you mean --model_name_or_path?"),
        (["m", "d", "o", "--file", "x"], "unknown argument --file; did you mean --output_file?"),
        (["m", "d", "o", "--s", "x"], "unknown argument --s; did you mean --share or --shared or --seeds?"),
        (["m", "d", "o", "--quite-another=1"], "unknown argument --quite-another; see disco-trl test --help"),
        (["m", "d", "o", "-v"], "unknown argument -v; see"),
        # Values
        (["m", "d", "o", "--count", "two"], "argument --count: invalid int value: 'two'"),
        (["m", "d", "o", "--count"], "argument --count: expected one argument"),
        (["m", "d", "o", "--device", "tpu"], "argument --device: invalid choice: 'tpu' (choose from 'cpu', 'cuda')"),
        (["m", "d", "o", "--count", "0"], "--count 0 must be at least 1"),
        (["m", "d", "o", "--config"], "--config needs a value"),
        (["m", "d", "o", "--config", "no.yaml"], "--config no.yaml: it cannot be read"),
    ],
)
def test_mistakes_on_the_command_line(refused, words, message):
    said = refused(*words)
    for part in message.split(" .* "):
        assert part in said


# YAML


def test_a_config_file_holds_any_argument_and_the_command_line_wins(parser, tmp_path):
    config = write(
        tmp_path / "test.yaml",
        {"count": 3, "seeds": [1, 2], "shared": False, "share": 1, "device": "cpu", "output_file": "o", "words": []},
    )
    for words in (["--config", config], [f"--config={config}"]):
        [args] = parser.parse(["m", *words, "--count", "4"]).arguments
        expected = {"count": 4, "seeds": [1, 2], "shared": False, "share": 1, "device": "cpu"}
        assert args == Arguments(model_name_or_path="m", output_file="o", **expected)


def test_one_config_file_is_enough(refused, tmp_path):
    words = ["--config", write(tmp_path / "a.yaml", {}), "--config", write(tmp_path / "b.yaml", {})]
    assert "--config is given twice; put all arguments into one file" in refused("m", "d", "o", *words)


def test_a_config_file_may_set_the_environment(parser, tmp_path, monkeypatch):
    monkeypatch.setenv("DISCO_TEST", "before")
    parser.parse(["m", "d", "o", "--config", write(tmp_path / "test.yaml", {"env": {"DISCO_TEST": 1}})])
    assert os.environ["DISCO_TEST"] == "1"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cuont": 2}, "unknown argument cuont; did you mean --count?"),
        ({"dataset_name": "e"}, "DATA is given twice: as 'd', .* and by dataset_name in the config file"),
        ({"count": 1.5}, "count: 1.5 is not of type int"),
        ({"count": True}, "count: True is not of type int"),
        ({"count": "two"}, "invalid int value: 'two'"),
        ({"count": None}, "count: None is not of type int"),
        ({"plain": "perhaps"}, "Truthy value expected"),
        ({"seeds": 1}, "seeds: 1 is not of type list[int]"),
        ({"seeds": "1"}, "seeds: '1' is not of type list[int]"),
        ({"words": ["a", 1]}, "words: ['a', 1] is not of type list[str]"),
        ({"share": [0.5]}, "share: [0.5] is not of type float | None"),
        ({"device": "tpu"}, "device: 'tpu' is none of cpu, cuda"),
        ({"count": 0}, "--count 0 must be at least 1"),
        (["count"], "it must hold a mapping"),
        (None, "it must hold a mapping"),
    ],
)
def test_mistakes_in_a_config_file(refused, tmp_path, values, message):
    said = refused("m", "d", "o", "--config", write(tmp_path / "test.yaml", values))
    for part in message.split(" .* "):
        assert part in said


def test_null_is_a_value_where_none_is_the_default(parser, tmp_path):
    config = write(tmp_path / "test.yaml", {"share": None, "device": None})
    [args] = parser.parse(["m", "d", "o", "--config", config]).arguments
    assert args.share is None and args.device is None


# Help


def test_help_shows_the_short_form_and_every_argument(parser, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parser.parse(["m", "--help"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: disco-trl test MODEL [DATA] OUTPUT_FILE [--OPTION VALUE ...]\n")
    assert "--config FILE.yaml" in shown and "--output_file" in shown


def test_positionals_have_one_order():
    assert [*POSITIONALS] == ["MODEL", "DATA", "OUTPUT_DIR", "OUTPUT_FILE"]
