"""The text of the model card. (What the trainer puts in it: `contracts/test_c4_checkpoints.py`.)"""

import ast
import importlib.metadata
import re

import pytest
import torch
from attribute_models import know_attributes
from huggingface_hub import ModelCard, ModelCardData

import disco_trl
from disco_trl import DiscoRewardModel
from disco_trl._version import versions_of
from disco_trl.distributions.families import FAMILIES, get_family
from disco_trl.models.model_card import TEMPLATE, add_evaluation, make_model_card


CARD = {
    "model_name": "tiny-disco",
    "base_model": "org/base",
    "hub_model_id": "org/tiny-disco",
    "dataset_name": "org/pairs",
    "family": "normal",
    "fixed_scale": None,
    "scale_layer": None,
    "constant_scale": None,
    "is_adapter": False,
    "metrics": {"accuracy": 0.84912, "pairs": 30000},
    "calibration_factor": 1.5837,
    "versions": {"disco-trl": "0.1.0", "TRL": "1.16.0"},
}


def render_card(**changes) -> str:
    variables = CARD | changes
    variables["family"] = get_family(variables["family"])
    card_data = ModelCardData(
        base_model=variables["base_model"], library_name="transformers", tags=["disco-trl", "reward-trainer"]
    )
    card = ModelCard.from_template(card_data, template_path=str(TEMPLATE), **variables)
    assert card.data.library_name == "transformers"  # the header survives as YAML
    return card.text


def test_says_what_the_model_is_and_how_to_load_it():
    text = render_card()
    assert "# tiny-disco" in text
    assert "https://huggingface.co/org/base" in text and "https://huggingface.co/datasets/org/pairs" in text
    assert "| Family of the distribution | normal |" in text
    assert "Φ((μa − μb) / √(σa² + σb²))" in text
    assert "| Scale σ | learned for each answer |" in text
    assert "| accuracy | 0.8491 |" in text and "| pairs | 30000 |" in text
    assert "| TRL | 1.16.0 |" in text
    assert "The locations were calibrated when training ended: multiplied by\n1.58." in text
    assert "were calibrated" not in render_card(calibration_factor=None)
    assert text.count('path = "org/tiny-disco"') == 1
    assert "PEFT" not in text


def test_card_of_an_adapter_that_was_never_pushed():
    text = render_card(base_model=None, hub_model_id=None, dataset_name=None, is_adapter=True, metrics={})
    assert "PEFT adapter" in text and "Transformers and PEFT" in text
    assert 'path = "path/to/this/folder"' in text
    assert "None recorded" in text
    assert "None]" not in text and "huggingface.co" not in text


def test_names_what_a_family_lacks():
    text = render_card(family="cauchy", fixed_scale=0.5)
    assert "no mean and no variance" in text
    assert "| Scale σ | fixed at 0.5 |" in text
    assert "geometrically" not in text


def test_says_what_the_scale_reads():
    text = render_card()
    assert "| The scale reads | the last hidden state, at the token where the location is read |" in text
    assert "for every answer" not in text
    text = render_card(scale_layer=20)
    assert "| The scale reads | the hidden states after layer 20, averaged over the tokens |" in text
    text = render_card(scale_layer=20, constant_scale=1.128379)
    assert "| Scale σ | 1.12838 for every answer |" in text
    assert "The scale is the same for every answer, and says nothing about" in text
    assert "The scale reads" not in text and "spread that the training preferences show" not in text
    assert "The scale reads" not in render_card(fixed_scale=0.5)


def test_the_card_of_a_model_says_what_its_scale_is(tiny_llama_dir):
    def card() -> str:
        model_of = {"model_name": None, "hub_model_id": None, "dataset_name": None, "tags": set(), "metrics": {}}
        return make_model_card(model, **model_of).text

    model = DiscoRewardModel.from_pretrained(tiny_llama_dir)
    model.set_scale_layer(1)
    assert f"| Scale σ | {model.family.unit_scale:.6g} for every answer |" in card()
    torch.nn.init.ones_(model.scale_head.weight)
    assert "the hidden states after layer 1, averaged" in card()
    model = DiscoRewardModel.from_pretrained(tiny_llama_dir, fixed_scale=0.25)
    assert "| Scale σ | fixed at 0.25 |" in card()


def card_of(model) -> str:
    of_model = {"model_name": None, "hub_model_id": "org/tiny", "dataset_name": None, "tags": set(), "metrics": {}}
    return make_model_card(model, **of_model).text


