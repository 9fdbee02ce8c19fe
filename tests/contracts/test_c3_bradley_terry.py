"""Contract C3: Bradley–Terry, TRL's reward model, is a special case of ours.

With `DiscoRewardConfig(reward_family="logistic", fixed_scale=2**-0.5, bf16=False)` the probability that one answer
beats another is sigmoid((μa - μb) / √(½ + ½)) = sigmoid(μa - μb), so a `DiscoRewardTrainer` must do what
`trl.RewardTrainer` does with the same arguments and seed, with `prefix_sharing=False` where rounding is at stake:

1. The reward head starts from the same random numbers, whatever scale parameters ours has beside it.
2. The loss of a batch and its gradient for every parameter are TRL's.
3. A whole seeded run logs TRL's losses, gradient norms and metrics under TRL's names, and ends in TRL's weights: for a
   model given by path or as an object, fully or with LoRA, decoder or encoder, with plain text or conversations, with
   margins, centred rewards, accumulated gradients, checkpointed activations and evaluation.

The one difference allowed is float32 rounding, since ours works out the pairwise term in float64. It is bounded by
1e-6 for the loss of one batch (of order 1), by 1e-5 of the largest in its tensor for each gradient, and by 3e-6 for
the weights after eight steps of plain gradient descent. AdamW divides each gradient by its own size, and so turns the
rounding of a gradient near 0 into a part of a step: after eight steps of it what is logged agrees to 1e-4, and the
weights to a tenth of one step.
"""

import pytest
import torch
from peft import LoraConfig
from tiny_training import (
    BRADLEY_TERRY,
    bradley_terry_trainer,
    disco_trainer,
    logged,
    preferences,
    reward_trainer,
)
from train_both import run_both
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification


ADAMW = {"max_steps": 8, "learning_rate": 1e-3}
GRADIENT_DESCENT = {"max_steps": 8, "learning_rate": 0.5, "optim": "sgd"}


def assert_same_run(ours, theirs) -> None:
    moved, difference = run_both(ours, theirs)
    assert moved > 1e-3
    assert difference < (3e-6 if theirs.args.optim == "sgd" else theirs.args.learning_rate / 10)


@pytest.mark.parametrize(
    "options", [BRADLEY_TERRY, {"reward_family": "normal", "prefix_sharing": False}], ids=["bradley-terry", "normal"]
)
@pytest.mark.parametrize("seed", [0, 42])
def test_the_head_at_a_seed_is_trls(tmp_path, tiny_llama_dir, options, seed):
    data = preferences()
    theirs = reward_trainer(tmp_path, model=tiny_llama_dir, train_dataset=data, seed=seed)
    ours = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=data, seed=seed, **options)
    assert torch.equal(ours.model.score.weight, theirs.model.score.weight)
    # Whatever follows draws the same numbers too: the order of the data, dropout.
    assert torch.equal(
        next(iter(ours.get_train_dataloader()))["input_ids"], next(iter(theirs.get_train_dataloader()))["input_ids"]
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"center_rewards_coefficient": 0.1}, {"gradient_checkpointing": True}],
    ids=["plain", "centred", "checkpointed"],
)
@pytest.mark.parametrize("margin", [False, True], ids=["no margin", "margin"])
def test_loss_and_gradients_of_a_batch(tmp_path, tiny_llama_dir, options, margin):
    data = preferences(margin=margin)
    gradients = []
    losses = []
    for build in (reward_trainer, bradley_terry_trainer):
        trainer = build(tmp_path, model=tiny_llama_dir, train_dataset=data, **options)
        trainer.model.train()
        # A larger head, so that rewards and losses differ from pair to pair.
        trainer.model.score.weight.data *= 30
        loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad for name, parameter in trainer.model.named_parameters()})
    theirs, ours = gradients
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert max(gradient.abs().max() for gradient in theirs.values()) > 0.01
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("kind", ["standard", "conversational"])
@pytest.mark.parametrize("optimizer", [ADAMW, GRADIENT_DESCENT], ids=["adamw", "gradient descent"])
def test_run_from_a_path(tmp_path, tiny_llama_dir, kind, optimizer):
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences(kind), **optimizer}
    assert_same_run(bradley_terry_trainer(tmp_path, **arguments), reward_trainer(tmp_path, **arguments))


@pytest.mark.parametrize(
    "options",
    [
        {"center_rewards_coefficient": 0.1},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        # Whole batches: TRL's means are over batches, in which the pairs of an incomplete one weigh more, and ours are
        # over pairs (tests/trainer/test_metrics.py). The last batch of every training epoch is smaller.
        {"eval_dataset": preferences(rows=8, seed=1, margin=True), "eval_strategy": "steps", "eval_steps": 4},
    ],
    ids=["centred", "accumulated", "checkpointed", "evaluated"],
)
def test_run_with_options(tmp_path, tiny_llama_dir, options):
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences(rows=18, margin=True), **ADAMW, **options}
    assert_same_run(bradley_terry_trainer(tmp_path, **arguments), reward_trainer(tmp_path, **arguments))


def test_run_from_an_instance(tmp_path, tiny_llama_dir, tiny_tokenizer):
    trainers = []
    for build in (bradley_terry_trainer, reward_trainer):
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1, dtype="float32")
        trainers.append(
            build(tmp_path, model=model, processing_class=tiny_tokenizer, train_dataset=preferences(), **ADAMW)
        )
    assert_same_run(*trainers)


def test_run_with_lora(tmp_path, tiny_llama_dir):
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences(), **ADAMW, "learning_rate": 1e-2}
    peft_config = LoraConfig(r=4, task_type="SEQ_CLS", modules_to_save=["score"], target_modules=["q_proj", "v_proj"])
    assert_same_run(
        bradley_terry_trainer(tmp_path, peft_config=peft_config, **arguments),
        reward_trainer(tmp_path, peft_config=peft_config, **arguments),
    )


def test_run_with_an_encoder(tmp_path, tiny_tokenizer):
    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=tiny_tokenizer.pad_token_id,
        num_labels=1,
    )
    trainers = []
    for build in (bradley_terry_trainer, reward_trainer):
        torch.manual_seed(1)
        model = BertForSequenceClassification(config)
        # Not AdamW: no preference depends on the bias of the head or of the keys, so their gradients are all rounding.
        arguments = {"model": model, "processing_class": tiny_tokenizer, "train_dataset": preferences()}
        trainers.append(build(tmp_path, **arguments, **GRADIENT_DESCENT | {"learning_rate": 10}))
    assert_same_run(*trainers)


def test_bfloat16_differs_from_trls_no_more_than_bfloat16(tmp_path, tiny_llama_dir):
    """Under autocast TRL rounds rewards to bfloat16, ours does not: near, not equal, and hence `bf16=False` above."""
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences(), "bf16": True}
    losses = []
    for build in (bradley_terry_trainer, reward_trainer):
        trainer = build(tmp_path, **arguments)
        trainer.train()
        losses.append([entry["loss"] for entry in logged(trainer) if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=2**-7)
