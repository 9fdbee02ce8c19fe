"""A policy on a forest: what TRL reads of a padded batch, token by token, and training with and without sharing."""

import logging
import re

import pytest
import torch
from dpo_training import disco_dpo_trainer
from peft import LoraConfig
from tiny_training import furthest, logged, preferences, weights
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from trl.trainer import utils

from disco_trl.data.dpo_collator import DataCollatorForDiscoDPO
from disco_trl.models.policy import PER_TOKEN, run_on_forests
from disco_trl.models.prefix_sharing import prepare


pytestmark = pytest.mark.skipif(
    not hasattr(utils, "add_fused_lm_head"), reason="TRL has a fused LM head since release 1.15"
)
STEPS = 20
GRADIENT_DESCENT = {"max_steps": STEPS, "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant"}
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
EXAMPLES = [
    {"prompt_ids": [3, 4, 5, 6, 7], "chosen_ids": [8, 9, 2], "rejected_ids": [10, 2]},
    # Answers that begin alike, an answer that the other one continues, and one that ends like padding
    {"prompt_ids": [3, 4, 5, 9], "chosen_ids": [11, 12, 13], "rejected_ids": [11, 12, 14, 15, 2]},
    {"prompt_ids": [20], "chosen_ids": [21, 22, 0], "rejected_ids": [21]},
    {"prompt_ids": [], "chosen_ids": [21, 22, 30], "rejected_ids": [21, 5]},
]


def run(model, batch: dict[str, torch.Tensor]):
    given = {name: tensor for name, tensor in batch.items() if name != "completion_mask"}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return model(**given, labels=labels, use_cache=False, fused_lm_head=True)


@pytest.mark.parametrize("truncated", [{}, {"max_length": 6}, {"max_length": 5, "truncation_mode": "keep_end"}])
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 5.0, "sliding_window": 4, "head_dim": 16}),
        ("gpt2", {"n_head": 2}),
    ],
)
def test_each_token_is_that_of_the_padded_batch(model_type, sizes, truncated):
    config = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = {"n_embd": 32, "n_layer": 2} if model_type == "gpt2" else {**config, "num_key_value_heads": 2}
    torch.manual_seed(0)
    more = {**names, **sizes, "vocab_size": 40, "initializer_range": 0.3, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **more)).eval()
    utils.add_fused_lm_head(model, outputs=PER_TOKEN)
    padded = DataCollatorForDiscoDPO(pad_token_id=0, **truncated)(EXAMPLES)
    forest = DataCollatorForDiscoDPO(pad_token_id=0, share_prefixes=True, **truncated)(EXAMPLES)
    expected = run(model, padded)
    expected.log_probs[0].sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()

    assert prepare(model) is None
    run_on_forests(model)
    found = run(model, forest)
    for name in PER_TOKEN:
        assert found[name].shape == expected[name].shape
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
    found.log_probs[0].sum().backward()
    shared = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    torch.testing.assert_close(shared, gradients, atol=1e-5, rtol=1e-4)
    # What is generated, and what is not for the fused head, goes the way it went.
    ids = torch.tensor([[3, 4, 5]])
    assert model(ids).logits.shape == (1, 3, 40)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] <= 5


def test_the_row_holds_each_token_once():
    batch = DataCollatorForDiscoDPO(pad_token_id=0, pad_to_multiple_of=1, share_prefixes=True)(EXAMPLES[:2])
    # The prompts begin alike, and so do the answers to the second one.
    assert batch["forest_ids"].shape[1] == 3 + (2 + 3 + 2) + (1 + 2 + 1 + 3)
    assert len(batch["places"]) == sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in EXAMPLES[:2])