def test_attributes(tiny_llama_dir):
    model = know_attributes(DiscoRewardModel.from_pretrained(tiny_llama_dir), has_rest=True)
    text = card_of(model)
    # -0.25 · exp(0.3) = -0.33746 and exp(-0.2) = 0.81873
    assert "| length | -0.3375 | 1, 2, 3, 4, 5 |\n| tone | 0.8187 | 1, 2, 3 |\n\n" in text
    assert "The overall reward is the weighted sum of the attributes and a rest" in text
    assert (
        "| | length | tone |\n| --- | --- | --- |\n| length | 1.00 | 0.50 |\n| tone | 0.50 | 1.00 |\n\n## Use" in text
    )
    assert "DiscoReward(path, attribute='length')" in text
    assert "DiscoReward(path, weights={'length': -0.25, 'tone': 1.0})" in text
    assert "disco-trl export org/tiny plain-model --to scalar --attribute length" in text
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        ast.parse(block)
    assert "{{" not in text and "{%" not in text and "\n\n\n" not in text

    model = know_attributes(DiscoRewardModel.from_pretrained(tiny_llama_dir), has_rest=False)
    with torch.no_grad():
        model.reward_head.attributes.correlation.copy_(torch.eye(2))
    model.config.disco["attributes"]["likelihoods"][1] = {}
    text = card_of(model)
    assert "| tone | 1 | comparisons only |" in text
    assert "The overall reward is the weighted sum of the attributes. Nobody judged the answers overall" in text
    assert "are taken for uncorrelated" in text and "| | length | tone |" not in text


def test_names_that_a_table_or_a_shell_would_read(tiny_llama_dir):
    model = know_attributes(DiscoRewardModel.from_pretrained(tiny_llama_dir), has_rest=True)
    model.reward_head.attributes.names = ("it's a | b", "tone")
    model.config.disco["attributes"]["names"] = ["it's a | b", "tone"]
    text = card_of(model)
    assert r"| it's a \| b | -0.3375 |" in text
    assert """--attribute 'it'"'"'s a | b'""" in text
    assert """attribute="it's a | b")""" in text


def test_a_card_without_attributes_says_nothing_of_them(tiny_llama_dir):
    assert render_card(attributes=None) == render_card()
    text = card_of(DiscoRewardModel.from_pretrained(tiny_llama_dir))
    assert "ttribute" not in text


@pytest.mark.parametrize("family", FAMILIES)
def test_code_parses(family):
    text = render_card(family=family)
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        ast.parse(block)


@pytest.mark.parametrize(
    "changes", [{}, {"base_model": None, "dataset_name": None, "metrics": {}}, {"constant_scale": 1.0}]
)
def test_is_tidy_markdown(changes):
    text = render_card(**changes)
    assert "{{" not in text and "{%" not in text
    assert "\n\n\n" not in text
    assert not re.search(r"\|\n\n\|", text)  # a blank line would cut a table in two


def test_an_evaluation_takes_the_place_of_the_one_before(tmp_path):
    picture = tmp_path / "elsewhere" / "reliability.png"
    picture.parent.mkdir()
    picture.write_bytes(b"a picture")
    card = tmp_path / "README.md"
    card.write_text(render_card())
    add_evaluation(tmp_path, "| old |", [])
    add_evaluation(tmp_path, r"| new \1 |", [picture])
    text = card.read_text()
    assert "| old |" not in text and text.count("### On held-out data") == 1
    assert text.index("## Evaluation") < text.index(r"| new \1 |") < text.index("](reliability.png)")
    assert text.index("](reliability.png)") < text.index("## Training")
    assert (tmp_path / "reliability.png").read_bytes() == b"a picture"


def test_an_evaluation_goes_into_any_card_and_needs_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"README\.md: there is no such file"):
        add_evaluation(tmp_path, "", [])
    (tmp_path / "README.md").write_text("# Mine\n")
    add_evaluation(tmp_path, "figures", [])
    assert (
        (tmp_path / "README.md")
        .read_text()
        .startswith("# Mine\n\n<!-- evaluation -->\n### On held-out data\n\nfigures")
    )


def test_versions_that_cannot_be_read_are_left_out():
    # A source tree has no metadata, which `importlib.metadata` says by an error.
    found = versions_of(("disco-trl", "no-such-package", "torch"))
    assert list(found) == ["disco-trl", "torch"]
    assert found["disco-trl"] == disco_trl.__version__


def test_the_version_of_the_package_needs_no_metadata(monkeypatch, tiny_llama_dir):
    def without(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    model = DiscoRewardModel.from_pretrained(tiny_llama_dir)
    card = make_model_card(model, model_name=None, hub_model_id=None, dataset_name=None, tags=set(), metrics={})
    assert f"| disco-trl | {disco_trl.__version__} |" in card.text
    assert "| trl |" not in card.text
