"""Training with prefix sharing is training without it: losses, evaluation and weights of whole runs, option by option.

Every run is 20 steps on the CPU, twice, with `prefix_sharing` on and off and all else the same. In float32 nothing
differs but the order of sums. What that amounts to is told beside what training changed: after plain gradient descent
the two ends are :data:`TOLERANCE` of the way from the start apart at most (1e-5 is usual). AdamW divides each gradient
by its size, and so makes a part of a step of the rounding of a small one: there a thousandth of the way is allowed.
"""

import contextlib
import logging
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from forests import pairs, random_model
from peft import LoraConfig, PromptTuningConfig
from tiny_models import PAD, SCALE_STATE
from tiny_training import disco_trainer, furthest, logged, preferences, weights
from transformers import BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer

from disco_trl.models.prefix_sharing import prepare


TOLERANCE = 2e-4
STEPS = 20
GRADIENT_DESCENT = {"max_steps": STEPS, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3}
LORA = {"r": 4, "target_modules": "all-linear"}


def train(folder, sharing: bool, **options):
    """A finished run, and the weights that it started from."""
    # What reads no model from a path gets one of its own.
    if callable(options["model"]):
        options["model"] = options["model"]()
    with torch.random.fork_rng():
        trainer = disco_trainer(
            folder / f"sharing-{sharing}",
            prefix_sharing=sharing,
            **{"train_dataset": pairs(), **GRADIENT_DESCENT, **options},
        )
        assert trainer.data_collator.share_prefixes is sharing
        start = weights(trainer.model)
        trainer.train()
    return trainer, start


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Between all that two models have learned: not the moments of the rows they saw, which move further."""
    assert one.keys() == other.keys()
    names = [name for name in one if one[name].is_floating_point() and not name.endswith(SCALE_STATE[1:])]
    return torch.stack([(one[name].double() - other[name].double()).norm() for name in names]).norm().item()


def assert_same_training(folder, tolerance: float = TOLERANCE, log_tolerance: float = 1e-4, **options):
    """Returns both trainers."""
    (shared, start), (plain, plain_start) = (train(folder, sharing, **options) for sharing in (True, False))
    assert furthest(start, plain_start) == 0
    logs, plain_logs = (logged(trainer) for trainer in (shared, plain))
    assert sum("loss" in log for log in plain_logs) == plain.state.max_steps
    for log, plain_log in zip(logs, plain_logs, strict=True):
        assert log.keys() == plain_log.keys()
        # Of the tokens those that were computed are counted.
        names = [name for name in log if not name.endswith("num_tokens")]
        expected = {name: plain_log[name] for name in names}
        assert {name: log[name] for name in names} == pytest.approx(expected, rel=log_tolerance, abs=log_tolerance)
        assert all(log[name] < plain_log[name] for name in log if name.endswith("num_tokens"))
    way = distance(weights(plain.model), start)
    assert way > 0.01
    ends = [weights(trainer.model) for trainer in (shared, plain)]
    assert distance(*ends) < tolerance * way
    for name in ends[0]:
        if name.endswith(SCALE_STATE[1:]):
            torch.testing.assert_close(ends[0][name], ends[1][name], rtol=log_tolerance, atol=log_tolerance)
    return shared, plain


# The run itself


def test_gradient_descent(tmp_path, sharp_llama_dir):
    shared, _ = assert_same_training(tmp_path, model=sharp_llama_dir)
    losses = [log["loss"] for log in logged(shared) if "loss" in log]
    assert np.ptp(losses) > 0.1


def test_adamw(tmp_path, sharp_llama_dir):
    assert_same_training(tmp_path, tolerance=1e-3, log_tolerance=1e-3, model=sharp_llama_dir, **ADAMW)


@pytest.mark.parametrize(
    ("model_type", "implementation", "sizes"),
    [
        ("qwen2", "sdpa", {}),
        ("qwen3", "eager", {}),
        ("mistral", "sdpa", {"sliding_window": 4}),
        ("gemma2", "eager", {"sliding_window": 4, "query_pre_attn_scalar": 8}),
        ("gemma3_text", "sdpa", {"sliding_window": 4, "query_pre_attn_scalar": 8}),
        ("phi3", "sdpa", {}),
        ("gpt2", "sdpa", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96}),
        ("opt", "sdpa", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
        ("mixtral", "sdpa", {"num_local_experts": 2}),
    ],
)
def test_architectures(tmp_path, tiny_tokenizer, model_type, implementation, sizes):
    tiny_tokenizer.pad_token_id = PAD
    assert_same_training(
        tmp_path,
        model=lambda: random_model(model_type, implementation, **sizes),
        processing_class=tiny_tokenizer,
        learning_rate=0.01,
    )


# Wrappers


def test_lora(tmp_path, sharp_llama_dir):
    assert_same_training(tmp_path, model=sharp_llama_dir, peft_config=LoraConfig(**LORA))


def test_dora(tmp_path, sharp_llama_dir):
    assert_same_training(tmp_path, model=sharp_llama_dir, peft_config=LoraConfig(**LORA, use_dora=True))


def test_lora_whose_dropout_trl_turns_off(tmp_path, sharp_llama_dir):
    """`disable_dropout`, on by default in TRL's `RewardConfig`, is for adapters too."""
    assert_same_training(tmp_path, model=sharp_llama_dir, peft_config=LoraConfig(**LORA, lora_dropout=0.5))


