"""Exports of a model that knows several attributes, read as somebody without disco-trl reads them."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from attribute_models import ANSWERS, RATINGS, WEIGHTS, save_attribute_model
from conftest import build_tokenizer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, tiny_config
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from disco_trl import DiscoRewardModel
from disco_trl.cli.main import main
from disco_trl.data.tokenization import tokenize
from disco_trl.models import export as export_module
from disco_trl.models.export import export
from disco_trl.models.export_proof import ProofError
from disco_trl.models.inference import run_in_batches, score_by_attribute
from disco_trl.models.plain_logits import from_attribute_logits, from_two_logits
from disco_trl.models.reward_view import RewardView


KINDS = ("judged", "summed", "adapter")
CASES = [("llama", kind) for kind in KINDS] + [("gpt2", "judged"), ("bert", "judged"), ("bert", "summed")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """`sources(architecture, kind, **settings)` is the directory of a model of that kind."""

    @functools.cache
    def base(architecture: str) -> str:
        path = tmp_path_factory.mktemp(architecture)
        config, tokenizer = tiny_config(architecture), build_tokenizer()
        config.max_position_embeddings = 512
        config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
        with torch.random.fork_rng():
            torch.manual_seed(0)
            getattr(transformers, ARCHITECTURES[architecture][1])(config).save_pretrained(path)
        return str(path)

    @functools.cache
    def make(architecture: str, kind: str, **settings) -> str:
        path = tmp_path_factory.mktemp(f"{architecture}-{kind}")
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return save_attribute_model(base(architecture), path, kind, **settings)

    make.base = base
    return make


def sequences(path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [tokenize(tokenizer, text) for text in ANSWERS]


def everything(path):
    return score_by_attribute(DiscoRewardModel.from_pretrained(path, dtype=torch.float32), sequences(path))


def logits(path) -> torch.Tensor:
    model, info = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    assert not hasattr(model.config, "disco")
    result = torch.empty(len(ANSWERS), model.config.num_labels)
    for indices, output in run_in_batches(model, sequences(path)):
        result[indices] = output.logits.float()
    return result


def entry_of(path):
    return AutoConfig.from_pretrained(path).reward_distribution


def close(found, expected, kind: str) -> None:
    """Of an adapter, the merged weights are others by rounding."""
    tolerance = 1e-4 if kind == "adapter" else 1e-6
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"attribute": "tone"}, {"weights": WEIGHTS}], ids=str)
@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_a_scalar_of_each_view(architecture, kind, options, sources, tmp_path):
    source = sources(architecture, kind)
    rewards = everything(source)
    if "weights" in options:
        expected = rewards.joint.location @ torch.tensor([WEIGHTS[name] for name in RATINGS])
    else:
        expected = rewards.of_attribute(options.get("attribute", "overall")).location
    assert expected.std() > 0.01
    report = export(source, tmp_path / "out", to="scalar", **options)
    found = logits(tmp_path / "out")
    assert found.shape == (3, 1)
    close(found[:, 0], expected, kind)
    assert report.log_scale_difference is None and not report.constant_scales


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_two_logits_of_one_attribute(architecture, kind, sources, tmp_path):
    source = sources(architecture, kind)
    export(source, tmp_path / "out", to="two-logit", attribute="tone")
    found, expected = from_two_logits(logits(tmp_path / "out"), entry_of(tmp_path / "out")), everything(source)
    close(found.location, expected.of_attribute("tone").location, kind)
    close(found.scale.log(), expected.of_attribute("tone").scale.log(), kind)


def test_two_logits_of_the_overall_reward(sources, tmp_path):
    source = sources("llama", "judged")
    for name, options in (("default", {}), ("named", {"attribute": "overall"})):
        export(source, tmp_path / name, to="two-logit", **options)
        found = from_two_logits(logits(tmp_path / name), entry_of(tmp_path / name))
        close(found.location, everything(source).overall.location, "judged")
        close(found.scale, everything(source).overall.scale, "judged")


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_the_logits_of_all_attributes(architecture, kind, sources, tmp_path):
    source, output = sources(architecture, kind), tmp_path / "out"
    report = export(source, output, to="attributes")
    assert report.log_scale_difference < 1e-5 or kind == "adapter"
    config = json.loads((output / "config.json").read_text())
    labels = ["location_length", "raw_scale_length", "location_tone", "raw_scale_tone"]
    assert config["id2label"] == {str(place): label for place, label in enumerate(labels)}
    assert config["problem_type"] == "regression"
    stock = getattr(transformers, config["architectures"][0])(AutoConfig.from_pretrained(output))
    stock.load_state_dict(load_file(output / "model.safetensors"), strict=True)

    expected, found = everything(source), logits(output)
    assert found.shape == (3, 4)
    entry = entry_of(output)
    joint = from_attribute_logits(found, entry)
    assert (joint.names, joint.family) == (("length", "tone"), "normal")
    close(joint.location, expected.joint.location, kind)
    close(joint.scale.log(), expected.joint.scale.log(), kind)
    assert expected.joint.scale.log().std(dim=0).min() > 1e-3
    assert joint.correlation.tolist() == [[1.0, 0.5], [0.5, 1.0]]
    assert entry["has_rest"] == (kind != "summed")

    # The formulas of config.json, in a client's own words.
    for place, of_attribute in enumerate(entry["attributes"]):
        for row in range(3):
            names = {"exp": math.exp, "tanh": math.tanh, "logits": found[row].tolist(), **of_attribute}
            location, scale = (eval(part.split(" = ")[1], names) for part in of_attribute["formula"].split("; "))
            assert location == pytest.approx(joint.location[row, place].item(), rel=1e-6)
            assert scale == pytest.approx(joint.scale[row, place].item(), rel=1e-5)

    weights = {of_attribute["name"]: of_attribute["weight"] for of_attribute in entry["attributes"]}
    model = DiscoRewardModel.from_pretrained(source)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert weights == pytest.approx(inner.attribute_weights)
    if kind == "summed":
        close(joint.project(weights).location, expected.overall.location, kind)
        close(joint.project(weights).scale, expected.overall.scale, kind)


def test_attribute_logits_by_hand():
    # raw = 3 - 1 = 2, tanh(2 / 3) = 0.582783, 2 · exp(3 · 0.582783) = 11.4902; and raw = 0, 0.5 · exp(0) = 0.5.
    one = {"name": "a", "weight": 1.0, "unit_scale": 2.0, "max_log_scale": 3.0, "raw_scale_offset": 1.0}
    other = {"name": "b", "weight": -1.0, "unit_scale": 0.5, "max_log_scale": 3.0, "raw_scale_offset": -2.0}
    entry = {"reward_family": "normal", "attributes": [one, other], "correlation": [[1.0, 0.3], [0.3, 1.0]]}
    joint = from_attribute_logits(torch.tensor([[0.5, 3.0, -7.0, -2.0]]), entry)
    assert joint.location.tolist() == [[0.5, -7.0]]
    assert joint.scale.tolist() == [[pytest.approx(11.4902, abs=1e-4), 0.5]]
    # 11.4902² + 0.5² - 2 · 0.3 · 11.4902 · 0.5 = 128.8278
    difference = joint.project({"a": 1, "b": -1})
    assert (difference.location.item(), difference.scale.item()) == (7.5, pytest.approx(128.8278**0.5, abs=1e-3))
    with pytest.raises(ValueError, match="1 logits and 2 attributes, of which each has two"):
        from_attribute_logits(torch.zeros(3, 1), entry)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disco_checkpoint_of_all_and_of_one(kind, sources, tmp_path):
    source = sources("llama", kind)
    export(source, tmp_path / "all", to="disco")
    expected, found = everything(source), everything(tmp_path / "all")
    for name in ("overall", *RATINGS):
        close(found.of_attribute(name).location, expected.of_attribute(name).location, kind)
        close(found.of_attribute(name).scale, expected.of_attribute(name).scale, kind)
    torch.testing.assert_close(found.joint.correlation, expected.joint.correlation)
    # A bar at a rating is where it was.
    view = RewardView(minimum={"tone": 3}, min_probability=0.3, floor=-9.0)
    models = [DiscoRewardModel.from_pretrained(path) for path in (source, tmp_path / "all")]
    caps = [view.read(model, rewards).cap.tolist() for model, rewards in zip(models, (expected, found), strict=True)]
    assert caps[0] == caps[1]
    export(source, tmp_path / "one", to="disco", attribute="tone")
    close(everything(tmp_path / "one").overall.scale, expected.of_attribute("tone").scale, kind)
    assert everything(tmp_path / "one").joint is None


@pytest.mark.parametrize("to", ["scalar", "attributes", "disco"])
@pytest.mark.parametrize("kind", ["judged", "summed"])
def test_bfloat16(to, kind, sources, tmp_path):
    """The row of the overall reward is rounded as it is, and not made anew of rows that are."""
    source = sources("llama", kind)
    report = export(source, tmp_path / "out", to=to, dtype="bfloat16")
    assert report.location_difference < 1e-4 < report.location_rounding < 0.1
    expected = everything(source)
    if to == "attributes":
        joint = from_attribute_logits(logits(tmp_path / "out"), entry_of(tmp_path / "out"))
        torch.testing.assert_close(joint.location, expected.joint.location, rtol=0.05, atol=0.05)
    else:
        model = DiscoRewardModel.from_pretrained(tmp_path / "out") if to == "disco" else None
        location = logits(tmp_path / "out")[:, 0] if model is None else everything(tmp_path / "out").overall.location
        torch.testing.assert_close(location, expected.overall.location, rtol=0.05, atol=0.05)


def test_an_attribute_whose_scale_is_constant(sources, tmp_path):
    model = DiscoRewardModel.from_pretrained(sources("llama", "judged"))
    scale = model.reward_head.by_attribute()["tone"].scale
    scale.weight.data.zero_()
    scale.log_level.fill_(math.log(2.0))
    model.save_pretrained(tmp_path / "source")
    build_tokenizer().save_pretrained(tmp_path / "source")
    level = 4 / math.sqrt(math.pi)  # twice the unit
    for to in ("attributes", "disco"):
        report = export(tmp_path / "source", tmp_path / to, to=to)
        assert report.constant_scales == {"tone": pytest.approx(level)}
        assert "the scale of 'tone' is 2.25676 for all answers" in str(report)
    joint = from_attribute_logits(logits(tmp_path / "attributes"), entry_of(tmp_path / "attributes"))
    assert joint.marginal("tone").scale.tolist() == pytest.approx([level] * 3)


def with_untrained_scale(sources, path: Path) -> str:
    model = DiscoRewardModel.from_pretrained(sources("llama", "judged"))
    scale = model.reward_head.by_attribute()["tone"].scale
    scale.weight.data.zero_()
    scale.rows_seen.zero_()
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "settings", "options", "message"),
    [
        ("judged", {"fixed_scale": 0.5}, {"to": "attributes"}, r"the scale of 'length' is fixed at 0\.5.*--to scalar"),
        ("judged", {"reward_family": "mixture"}, {"to": "attributes"}, r"'mixture' reward has shape parameters"),
        ("judged", {}, {"to": "attributes", "attribute": "tone"}, r"writes all attributes; leave out attribute"),
        ("judged", {}, {"to": "attributes", "weights": WEIGHTS}, r"writes all attributes; leave out attribute"),
        ("judged", {}, {"to": "disco", "weights": WEIGHTS}, r"the scale of a weighted sum of attributes is no"),
        ("judged", {}, {"to": "two-logit", "weights": WEIGHTS}, r"the scale of a weighted sum of attributes is no"),
        ("judged", {}, {"to": "scalar", "weights": {"tone": 0}}, r"no attribute has a weight other than 0"),
        ("judged", {}, {"to": "scalar", "weights": {}}, r"no attribute has a weight other than 0"),
        ("judged", {}, {"to": "scalar", "weights": {"tome": 1}}, r"no attribute 'tome'; there are 'length', 'tone'"),
        ("judged", {}, {"to": "scalar", "attribute": "tome"}, r"does not know the attribute 'tome'"),
        ("judged", {}, {"to": "scalar", "attribute": "tone", "weights": WEIGHTS}, r"give one of them"),
        ("summed", {}, {"to": "two-logit"}, r"name one of them \('length', 'tone'\), or use --to attributes"),
        ("summed", {}, {"to": "two-logit", "attribute": "overall"}, r"whose scale no head of its own computes"),
        ("summed", {}, {"to": "disco", "attribute": "overall"}, r"whose scale no head of its own computes"),
    ],
    ids=str,
)
def test_what_is_refused(kind, settings, options, message, sources, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(sources("llama", kind, **settings), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_what_has_no_attributes_or_no_scale_of_theirs(sources, tmp_path):
    plain = tmp_path / "plain"
    export(sources("llama", "judged"), plain, to="disco", attribute="tone")
    with pytest.raises(ValueError, match=r"it knows no attributes, because nobody rated .*use --to two-logit"):
        export(plain, tmp_path / "out", to="attributes")
    with pytest.raises(ValueError, match=r"does not know the attribute 'tone'; it knows 'overall'"):
        export(plain, tmp_path / "out", to="scalar", attribute="tone")
    untrained = with_untrained_scale(sources, tmp_path / "untrained")
    for to in ("attributes", "disco"):
        with pytest.raises(ValueError, match=r"the scale of 'tone' is the same for all .* no answers have trained it"):
            export(untrained, tmp_path / "out", to=to)
    model = DiscoRewardModel.from_pretrained(sources.base("llama"))
    model.set_scale_layer(1)
    model.save_pretrained(tmp_path / "layer-base")
    layered = save_attribute_model(str(tmp_path / "layer-base"), tmp_path / "layer", "judged")
    with pytest.raises(ValueError, match=r"the scale of 'length' reads the mean hidden state of layer 1 .*--to disco"):
        export(layered, tmp_path / "out", to="attributes")
    export(layered, tmp_path / "disco", to="disco")
    torch.testing.assert_close(everything(tmp_path / "disco").joint.scale, everything(layered).joint.scale)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("row", range(4))
def test_the_proof_looks_at_every_logit(row, sources, tmp_path, monkeypatch):
    write = export_module._write

    def write_with_damage(model, folder, *args):
        write(model, folder, *args)
        state = load_file(folder / "model.safetensors")
        state["score.weight"] = state["score.weight"].clone()
        state["score.weight"][row] += 1e-2
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export_module, "_write", write_with_damage)
    what = ("locations", "log scales")[row % 2]
    with pytest.raises(ProofError, match=rf"does not give the rewards of its source: {what} differ"):
        export(sources("llama", "judged"), tmp_path / "out", to="attributes")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["score.attributes.heads.1.weight", "score.attributes.heads.1.scale.weight"])
def test_the_proof_of_a_disco_checkpoint_looks_at_the_attributes(key, sources, tmp_path, monkeypatch):
    write = export_module._write

    def write_with_damage(model, folder, *args):
        write(model, folder, *args)
        state = load_file(folder / "model.safetensors")
        state[key] = state[key] + 1e-2
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export_module, "_write", write_with_damage)
    with pytest.raises(ProofError, match="does not give the rewards of its source"):
        export(sources("llama", "judged"), tmp_path / "out", to="disco")


def test_the_command(sources, tmp_path, capsys):
    main(["export", sources("llama", "adapter"), str(tmp_path / "all"), "--to", "attributes"])
    assert ", log scale " in capsys.readouterr().out
    assert logits(tmp_path / "all").shape == (3, 4)
    weights = json.dumps(WEIGHTS)
    main(["export", sources("llama", "summed"), str(tmp_path / "sum"), "--to", "scalar", "--weights", weights])
    expected = everything(sources("llama", "summed")).joint.project(WEIGHTS).location
    close(logits(tmp_path / "sum")[:, 0], expected, "summed")
    with pytest.raises(SystemExit, match=r"--weights '\{tone: 1\}' is not a number for each attribute, as JSON"):
        arguments = [sources("llama", "summed"), str(tmp_path / "out"), "--to", "scalar"]
        main(["export", *arguments, "--weights", "{tone: 1}"])
