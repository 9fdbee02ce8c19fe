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
    assert ours == {"disco_trl"}


def test_command_line_help_is_lazy():
    ours = loaded_modules("import disco_trl.cli") - loaded_modules("import argparse, importlib, typing")
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


@pytest.mark.parametrize("name", ["py.typed", "model_card.md"])
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
    for path in Path(str(resources.files("disco_trl"))).glob("*.py"):
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


CARD = {
    "model_name": "tiny-disco",
    "base_model": "org/base",
    "hub_model_id": "org/tiny-disco",
    "dataset_name": "org/pairs",
    "family": "normal",
    "fixed_scale": None,
    "is_adapter": False,
    "metrics": {"accuracy": 0.84912, "pairs": 30000},
    "versions": {"disco-trl": "0.1.0", "TRL": "1.16.0"},
}


def render_card(**changes) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    variables = CARD | changes
    card_data = ModelCardData(
        base_model=variables["base_model"], library_name="transformers", tags=["disco-trl", "reward-trainer"]
    )
    card = ModelCard.from_template(
        card_data, template_path=str(resources.files("disco_trl").joinpath("model_card.md")), **variables
    )
    assert card.data.library_name == "transformers"  # the header survives as YAML
    return card.text


def test_model_card_says_what_the_model_is_and_how_to_load_it():
    text = render_card()
    assert "# tiny-disco" in text
    assert "https://huggingface.co/org/base" in text and "https://huggingface.co/datasets/org/pairs" in text
    assert "| Family of the distribution | normal |" in text
    assert "Φ((μa − μb) / √(σa² + σb²))" in text
    assert "| Scale σ | learned for each answer |" in text
    assert "| accuracy | 0.8491 |" in text and "| pairs | 30000 |" in text
    assert "| TRL | 1.16.0 |" in text
    assert text.count('path = "org/tiny-disco"') == 1
    assert "PEFT" not in text


def test_model_card_of_an_adapter_that_was_never_pushed():
    text = render_card(base_model=None, hub_model_id=None, dataset_name=None, is_adapter=True, metrics={})
    assert "PEFT adapter" in text and "Transformers and PEFT" in text
    assert 'path = "path/to/this/folder"' in text
    assert "None recorded" in text
    assert "None]" not in text and "huggingface.co" not in text


def test_model_card_names_what_a_family_lacks():
    text = render_card(family="cauchy", fixed_scale=0.5)
    assert "no mean and no variance" in text
    assert "| Scale σ | fixed at 0.5 |" in text
    assert "geometrically" not in text


@pytest.mark.parametrize("family", ["normal", "cauchy", "logistic"])
def test_model_card_code_parses(family):
    text = render_card(family=family)
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        ast.parse(block)


@pytest.mark.parametrize("changes", [{}, {"base_model": None, "dataset_name": None, "metrics": {}}])
def test_model_card_is_tidy_markdown(changes):
    text = render_card(**changes)
    assert "{{" not in text and "{%" not in text
    assert "\n\n\n" not in text
    assert not re.search(r"\|\n\n\|", text)  # a blank line would cut a table in two
