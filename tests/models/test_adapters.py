"""Adapters after training: their tokens and padding come back with them, and families do not mix.

Each adapter here comes from the trainer, and each number is compared with the live model that was saved. Before that,
every kind of adapter that PEFT knows is tried: it is right, or refused.
"""

import inspect
import json
from pathlib import Path

import pytest
import torch
from conftest import build_tokenizer
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny_models import edited_copy
from tiny_training import disco_trainer, preferences
from tokenizers import AddedToken
from transformers import AutoTokenizer

from disco_trl import DiscoReward, DiscoRewardModel
from disco_trl.data.tokenization import tokenize
from disco_trl.models.adapters import ADAPTER_SETTINGS_FILE, save_reward_head
from disco_trl.models.inference import score


CONVERSATION = [
    {"role": "user", "content": "what is the best answer"},
    {"role": "assistant", "content": "a short one"},
]


def rewards(model, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    reward = score(model, [tokenize(tokenizer, CONVERSATION), tokenize(tokenizer, CONVERSATION[:1])])
    return reward.location, reward.scale


def assert_same_rewards(one, other, tokenizer) -> None:
    for ours, theirs in zip(rewards(one, tokenizer), rewards(other, tokenizer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


# Every kind of adapter

SMALLER = {"r": 2, "block_size": 8, "group_size": 8, "vector_length": 8, "num_vectors": 16, "n_frequency": 8}
NEEDED = {"num_virtual_tokens": 3, "encoder_hidden_size": 8, "adapter_len": 3, "adapter_layers": 1, "num_tasks": 2}
REFUSED = {
    "ADAPTION_PROMPT": "neither trains nor saves the reward head",
    "CARTRIDGE": "past_key_values",
    "CPT": "causal language models only",
    "LILY": "a reward would depend on the other rows",
    "MULTITASK_PROMPT_TUNING": "task id",
    "POLY": "task id",
    "PREFIX_TUNING": "past_key_values",
    "TRAINABLE_TOKENS": "neither trains nor saves the reward head",
    "XLORA": "neither trains nor saves the reward head",
}


def small_config(kind: str) -> PeftConfig:
    make = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    required = {"ADALORA": {"total_step": 10}, "CPT": {"task_type": "CAUSAL_LM", "cpt_token_ids": [3]}}
    config = make(**required.get(kind, {}))
    for name, value in (SMALLER | NEEDED).items():
        default = getattr(config, name, 0)
        if hasattr(config, name) and (default is None) == (name in NEEDED):
            setattr(config, name, value)
    if hasattr(config, "target_modules") and kind not in ("IA3", "SHADOW"):  # those target layers of other kinds
        config.target_modules = ["q_proj"]
    if kind == "OFT":
        config.r = 0  # its block size, which is set, says it
    return config


@pytest.mark.parametrize("kind", sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
def test_a_reward_does_not_depend_on_the_other_rows(kind, tiny_llama_dir):
    """With each kind of adapter the head is trained and saved, and a text has one reward, or the kind is refused."""
    model, config = DiscoRewardModel.from_pretrained(tiny_llama_dir), small_config(kind)
    takes_prefixes = "past_key_values" in inspect.signature(model.forward).parameters  # until transformers 5.23
    if kind in REFUSED and not (takes_prefixes and REFUSED[kind] == "past_key_values"):
        with pytest.raises(ValueError, match=rf"an adapter of the kind {kind}: .*{REFUSED[kind]}.*use LoRA"):
            save_reward_head(config, model)
        return
    save_reward_head(config, model)
    adapted = get_peft_model(model, config).eval()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.values():  # many adapters begin with no effect
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    assert any("score" in name for name in trained) and any("score" not in name for name in trained)
    assert {"base_model.model.score.weight", "base_model.score.weight"} & get_peft_model_state_dict(adapted).keys()
    pad = model.config.pad_token_id
    ids = torch.tensor([[5, 6, 7, 8, 9], [11, 12, pad, pad, pad]])
    with torch.no_grad():
        together = adapted(input_ids=ids, attention_mask=ids.ne(pad).long())
        alone = adapted(input_ids=ids[1:, :2], attention_mask=torch.ones(1, 2, dtype=torch.long))
    torch.testing.assert_close(together.logits[1:], alone.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.scale[1:], alone.scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "peft_config",
    [PromptTuningConfig(num_virtual_tokens=3), PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16)],
    ids=lambda config: config.peft_type,
)
def test_a_learned_prompt_gives_a_text_one_reward(peft_config, tmp_path, tiny_llama_dir):
    trainer = disco_trainer(
        tmp_path, model=tiny_llama_dir, train_dataset=preferences(), peft_config=peft_config, learning_rate=5e-2
    )
    trainer.train()
    trainer.save_model()
    reward = DiscoReward(str(tmp_path))
    prompts, answers = ["the answer ", "people ", "a film "], ["is short", "like this film a lot and learn", "day"]
    together = reward(prompts, answers)
    alone = [reward([prompt], [answer])[0] for prompt, answer in zip(prompts, answers, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert max(together) - min(together) > 1e-2


# Tokens that training added


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory) -> str:
    """A tokenizer whose chat template needs two tokens that the tests' Llama does not have."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True), AddedToken("<|end|>", special=True)])
    tokenizer.eos_token = "<|end|>"
    tokenizer.chat_template = (
        "{% for message in messages %}<|turn|>{{ message['role'] }} {{ message['content'] }}<|end|>{% endfor %}"
    )
    path = tmp_path_factory.mktemp("chat")
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module", params=["full", "lora"])
def resized(request, tmp_path_factory, tiny_llama_dir, chat_dir):
    """A trainer that has added the chat template's tokens, trained and saved, and where it did."""
    path = tmp_path_factory.mktemp(f"resized-{request.param}")
    peft_config = LoraConfig(r=2, target_modules="all-linear") if request.param == "lora" else None
    trainer = disco_trainer(
        path,
        model=tiny_llama_dir,
        train_dataset=preferences("conversational"),
        chat_template_path=chat_dir,
        peft_config=peft_config,
        learning_rate=1e-2,
    )
    trainer.train()
    trainer.save_model()
    return trainer, path


def test_added_tokens_survive(resized):
    trainer, path = resized
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == 448  # TRL rounds 395 up to a multiple of 64
    assert tokenizer.convert_tokens_to_ids("<|turn|>") in tokenize(tokenizer, CONVERSATION)
    loaded = DiscoRewardModel.from_pretrained(path)
    assert len(loaded.get_input_embeddings().weight) == loaded.config.vocab_size == 448
    assert_same_rewards(loaded, trainer.model, tokenizer)


@pytest.mark.parametrize("resized", ["lora"], indirect=True)
def test_an_adapter_without_the_embeddings_that_it_trained(resized, tmp_path):
    # So PEFT saves it where it cannot see the base's config: offline, with a base on the Hub. The rows of the added
    # tokens are trained and hence saved for themselves, and there is no other new row.
    trainer, path = resized
    trainer.model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = DiscoRewardModel.from_pretrained(tmp_path)
    assert_same_rewards(loaded, trainer.model, AutoTokenizer.from_pretrained(path))

    config_file = tmp_path / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["trainable_token_indices"]["embed_tokens"].remove(400)
    config_file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"at least 448 tokens, its base model .* has 393.*such as 400.*not saved"):
        DiscoRewardModel.from_pretrained(tmp_path)


def test_added_tokens_survive_qlora(tmp_path, tiny_llama_dir, chat_dir):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    config = AutoConfig.from_pretrained(tiny_llama_dir, hidden_size=64, intermediate_size=64, head_dim=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(tmp_path / "base")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    trainer = disco_trainer(
        tmp_path / "adapter",
        model=str(tmp_path / "base"),
        train_dataset=preferences("conversational"),
        chat_template_path=chat_dir,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        quantization_config=four_bits,
        max_steps=1,
    )
    trainer.train()
    trainer.save_model()
    loaded = DiscoRewardModel.from_pretrained(tmp_path / "adapter", quantization_config=four_bits, dtype="float32")
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in loaded.modules())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    for ours, theirs in zip(rewards(loaded, tokenizer), rewards(trainer.model, tokenizer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)  # training keeps the adapter in bfloat16


# The padding token, by which the last token is found


def test_an_adapter_pads_as_it_was_trained(tmp_path, tiny_llama_dir):
    base = edited_copy(tiny_llama_dir, tmp_path / "base", config={"pad_token_id": 7})
    trainer = disco_trainer(
        tmp_path / "adapter", model=base, train_dataset=preferences(), peft_config=LoraConfig(r=2), max_steps=1
    )
    trainer.train()
    trainer.save_model()
    loaded = DiscoRewardModel.from_pretrained(tmp_path / "adapter")
    assert loaded.config.pad_token_id == trainer.processing_class.pad_token_id != 7
    assert_same_rewards(loaded, trainer.model, trainer.processing_class)


# One family


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_llama_dir) -> dict[str, str]:
    """Adapters of one base model: two normal ones, a Cauchy one and one of a fixed scale."""
    paths = {}
    for name, settings in {
        "normal": {},
        "other normal": {"data_seed": 1, "learning_rate": 3e-2},
        "cauchy": {"reward_family": "cauchy"},
        "fixed": {"reward_family": "normal", "fixed_scale": 2.0},
    }.items():
        path = tmp_path_factory.mktemp(name.replace(" ", "-"))
        trainer = disco_trainer(
            path,
            model=tiny_llama_dir,
            train_dataset=preferences("conversational"),
            peft_config=LoraConfig(r=2),
            **{"learning_rate": 1e-2, "max_steps": 2, "scale_training": "joint", "calibrate": False} | settings,
        )
        trainer.train()
        trainer.save_model()
        paths[name] = str(path)
    return paths


@pytest.mark.parametrize(
    ("own", "other", "named"),
    [
        ("normal", "cauchy", r"reward_family='cauchy', fixed_scale=None.*reward_family='normal', fixed_scale=None"),
        ("cauchy", "normal", r"reward_family='normal', fixed_scale=None.*reward_family='cauchy', fixed_scale=None"),
        ("normal", "fixed", r"reward_family='normal', fixed_scale=2\.0.*reward_family='normal', fixed_scale=None"),
    ],
)
def test_adapters_of_different_families_are_not_put_together(own, other, named, adapters):
    model = DiscoRewardModel.from_pretrained(adapters[own])
    with pytest.raises(ValueError, match=rf"the adapter was trained with {named}.*cannot be compared or merged"):
        model.load_adapter(adapters[other], adapter_name="other")
    assert list(model.peft_config) == ["default"]  # it was not let in
    with pytest.raises(ValueError, match=r"Adapter other does not exist"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mixture")


def test_nor_in_a_model_that_the_trainer_wrapped(adapters, tmp_path, tiny_llama_dir):
    trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences(), peft_config=LoraConfig(r=2))
    with pytest.raises(ValueError, match=r"reward_family='cauchy'.*reward_family='normal'"):
        trainer.model.load_adapter(adapters["cauchy"], "other")


def test_an_adapter_of_no_known_family_is_not_let_in(adapters, tmp_path):
    path = Path(edited_copy(adapters["cauchy"], tmp_path / "x"))
    (path / ADAPTER_SETTINGS_FILE).unlink()
    model = DiscoRewardModel.from_pretrained(adapters["normal"])
    with pytest.raises(ValueError, match=rf"holds a scale, but {ADAPTER_SETTINGS_FILE}.*is missing"):
        model.load_adapter(path, "other")


def test_adapters_of_one_family_take_turns(adapters, tiny_tokenizer):
    model = DiscoRewardModel.from_pretrained(adapters["normal"])
    assert isinstance(model, PeftModel)
    assert type(model).__name__ == "PeftModelForSequenceClassification"
    alone = {
        name: rewards(DiscoRewardModel.from_pretrained(adapters[name]), tiny_tokenizer)
        for name in ("normal", "other normal")
    }
    for one, other in zip(*alone.values(), strict=True):  # location and scale: the two adapters do differ in both
        assert (one - other).abs().min() > 1e-4
    model.load_adapter(adapters["other normal"], adapter_name="other")
    for active, name in (("default", "normal"), ("other", "other normal"), ("default", "normal")):
        model.set_adapter(active)
        for ours, expected in zip(rewards(model, tiny_tokenizer), alone[name], strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_each_adapter_is_saved_with_its_family(adapters, tmp_path):
    model = DiscoRewardModel.from_pretrained(adapters["cauchy"])
    model.load_adapter(adapters["cauchy"], adapter_name="other")
    model.save_pretrained(tmp_path / "both")
    model.save_pretrained(tmp_path / "one", selected_adapters=["default"])
    for path in ("both", "both/other", "one"):  # PEFT gives every adapter but "default" a folder of its own
        assert DiscoRewardModel.from_pretrained(tmp_path / path).config.disco["reward_family"] == "cauchy"
    assert not (tmp_path / "one" / "other").exists()