def test_lora_with_dropout_runs(tmp_path, sharp_llama_dir):
    """Not the same noise, as there are not as many tokens to draw it for; so only the sort of run is the same."""
    options = {"peft_config": LoraConfig(**LORA, lora_dropout=0.2), "disable_dropout": False}
    (shared, start), (plain, _) = (
        train(tmp_path, sharing, model=sharp_llama_dir, **options) for sharing in (True, False)
    )
    way = distance(weights(plain.model), start)
    assert 1e-3 * way < distance(weights(shared.model), weights(plain.model)) < way
    losses = [np.mean([log["loss"] for log in logged(trainer) if "loss" in log]) for trainer in (shared, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)], ids=["full", "lora"])
def test_gradient_checkpointing(tmp_path, sharp_llama_dir, use_reentrant, peft_config):
    shared, _ = assert_same_training(
        tmp_path,
        model=sharp_llama_dir,
        peft_config=peft_config,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    assert any(getattr(module, "gradient_checkpointing", False) for module in shared.model.modules())


def test_gradient_accumulation(tmp_path, sharp_llama_dir):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    assert_same_training(tmp_path, model=sharp_llama_dir, **options)


def test_bfloat16(tmp_path, sharp_llama_dir):
    """Both are some way off float32, and not further from each other than that."""
    options = {"model": sharp_llama_dir, "learning_rate": 0.02}
    (shared, start), (plain, _) = (train(tmp_path, sharing, bf16=True, **options) for sharing in (True, False))
    exact, _ = train(tmp_path, False, **options)
    ends = [weights(trainer.model) for trainer in (shared, plain, exact)]
    losses = [np.array([log["loss"] for log in logged(trainer)[:-1]]) for trainer in (shared, plain, exact)]
    off = distance(ends[1], ends[2])
    assert 1e-3 < off / distance(ends[2], start) < 0.1
    assert distance(ends[0], ends[1]) < 1.5 * off
    assert np.abs(losses[0] - losses[1]).mean() < 1.5 * np.abs(losses[1] - losses[2]).mean() < 0.05


def test_qlora(tmp_path, sharp_llama_dir):
    """TRL keeps the adapter in bfloat16: a step smaller than its rounding goes either way."""
    pytest.importorskip("bitsandbytes")
    shared, _ = assert_same_training(
        tmp_path,
        tolerance=0.05,
        log_tolerance=0.05,
        model=sharp_llama_dir,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        peft_config=LoraConfig(**LORA),
        learning_rate=0.3,
    )
    assert any(type(module).__name__ == "Linear4bit" for module in shared.model.modules())


# Options of the loss and of the data


def test_margin_and_centred_rewards(tmp_path, sharp_llama_dir):
    options = {"train_dataset": pairs(margin=True), "center_rewards_coefficient": 0.05, "learning_rate": 0.03}
    shared, _ = assert_same_training(tmp_path, model=sharp_llama_dir, **options)
    assert "margin" in next(iter(shared.get_train_dataloader()))


@pytest.mark.parametrize("options", [{"reward_family": "cauchy"}, {"reward_family": "logistic", "fixed_scale": 0.7}])
def test_other_families(tmp_path, sharp_llama_dir, options):
    assert_same_training(tmp_path, model=sharp_llama_dir, **options)


@pytest.mark.parametrize("kind", ["standard", "conversational", "tools"])
def test_texts(tmp_path, sharp_llama_dir, kind):
    assert_same_training(tmp_path, model=sharp_llama_dir, train_dataset=preferences(kind, rows=32), learning_rate=0.02)


def test_a_stream(tmp_path, sharp_llama_dir):
    data = pairs().to_iterable_dataset()
    # Its steps are large (the norm of the gradient is 16 at first), and what was rounded otherwise grows with them.
    assert_same_training(tmp_path, log_tolerance=5e-4, model=sharp_llama_dir, train_dataset=data)


def test_an_incomplete_last_batch(tmp_path, sharp_llama_dir):
    """7 pairs in batches of 4: every second batch is of 3."""
    data = pairs(rows=7)
    assert_same_training(tmp_path, model=sharp_llama_dir, train_dataset=data, learning_rate=0.02)


def test_rows_to_a_multiple_of_ones_own(tmp_path, sharp_llama_dir):
    shared, _ = assert_same_training(tmp_path, model=sharp_llama_dir, pad_to_multiple_of=24)
    assert {batch["input_ids"].shape[1] % 24 for batch in shared.get_train_dataloader()} == {0}


def test_evaluation_and_metrics_of_the_users(tmp_path, sharp_llama_dir):
    """10 pairs in batches of 4, so that the last one is of 2."""
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"best": float(prediction.predictions.max())}

    _, plain = assert_same_training(
        tmp_path,
        model=sharp_llama_dir,
        eval_dataset={"one": pairs(rows=10, seed=1), "other": pairs(rows=8, seed=2, margin=True)},
        eval_strategy="steps",
        eval_steps=10,
        compute_metrics=compute_metrics,
    )
    assert len(seen) == 8
    for ours, theirs in zip(seen[:4], seen[4:], strict=True):
        assert ours.predictions.shape == theirs.predictions.shape
        np.testing.assert_allclose(ours.predictions, theirs.predictions, rtol=1e-4, atol=1e-4)
    names = {name for log in plain.state.log_history for name in log}
    assert {"eval_one_loss", "eval_one_best", "eval_other_loss"} <= names


