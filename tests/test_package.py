"""The package as a user meets it: what it is called, how lightly it imports, what it carries."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import disco_trl


def loaded_modules(statement: str) -> set[str]:
    """Names of the modules that a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_import_is_lazy():
    # Counted in modules, not in seconds: a busy machine must not fail this test.
    ours = loaded_modules("import disco_trl; dir(disco_trl)") - loaded_modules("import importlib, typing")
    assert ours == {"disco_trl", "disco_trl._version"}


def test_command_line_help_is_lazy():
    ours = loaded_modules("import disco_trl.cli.main") - loaded_modules("import argparse, importlib, typing")
    assert not {name.split(".")[0] for name in ours} - {"disco_trl"} - sys.stdlib_module_names


@pytest.mark.parametrize("name", disco_trl.__all__)
def test_public_names(name):
    value = getattr(disco_trl, name)
    assert value.__module__.startswith("disco_trl.")
    assert name in dir(disco_trl)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'disco_trl' has no attribute 'RewardModle'"):
        disco_trl.RewardModle  # noqa: B018


def test_version_has_one_source():
    assert importlib.metadata.version("disco-trl") == disco_trl.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", disco_trl.__version__)


@pytest.mark.parametrize("name", ["py.typed", "models/model_card.md", "evaluation/report.html"])
def test_data_files_are_in_the_package(name):
    assert resources.files("disco_trl").joinpath(name).is_file()


def test_every_import_is_a_declared_dependency():
    """What the package imports at the top of a module or of a function must come with `pip install disco-trl`, or
    with an extra."""
    declared = {
        re.match(r"[\w-]+", requirement)[0].replace("-", "_").lower()
        for requirement in importlib.metadata.requires("disco-trl")
    }
    distributions = importlib.metadata.packages_distributions()
    undeclared = {}
    for path in Path(str(resources.files("disco_trl"))).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            for top in {name.split(".")[0] for name in names} - {"disco_trl"} - sys.stdlib_module_names:
                if not {dist.replace("-", "_").lower() for dist in distributions.get(top, [top])} & declared:
                    undeclared.setdefault(top, path.name)
    assert not undeclared
