"""What holds for every command: its help is quick and complete, its mistakes are one line, its documents parse."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import refusal

from disco_trl.cli import commands, launch
from disco_trl.cli.arguments import JsonArguments, ReportArguments, ScoringArguments
from disco_trl.cli.commands import COMMANDS, Command
from disco_trl.cli.main import main
from disco_trl.cli.parser import POSITIONALS


ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "datasets", "peft", "accelerate", "pyarrow", "scipy", "sklearn", "fastapi", "transformers"}
QUICK = [command for command in COMMANDS.values() if not command.is_launched]
by_name = pytest.mark.parametrize("command", QUICK, ids=lambda command: command.name)


def imports_of(*words: str) -> tuple[set[str], str]:
    """Packages that a command line has imported when it ends, and what it has printed."""
    code = (
        "import sys\nfrom disco_trl.cli.main import main\n"
        f"try:\n    main({list(words)!r})\n"
        "except SystemExit:\n    pass\n"
        "print('\\n' + ' '.join({name.split('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown, _, modules = result.stdout.rstrip().rpartition("\n")
    return set(modules.split()), shown + result.stderr


# The table


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_positionals_are_arguments_and_in_the_one_order(command):
    names = command.positionals.split()
    assert names == [name for name in POSITIONALS if name in names]
    options = command.parser().options
    assert {f"--{POSITIONALS[name]}" for name in names} <= options.keys()
    # An argument of such a name is no positional only where it may be left out.
    for name, field in POSITIONALS.items():
        if name not in names and f"--{field}" in options:
            assert not options[f"--{field}"].required


def test_json_is_a_file_to_write_in_every_command():
    have_it = [command for command in QUICK if "--json" in command.parser().options]
    assert {command.name for command in have_it} == {"estimate", "data check"}
    assert all(issubclass(command.load().Arguments, JsonArguments) for command in have_it)


@by_name
def test_every_argument_has_a_sentence_of_help(command):
    for field in dataclasses.fields(command.load().Arguments):
        text = field.metadata["help"]
        assert text[0].isupper() and text.endswith("."), field.name


# Weight


@by_name
def test_help_and_a_mistake_import_nothing_heavy(command):
    # Counted in packages, not in seconds: a busy machine must not fail this test.
    imported, shown = imports_of(*command.name.split(), "--help")
    assert shown.startswith(f"usage: disco-trl {command.name} ")
    assert not imported & HEAVY
    imported, shown = imports_of(*command.name.split(), "--no_such_argument")
    assert f"disco-trl {command.name}: unknown argument --no_such_argument; " in shown
    assert not imported & HEAVY


def test_defaults_and_listed_choices_are_the_librarys():
    """The modules of the commands must not import what these are read from."""
    from disco_trl.cli import compare, estimate, evaluate, export, score, serve
    from disco_trl.data.files import ROWS_AT_ONCE
    from disco_trl.distributions.transforms import TRANSFORMS
    from disco_trl.evaluation.compare import Variant
    from disco_trl.evaluation.evaluate import DRAWS
    from disco_trl.evaluation.report import EXAMPLES
    from disco_trl.models.export import DTYPES, TARGETS
    from disco_trl.models.inference import TOKENS_PER_BATCH
    from disco_trl.serving.middleware import Limits
    from disco_trl.trainer import dataless_model
    from disco_trl.trainer.estimate import SHARDINGS

    def fields(arguments: type) -> dict[str, dataclasses.Field]:
        return {field.name: field for field in dataclasses.fields(arguments)}

    assert fields(ScoringArguments)["tokens_per_batch"].default == TOKENS_PER_BATCH
    assert fields(ReportArguments)["examples"].default == EXAMPLES
    assert fields(score.Arguments)["rows_per_part"].default == ROWS_AT_ONCE
    assert fields(evaluate.Arguments)["draws"].default == DRAWS
    assert Limits(**{name: fields(serve.Arguments)[name].default for name in serve.LIMITS}) == Limits()
    settings = dataless_model.Settings()
    for name, value in dataclasses.asdict(settings).items():
        if name in fields(estimate.Arguments):
            assert fields(estimate.Arguments)[name].default == value, name
    for arguments, name, choices in (
        (score.Arguments, "transform", TRANSFORMS),
        (export.Arguments, "to", TARGETS),
        (export.Arguments, "dtype", DTYPES),
        (estimate.Arguments, "dtype", dataless_model.DTYPES),
        (estimate.Arguments, "optim", dataless_model.OPTIMIZERS),
        (estimate.Arguments, "sharding", SHARDINGS),
        (estimate.Arguments, "methods", dataless_model.METHODS),
    ):
        for choice in choices:
            assert re.search(rf"\b{choice}\b", fields(arguments)[name].metadata["help"]), (name, choice)
    assert tuple(estimate.LABELS) == dataless_model.METHODS
    for variant in fields(compare.Arguments)["variants"].default_factory():
        Variant.parse(variant)


# Errors


class OwnError(RuntimeError):
    """As the package's own modules define them."""


