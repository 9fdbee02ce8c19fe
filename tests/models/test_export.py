"""Exports are what they say: plain files that strict loaders take, with the rewards of their source.

What a user of the files does is done here by hand (stock classes, config.json, the formula), with no help from the
module that wrote them.
"""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from conftest import build_tokenizer
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, edited_copy, head_of, lora, randomize_heads, save_adapter, tiny_config
from tiny_training import disco_trainer, preferences
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from disco_trl import DiscoRewardModel
from disco_trl.cli.main import main
from disco_trl.data.tokenization import tokenize
from disco_trl.models import export as export_module
from disco_trl.models.export import export
from disco_trl.models.export_proof import ProofError
from disco_trl.models.inference import run_in_batches, score
from disco_trl.models.plain_logits import from_two_logits


# What heads differ in: a bias, a block around them, pooling by the first token, by the last, or as an average.
SOME_ARCHITECTURES = ("llama", "gpt2", "gemma3", "opt", "bert", "roberta", "modernbert", "eurobert")
TEXTS = ["the answer is short", "a careful question about the piano, and a day", "no"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """`sources(architecture, kind, **settings)` is the directory of a `base`, `scalar`, `disco` or `adapter` model."""

    @functools.cache
    def make(architecture: str, kind: str, **settings) -> str:
        path = tmp_path_factory.mktemp(f"{architecture}-{kind}")
        tokenizer = build_tokenizer()
        tokenizer.save_pretrained(path)
        if kind == "base":
            config = tiny_config(architecture)
            config.max_position_embeddings = 512
            config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = getattr(transformers, ARCHITECTURES[architecture][1])(config)
        elif kind == "scalar":
            with torch.random.fork_rng():
                torch.manual_seed(1)
                model = AutoModelForSequenceClassification.from_pretrained(make(architecture, "base"), num_labels=1)
        else:
            model = DiscoRewardModel.from_pretrained(make(architecture, "base"), **settings)
            if kind == "adapter":
                return save_adapter(lora(model), path)
            randomize_heads(model)
        model.save_pretrained(path)
        return str(path)

    return make


def sequences(path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [tokenize(tokenizer, text) for text in TEXTS]


def expected(path):
    return score(DiscoRewardModel.from_pretrained(path, dtype=torch.float32), sequences(path))


def logits(path, **kwargs) -> torch.Tensor:
    """What somebody without disco-trl gets, `[N, labels]`."""
    model, info = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    result = torch.empty(len(TEXTS), model.config.num_labels)
    for indices, output in run_in_batches(model, sequences(path)):
        result[indices] = output.logits.float()
    return result


def assert_strictly_plain(path, num_labels: int) -> None:
    config = AutoConfig.from_pretrained(path)
    plain = type(config)()
    assert not hasattr(config, "disco")
    assert "keys_to_ignore_at_inference" not in json.loads((Path(path) / "config.json").read_text())
    key = "keys_to_ignore_at_inference"
    assert getattr(config, key, None) == getattr(plain, key, None)
    assert config.num_labels == num_labels
    (architecture,) = config.architectures
    stock = getattr(transformers, architecture)(config)
    stock.load_state_dict(load_file(Path(path) / "model.safetensors"), strict=True)


# What is written


@pytest.fixture(scope="module")
def with_everything(sources, tmp_path_factory) -> str:
    """A model that has learned all there is beside location and scale, and has a posterior."""
    model = DiscoRewardModel.from_pretrained(sources("llama", "disco"))
    learned = {"location_error": True, "tie_width": "learned", "label_noise": "learned", "strength_levels": 3}
    for _, head in model.named_reward_heads():
        head.add_likelihood(learned | {"rating_values": [1.0, 2.0, 3.0]})
    model.config.disco = {**model.config.disco, "likelihood": learned | {"rating_values": [1.0, 2.0, 3.0]}}
    model.add_epistemic(4)
    path = tmp_path_factory.mktemp("everything")
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(("to", "labels"), [("scalar", 1), ("two-logit", 2)])
def test_what_else_was_learned_is_left_out(to, labels, with_everything, tmp_path):
    export(with_everything, tmp_path / "out", to=to)
    assert_strictly_plain(tmp_path / "out", num_labels=labels)
    torch.testing.assert_close(
        logits(tmp_path / "out")[:, 0], expected(with_everything).location, rtol=1e-6, atol=1e-6
    )


def test_what_else_was_learned_stays_in_a_disco_checkpoint(with_everything, tmp_path):
    export(with_everything, tmp_path / "out", to="disco")
    found, source = (DiscoRewardModel.from_pretrained(path) for path in (tmp_path / "out", with_everything))
    assert found.config.disco == source.config.disco
    assert found.reward_head.state_dict().keys() == source.reward_head.state_dict().keys()


@pytest.mark.parametrize("architecture", SOME_ARCHITECTURES)
def test_scalar(architecture, sources, tmp_path):
    source, output = sources(architecture, "disco"), tmp_path / "out"
    report = export(source, output, to="scalar")
    assert_strictly_plain(output, num_labels=1)
    reward = expected(source)
    torch.testing.assert_close(logits(output)[:, 0], reward.location, rtol=1e-6, atol=1e-6)
    assert reward.location.std() > 0.01
    assert report.location_difference < 1e-5
    assert report.log_scale_difference is None

    # And back: a scalar reward model, with a fresh scale at the unit.
    again = expected(output)
    torch.testing.assert_close(again.location, reward.location, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again.scale, torch.full_like(again.scale, 2 / math.sqrt(math.pi)))


@pytest.mark.parametrize("architecture", SOME_ARCHITECTURES)
def test_two_logits(architecture, sources, tmp_path):
    source, output = sources(architecture, "disco"), tmp_path / "out"
    export(source, output, to="two-logit")
    assert_strictly_plain(output, num_labels=2)
    config = json.loads((output / "config.json").read_text())
    assert config["id2label"] == {"0": "location", "1": "raw_scale"}
    constants = config["reward_distribution"]

    reward = expected(source)
    assert reward.scale.log().std() > 0.01
    for (location, second), mu, sigma in zip(logits(output).tolist(), reward.location, reward.scale, strict=True):
        # The formula of the docs and of config.json, in a client's own words.
        raw = (second - constants["raw_scale_offset"]) / constants["max_log_scale"]
        scale = constants["unit_scale"] * math.exp(constants["max_log_scale"] * math.tanh(raw))
        assert location == pytest.approx(mu.item(), rel=1e-5, abs=1e-5)
        assert scale == pytest.approx(sigma.item(), rel=1e-5)
        by_text = eval(
            constants["formula"].split("scale = ")[1],
            {"exp": math.exp, "tanh": math.tanh, "logits": [location, second], **constants},
        )
        assert by_text == pytest.approx(scale, rel=1e-12)


def test_from_two_logits(sources, tmp_path):
    source = sources("llama", "disco", reward_family="cauchy")
    export(source, tmp_path / "out", to="two-logit")
    constants = AutoConfig.from_pretrained(tmp_path / "out").reward_distribution
    reward = from_two_logits(logits(tmp_path / "out"), constants)
    assert reward.family == constants["reward_family"] == "cauchy"
    torch.testing.assert_close(reward.location, expected(source).location, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reward.scale, expected(source).scale, rtol=1e-5, atol=0)
    # By hand, with an offset of 1: raw = 3 - 1 = 2; tanh(2 / 3) = 0.582783; 2 · exp(3 · 0.582783) = 11.4902.
    numbers = {"reward_family": "normal", "unit_scale": 2.0, "max_log_scale": 3.0, "raw_scale_offset": 1.0}
    reward = from_two_logits(torch.tensor([[0.5, 3.0]]), numbers)
    assert (reward.location.item(), reward.scale.item()) == (0.5, pytest.approx(11.4902, abs=1e-4))


@pytest.mark.parametrize("architecture", ["llama", "bert"])
@pytest.mark.parametrize("to", ["scalar", "two-logit", "disco"])
def test_an_adapter_is_merged(architecture, to, sources, tmp_path):
    source, output = sources(architecture, "adapter"), tmp_path / "out"
    report = export(source, output, to=to)
    assert not list(output.glob("adapter*"))
    reward = expected(source)
    torch.testing.assert_close(
        logits(output)[:, 0] if to != "disco" else expected(output).location, reward.location, rtol=1e-4, atol=1e-4
    )
    if to == "disco":
        torch.testing.assert_close(expected(output).scale, reward.scale, rtol=1e-4, atol=0)
    # The merged model is another one than the base with the adapter's head.
    bare = DiscoRewardModel.from_pretrained(source, dtype=torch.float32)
    with bare.disable_adapter():
        assert (score(bare, sequences(source)).location - reward.location).abs().max() > 1e-2
    assert 0 < report.location_difference < 1e-4


def test_a_qlora_adapter_is_merged_into_the_base_as_it_was(tmp_path, tiny_llama_dir):
    pytest.importorskip("bitsandbytes")
    config = AutoConfig.from_pretrained(tiny_llama_dir, hidden_size=64, intermediate_size=64, head_dim=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(tmp_path / "base")
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    trainer = disco_trainer(
        tmp_path / "adapter",
        model=str(tmp_path / "base"),
        train_dataset=preferences(),
        quantization_config=quantization,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        learning_rate=1e-2,
    )
    trainer.train()
    trainer.save_model()
    export(tmp_path / "adapter", tmp_path / "out", to="two-logit")
    reward = expected(tmp_path / "adapter")  # on the base in float32
    ours = from_two_logits(logits(tmp_path / "out"), AutoConfig.from_pretrained(tmp_path / "out").reward_distribution)
    torch.testing.assert_close(ours.location, reward.location, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.scale, reward.scale, rtol=1e-4, atol=0)
    # With the base in 4 bits, as the adapter was trained, it is close and not the same.
    direct = DiscoRewardModel.from_pretrained(tmp_path / "adapter", quantization_config=quantization, dtype="float32")
    difference = (score(direct, sequences(tmp_path / "adapter")).location - reward.location).abs().max()
    assert 1e-4 < difference < 0.5


def test_an_adapter_with_added_tokens(tmp_path, tiny_llama_dir):
    # TRL clones a chat template: the tokenizer grows by its tokens, and the embeddings with it.
    chat = build_tokenizer()
    chat.add_tokens(["<|turn|>"])
    chat.chat_template = "{% for message in messages %}<|turn|>{{ message['content'] }}{% endfor %}"
    chat.save_pretrained(tmp_path / "chat")
    trainer = disco_trainer(
        tmp_path / "adapter",
        model=tiny_llama_dir,
        train_dataset=preferences("conversational"),
        chat_template_path=str(tmp_path / "chat"),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        learning_rate=1e-2,
    )
    trainer.train()
    trainer.save_model()
    export(tmp_path / "adapter", tmp_path / "out", to="scalar")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == chat.chat_template
    ids = tokenize(tokenizer, [{"role": "user", "content": "the answer"}])
    assert tokenizer.convert_tokens_to_ids("<|turn|>") == ids[0] == len(build_tokenizer())
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    (live, exported) = (score(model, [ids]).location for model in (trainer.model, stock))
    torch.testing.assert_close(exported, live, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ["scalar", "disco"])
def test_bfloat16(to, sources, tmp_path):
    source, output = sources("llama", "disco"), tmp_path / "out"
    report = export(source, output, to=to, dtype="bfloat16")
    dtypes = {name: tensor.dtype for name, tensor in load_file(output / "model.safetensors").items()}
    assert {dtype for name, dtype in dtypes.items() if not name.startswith("score.")} == {torch.bfloat16}
    assert dtypes["score.weight"] == (torch.float32 if to == "disco" else torch.bfloat16)
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    assert report.location_difference < 1e-4 < report.location_rounding < 0.05
    assert "run in bfloat16, against the source in float32: location" in str(report)
    reward = expected(source)
    got = (
        logits(output)[:, 0] if to == "scalar" else score(DiscoRewardModel.from_pretrained(output), sequences(source))
    )
    torch.testing.assert_close(got if to == "scalar" else got.location, reward.location, rtol=0, atol=0.05)


def test_a_scalar_reward_model(sources, tmp_path):
    source = sources("llama", "scalar")
    export(source, tmp_path / "out", to="scalar")
    assert_strictly_plain(tmp_path / "out", num_labels=1)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), rtol=1e-6, atol=1e-6)


def test_a_scalar_adapter(sources, tmp_path):
    # Made without disco-trl; its directory has no tokenizer, so the base's goes along.
    with torch.random.fork_rng():
        torch.manual_seed(4)
        stock = AutoModelForSequenceClassification.from_pretrained(sources("llama", "base"), num_labels=1)
        model = get_peft_model(stock, LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out", to="scalar")
    assert_strictly_plain(tmp_path / "out", num_labels=1)
    reward = score(model, sequences(tmp_path / "out"))
    torch.testing.assert_close(logits(tmp_path / "out")[:, 0], reward.location, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"its scale is fixed at 0\.7"):
        export(tmp_path / "adapter", tmp_path / "other", to="two-logit")


def test_a_fixed_scale(sources, tmp_path):
    source = sources("llama", "disco", reward_family="logistic", fixed_scale=0.5)
    export(source, tmp_path / "scalar", to="scalar")
    torch.testing.assert_close(logits(tmp_path / "scalar")[:, 0], expected(source).location, rtol=1e-6, atol=1e-6)
    export(source, tmp_path / "disco", to="disco")
    assert expected(tmp_path / "disco").scale.tolist() == [0.5] * len(TEXTS)


@pytest.fixture(scope="module")
def with_layer(sources, tmp_path_factory):
    """`with_layer(architecture, is_constant)`: a model whose scale reads a middle layer, trained or left constant."""

    def make(architecture: str, is_constant: bool) -> str:
        path = tmp_path_factory.mktemp("layer")
        model = DiscoRewardModel.from_pretrained(sources(architecture, "base"))
        model.set_scale_layer(1)
        randomize_heads(model)
        if is_constant:
            model.scale_head.weight.data.zero_()
        model.save_pretrained(path)
        build_tokenizer().save_pretrained(path)
        return str(path)

    return make


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_scale_of_a_middle_layer(architecture, with_layer, tmp_path):
    source = with_layer(architecture, is_constant=False)
    reward = expected(source)
    assert reward.scale.log().std() > 1e-3
    export(source, tmp_path / "scalar", to="scalar")
    torch.testing.assert_close(logits(tmp_path / "scalar")[:, 0], reward.location, rtol=1e-6, atol=1e-6)
    report = export(source, tmp_path / "disco", to="disco")
    assert not report.constant_scales
    torch.testing.assert_close(expected(tmp_path / "disco").scale, reward.scale, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"its scale reads the mean hidden state of layer 1 .*--to disco"):
        export(source, tmp_path / "two", to="two-logit")


@pytest.mark.parametrize("has_layer", [True, False])
def test_a_scale_that_training_has_left_constant(has_layer, with_layer, sources, tmp_path):
    """A result of training (C10): it goes into every form, and a line says so."""
    source = with_layer("llama", is_constant=True)
    if not has_layer:
        source = tmp_path / "source"
        model = randomize_heads(DiscoRewardModel.from_pretrained(sources("llama", "base")))
        model.scale_head.weight.data.zero_()
        model.save_pretrained(source)
        build_tokenizer().save_pretrained(source)
    unit = 2 / math.sqrt(math.pi)
    reward = expected(source)
    assert reward.scale.tolist() == pytest.approx([unit] * len(TEXTS))
    for to in ("disco", "two-logit"):
        report = export(source, tmp_path / to, to=to)
        assert report.constant_scales == {"overall": pytest.approx(unit)}
        assert "the scale is 1.12838 for all answers" in str(report)
    torch.testing.assert_close(expected(tmp_path / "disco").scale, reward.scale, rtol=1e-6, atol=0)
    assert DiscoRewardModel.from_pretrained(tmp_path / "disco").scale_layer == (1 if has_layer else None)
    constants = AutoConfig.from_pretrained(tmp_path / "two-logit").reward_distribution
    ours = from_two_logits(logits(tmp_path / "two-logit"), constants)
    torch.testing.assert_close(ours.location, reward.location, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.scale, reward.scale, rtol=1e-6, atol=0)
    assert "for all answers" not in str(export(source, tmp_path / "scalar", to="scalar"))


@pytest.mark.parametrize("to", ["two-logit", "disco"])
def test_a_scale_that_no_training_has_seen(to, sources, tmp_path):
    model = randomize_heads(DiscoRewardModel.from_pretrained(sources("llama", "base")))
    model.scale_head.weight.data.zero_()
    model.scale_head.rows_seen.zero_()
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"weight is zero and no answers have trained it; use --to scalar"):
        export(tmp_path / "source", tmp_path / "out", to=to)


def test_pipelines_apply_no_softmax(sources, tmp_path):
    export(sources("llama", "disco"), tmp_path / "out", to="two-logit")
    text = TEXTS[1] + "<|im_end|>"  # as in training
    (answer,) = transformers.pipeline("text-classification", str(tmp_path / "out"), device="cpu")([text], top_k=None)
    scores = {label["label"]: label["score"] for label in answer}
    location, raw = logits(tmp_path / "out")[1].tolist()
    assert scores == {"location": pytest.approx(location, abs=1e-5), "raw_scale": pytest.approx(raw, abs=1e-5)}


def test_the_padding_token_comes_from_the_tokenizer(sources, tmp_path):
    source = edited_copy(sources("llama", "disco"), tmp_path / "source", config={"pad_token_id": None})
    export(source, tmp_path / "out", to="scalar")
    assert AutoConfig.from_pretrained(tmp_path / "out").pad_token_id == build_tokenizer().pad_token_id


# What is refused


@pytest.mark.parametrize(
    ("kind", "settings", "to", "message"),
    [
        ("disco", {"fixed_scale": 0.5}, "two-logit", r"its scale is fixed at 0\.5.*use --to scalar"),
        ("scalar", {}, "two-logit", r"its scale is fixed at 0\.7.*use --to scalar"),
        ("base", {}, "scalar", r"language model without a reward head"),
        ("disco", {}, "onnx", r"to='onnx' is unknown; choose one of 'scalar', 'two-logit', 'attributes', 'disco'"),
    ],
)
def test_what_cannot_be_exported(kind, settings, to, message, sources, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(sources("llama", kind, **settings), tmp_path / "out", to=to)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_changes_no_weights(sources, tmp_path):
    model = DiscoRewardModel.from_pretrained(sources("llama", "disco"))
    peft_model = get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    source = save_adapter(peft_model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"a PROMPT_TUNING adapter does not change weights, so it cannot be merged"):
        export(source, tmp_path / "out", to="scalar")


def test_no_tokenizer(sources, tmp_path):
    DiscoRewardModel.from_pretrained(sources("llama", "disco")).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"has no tokenizer.*save it there"):
        export(tmp_path / "source", tmp_path / "out", to="scalar")


def test_an_output_in_use(sources, tmp_path):
    source, output = sources("llama", "disco"), tmp_path / "out"
    output.mkdir()
    export(source, output, to="disco")  # an empty folder is free
    with pytest.raises(ValueError, match=r"out is not empty; .*--overwrite"):
        export(source, output, to="scalar")
    assert DiscoRewardModel.from_pretrained(output).scale_head.weight.any()
    export(source, output, to="scalar", overwrite=True)
    assert_strictly_plain(output, num_labels=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    other = tmp_path / "photographs"
    other.mkdir()
    (other / "one.jpg").touch()
    with pytest.raises(ValueError, match=r"holds no model \(no config\.json\), so it is not replaced"):
        export(source, other, to="scalar", overwrite=True)
    adapter, base = sources("llama", "adapter"), sources("llama", "base")
    for model, same in ((source, source), (source, Path(source).parent), (adapter, base)):
        with pytest.raises(ValueError, match=r"is where the model itself is, or its adapter's base"):
            export(model, same, to="scalar", overwrite=True)
    assert (Path(base) / "model.safetensors").exists()


# The proof


@pytest.mark.parametrize(
    ("to", "key", "change"),
    [
        ("scalar", "score.weight", 1e-2),
        ("two-logit", "score.weight", 1e-2),
        ("disco", "score.scale.mean_hidden", 1e-1),
        ("scalar", "model.layers.1.mlp.up_proj.weight", 1e-1),
    ],
)
def test_a_failed_proof_leaves_nothing(to, key, change, sources, tmp_path, monkeypatch):
    """Files that are damaged before they are read again."""
    source, output = sources("llama", "disco"), tmp_path / "out"
    export(source, output, to="scalar")
    before = (output / "model.safetensors").read_bytes()
    write = export_module._write

    def write_with_damage(model, folder, *args):
        write(model, folder, *args)
        state = load_file(folder / "model.safetensors")
        state[key] = state[key] + change
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export_module, "_write", write_with_damage)
    with pytest.raises(ProofError, match=r"the reloaded model does not give the rewards of its source: \w+.* differ"):
        export(source, output, to=to, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (output / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("to", "extra"), [("scalar", "score.scale.weight"), ("two-logit", "lm_head.weight")])
def test_files_that_a_strict_loader_would_not_take(to, extra, sources, tmp_path, monkeypatch):
    write = export_module._write

    def write_more(model, folder, *args):
        write(model, folder, *args)
        state = load_file(folder / "model.safetensors") | {extra: torch.zeros(1, 64)}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export_module, "_write", write_more)
    with pytest.raises(ProofError, match=rf"does not take the files as they are: .*unexpected_keys.*{extra}"):
        export(sources("llama", "disco"), tmp_path / "out", to=to)
    assert not list(tmp_path.iterdir())


def test_float16_that_overflows(sources, tmp_path):
    model = DiscoRewardModel.from_pretrained(sources("llama", "disco"))
    with torch.no_grad():
        model.model.norm.weight.mul_(1e6)
        head_of(model).weight.mul_(1e-6)
        head_of(model).scale.weight.mul_(1e-6)
    model.save_pretrained(tmp_path / "source")
    build_tokenizer().save_pretrained(tmp_path / "source")
    export(tmp_path / "source", tmp_path / "fine", to="scalar", dtype="bfloat16")
    with pytest.raises(ProofError, match=r"in float16 its rewards are not finite.*use bfloat16"):
        export(tmp_path / "source", tmp_path / "out", to="scalar", dtype="float16")
    assert not (tmp_path / "out").exists()


# The command


def test_the_command(sources, tmp_path, capsys):
    arguments = ["export", sources("llama", "adapter"), str(tmp_path / "out"), "--to", "two-logit"]
    main(arguments)
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: LlamaForSequenceClassification, float32: loads in the plain way" in printed
    assert "largest difference on 6 texts" in printed
    assert ", log scale " in printed
    with pytest.raises(SystemExit, match=r"disco-trl export: .*is not empty"):
        main(arguments)
    main([*arguments, "--overwrite", "--dtype", "bfloat16"])
    with pytest.raises(SystemExit, match=r"disco-trl export: .*nowhere"):
        main(["export", str(tmp_path / "nowhere"), str(tmp_path / "other"), "--to", "scalar"])