def train(folder, sharing: bool, **options):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        data = {"train_dataset": preferences("conversational", rows=24), "eval_dataset": preferences(rows=5, seed=1)}
        trainer = disco_dpo_trainer(
            folder / str(sharing), **{**data, **GRADIENT_DESCENT, "prefix_sharing": sharing, **options}
        )
        assert trainer.data_collator.share_prefixes is sharing
        start = weights(trainer.model)
        trainer.train()
        trainer.evaluate()
    return trainer, start


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"peft_config": LoraConfig(**LORA)},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "peft_config": LoraConfig(**LORA)},
        {"precompute_ref_log_probs": True},
        {"ld_alpha": 0.5, "loss_type": ["sigmoid", "sft"]},
        {"max_length": 24},
        {"optim": "adamw_torch", "learning_rate": 1e-3, "sync_ref_model": True, "ref_model_sync_steps": 5},
    ],
    ids=lambda options: "-".join(options) or "full",
)
def test_training_is_that_without_sharing(tmp_path, sharp_llama_dir, options):
    (shared, start), (plain, plain_start) = (
        train(tmp_path, sharing, model=sharp_llama_dir, **options) for sharing in (True, False)
    )
    assert furthest(start, plain_start) == 0
    logs = list(zip(logged(shared), logged(plain), strict=True))
    assert sum("loss" in log for _, log in logs) == STEPS
    for step, (log, plain_log) in enumerate(logs):
        # In the first step policy and reference are the same, and rounding alone decides which answer is ahead.
        names = [name for name in plain_log if step or "accurac" not in name]
        assert {name: log[name] for name in names} == pytest.approx(
            {name: plain_log[name] for name in names}, abs=2e-4, rel=2e-4
        )
    moved = furthest(weights(plain.model), start)
    assert furthest(weights(shared.model), weights(plain.model)) < 1e-3 * moved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reference_in_half_precision(tmp_path, sharp_llama_dir, dtype):
    """accelerate wraps it in autocast, and makes float32 of what it returns, which has the rounding of bfloat16."""
    options = {"model": sharp_llama_dir, "bf16": True, "model_init_kwargs": {"dtype": dtype}, "max_steps": 2}
    trainer, _ = train(tmp_path, True, **options)
    assert trainer.ref_model is not None and trainer.data_collator.share_prefixes


def test_a_quantized_policy(tmp_path, sharp_llama_dir):
    quantized = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
    options = {"model": sharp_llama_dir, "peft_config": LoraConfig(**LORA), **quantized, "max_steps": 4}
    (shared, _), (plain, _) = (train(tmp_path, sharing, **options) for sharing in (True, False))
    for log, plain_log in zip(logged(shared), logged(plain), strict=True):
        assert log == pytest.approx(plain_log, abs=5e-2, rel=5e-2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"torch_compile": True}, "each shape of a batch would be compiled anew"),
        ({"data_collator": DataCollatorForDiscoDPO(pad_token_id=0)}, "a data_collator of your own"),
        ({"model": "bloom"}, "its layers do not all attend|it does not|attention implementation"),
    ],
)
def test_what_cannot_share_says_so(tmp_path, tiny_llama_dir, tiny_tokenizer, caplog, options, reason):
    if "model" in options:
        options = {"model": random_policy(len(tiny_tokenizer)), "processing_class": tiny_tokenizer}
        options["ref_model"] = random_policy(len(tiny_tokenizer))
    with caplog.at_level(logging.WARNING):
        disco_dpo_trainer(tmp_path, **{"model": tiny_llama_dir, "train_dataset": preferences(), **options})
    said = [record.getMessage() for record in caplog.records if "prefix_sharing is off" in record.getMessage()]
    assert len(said) == 1 and re.search(reason, said[0])


def random_policy(vocabulary: int):
    """A model with a bias by distance in the place of positions, which does not take a forest."""
    config = AutoConfig.for_model("bloom", vocab_size=vocabulary, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config)


def test_a_policy_that_can_says_nothing(tmp_path, tiny_llama_dir, caplog):
    with caplog.at_level(logging.WARNING):
        disco_dpo_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences("conversational"))
    assert "prefix_sharing" not in caplog.text