OwnError.__module__ = "disco_trl.somewhere"


@pytest.fixture
def failing(monkeypatch):
    """`failing(error)` has `disco-trl score` end in that error."""

    def fail(error: BaseException) -> list[str]:
        def run(_):
            raise error

        monkeypatch.setattr("disco_trl.cli.score.run", run)
        return ["score", "m", "d", "o"]

    return fail


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError, ImportError, FloatingPointError, OwnError])
def test_mistakes_of_the_user_are_one_line(kind, failing):
    with pytest.raises(SystemExit) as exit_info:
        main(failing(kind("no")))
    assert exit_info.value.code == "disco-trl score: no"  # which Python prints, and exits with 1


def test_too_deep_a_value_is_a_mistake_of_the_user(failing):
    with pytest.raises(SystemExit, match="disco-trl score: a value in a file is nested too deeply to be read"):
        main(failing(RecursionError()))


@pytest.mark.parametrize("error", [RuntimeError("CUDA"), KeyError("a"), AssertionError()])
def test_other_errors_keep_their_traceback(error, failing):
    with pytest.raises(type(error)):
        main(failing(error))


def test_an_interrupt_is_told_and_how_to_go_on(failing, capsys, monkeypatch):
    for after, end in (("", ""), (commands.AGAIN, "; run the same command again to go on")):
        monkeypatch.setitem(COMMANDS, "score", dataclasses.replace(COMMANDS["score"], after_interrupt=after))
        with pytest.raises(SystemExit) as exit_info:
            main(failing(KeyboardInterrupt()))
        assert exit_info.value.code == 130
        assert capsys.readouterr().err == f"disco-trl score: interrupted{end}\n"
    # Of several processes one speaks.
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        main(failing(KeyboardInterrupt()))
    assert capsys.readouterr().err == ""


def test_what_can_go_on_says_so():
    assert {name for name, command in COMMANDS.items() if command.after_interrupt} == {"score", "compare"}


# Documents


def documented() -> list[tuple[str, list[str]]]:
    """Every `disco-trl ...` in the documents, where it stands and its words."""
    found = []
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*"))]
    for path in (*paths, ROOT / "scripts/disco_reward.py", *sorted((ROOT / "disco_trl").rglob("*.py"))):
        if not path.is_file() or path.suffix not in (".md", ".py", ".yaml"):
            continue
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        # Alone on its line, behind `$ `, `# ` or indentation, and perhaps variables of the environment.
        start = r"(?m)^[ $#]*(?:\w+=\$\(.*\) |\w+=\S+ )*"
        lines = re.findall(rf"{start}(disco-trl [^`\n]*)$", text)
        lines += re.findall(rf"{start}accelerate launch [\w -]*-m disco_trl\.cli\.(score [^`\n]*)$", text)
        for line in lines:
            words = line.removeprefix("disco-trl ").removesuffix(" &").split()
            if " ".join(words[:2]) in COMMANDS or words[0] in COMMANDS:
                words = shlex.split(" ".join(words), comments=True)
                if " ".join(words[:2]) in COMMANDS:
                    words[:2] = [" ".join(words[:2])]
                if "..." not in words:
                    found.append((path.name, words))
    return found


def test_documented_command_lines_parse():
    found = documented()
    assert len(found) > 15
    assert {words[0] for _, words in found} == COMMANDS.keys()
    for place, words in found:
        command: Command = COMMANDS[words[0]]
        if any(word.startswith("--config") for word in words):
            words = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
        options = None
        if command.is_launched:
            words = [*words, "--use_cpu"]  # whatever machine this is
            options = launch._launcher_parser()._option_string_actions
        try:
            command.parser().parse(words[1:], options)
        except SystemExit as error:
            pytest.fail(f"{place}: disco-trl {shlex.join(words)}: {error}")


def test_an_option_in_prose_is_one_that_there_is():
    """`disco-trl COMMAND --option` between backticks names options of the command."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for name, rest in re.findall(r"`disco-trl ((?:data )?[\w-]+)((?: [^`]*)?)`", path.read_text(encoding="utf-8")):
            if name in COMMANDS:
                known = COMMANDS[name].parser().options
                assert {*re.findall(r"--[\w-]+", rest)} <= {*known, "--help"}, f"{path.name}: {name}{rest}"


def test_a_command_line_is_refused_in_one_line(capsys):
    assert refusal(capsys, "evaluate", "m", "d", "--draws", "0").startswith("disco-trl evaluate: --draws 0 must be")