# Who cannot


REFUSALS = {
    "encoder": (lambda: random_model("bert"), {}, "it is not a disco model on a decoder"),
    "alibi": (
        lambda: random_model("bloom", None, n_layer=2, n_head=4),
        {},
        "it does not take a forest for an attention mask",
    ),
    "prompt tuning": (
        lambda: random_model("llama"),
        {"peft_config": PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")},
        "its adapter puts tokens of its own before each sequence",
    ),
}


@pytest.fixture
def messages(caplog):
    """What was said of prefix sharing."""
    caplog.set_level(logging.WARNING, logger="disco_trl")
    return lambda: [record.getMessage() for record in caplog.records if "prefix_sharing" in record.getMessage()]


@pytest.mark.parametrize("who", REFUSALS)
def test_a_model_that_cannot_trains_as_without_and_says_so_once(tmp_path, tiny_tokenizer, messages, who):
    make, options, reason = REFUSALS[who]
    tiny_tokenizer.pad_token_id = PAD
    ends = []
    for sharing in (True, False):
        trainer = disco_trainer(
            tmp_path / str(sharing),
            model=make(),
            prefix_sharing=sharing,
            processing_class=tiny_tokenizer,
            train_dataset=pairs(rows=16),
            eval_dataset=pairs(rows=4, seed=1),
            **{**GRADIENT_DESCENT, "max_steps": 3, "learning_rate": 0.01},
            **options,
        )
        assert trainer.data_collator.share_prefixes is False
        trainer.train()
        trainer.evaluate()
        (message,) = messages()  # nothing more in the second run
        ends.append(weights(trainer.model))
    assert furthest(*ends) == 0
    assert f"prefix_sharing is off for this {type(trainer._reward_model).__name__}: {reason}" in message


def test_compilation_is_refused(tmp_path, sharp_llama_dir, messages):
    trainer = disco_trainer(tmp_path, model=sharp_llama_dir, train_dataset=pairs(), torch_compile=True)
    (message,) = messages()
    assert "with torch_compile each shape of a batch would be compiled anew" in message
    assert not trainer.data_collator.share_prefixes


def test_batches_that_accelerate_cuts_apart_are_refused(tmp_path, sharp_llama_dir, messages):
    options = {"accelerator_config": {"dispatch_batches": True}}
    disco_trainer(tmp_path, model=sharp_llama_dir, train_dataset=pairs(), **options)
    (message,) = messages()
    assert "dispatch_batches=True cuts batches apart" in message


def test_flex_attention_is_refused(tmp_path, tiny_tokenizer, messages):
    model = random_model("llama")
    with contextlib.suppress(ImportError):
        model.set_attn_implementation("flex_attention")
    disco_trainer(tmp_path, model=model, train_dataset=pairs(), processing_class=tiny_tokenizer)
    (message,) = messages()
    assert "its attention implementation is 'flex_attention'" in message


def test_a_model_that_can_says_nothing(tmp_path, sharp_llama_dir, messages, recwarn):
    disco_trainer(tmp_path, model=sharp_llama_dir, train_dataset=pairs()).train()
    assert messages() == []
    assert not [warning for warning in recwarn if "disco_trl" in str(warning.filename)]


# Beside the training


def test_random_numbers_are_left_alone(tmp_path, sharp_llama_dir):
    states, starts, rows = [], [], []
    for sharing in (True, False):
        trainer = disco_trainer(
            tmp_path,
            model=sharp_llama_dir,
            train_dataset=pairs(),
            prefix_sharing=sharing,
            peft_config=LoraConfig(**LORA),
        )
        states.append((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()))
        starts.append(weights(trainer.model))
        rows.append([batch["row_index"].tolist() for batch in trainer.get_train_dataloader()])
    assert states[0] == states[1]
    assert furthest(*starts) == 0
    assert rows[0] == rows[1]


def test_the_checkpoint_and_the_live_model_go_on(tmp_path, sharp_llama_dir, tiny_llama_dir, tiny_tokenizer):
    trainer, _ = train(tmp_path, True, model=sharp_llama_dir, save_strategy="steps", save_steps=STEPS)
    trainer.save_model()
    written = [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.md")]
    assert {"config.json", "trainer_state.json"} <= {path.name for path in written}
    assert not [path for path in written if "shared_prefix" in path.read_text()]

    # A live model in TRL's own reward path: `logits[:, 0]` of padded batches.
    assert prepare(trainer.model) is None
    args = GRPOConfig(
        str(tmp_path / "grpo"),
        **{"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4},
        **{"report_to": "none", "bf16": False, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True},
    )
    seen = []
    policy_trainer = GRPOTrainer(
        tiny_llama_dir,
        reward_funcs=trainer.model,
        reward_processing_classes=tiny_tokenizer,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["Do you like it? ", "Who? ", "Why? ", "the film "]}),
    )
    trainer.model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    policy_trainer.train()
    assert seen[0].shape == (4, 1)
    assert seen[0].isfinite().all()


def test_an_adapter_is_merged_after_training(tmp_path, sharp_llama_dir):
    trainer, _ = train(tmp_path, True, model=sharp_llama_dir, peft_config=LoraConfig(**LORA))
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    del batch["row_index"], batch["answers"]
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        merged = trainer.model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)
