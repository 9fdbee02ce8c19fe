"""What `DiscoRewardTrainer` adds to TRL's trainer: the loss and its metrics, worked out by hand, and the guards.

That all else is TRL's is in `contracts/test_c3_bradley_terry.py` and `contracts/test_c4_*.py`; the unit
of the scales is in `test_gauge.py`.
"""

import math
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import SCALE_STATE
from tiny_training import disco_trainer, preferences, weights
from transformers import TrainerCallback
from trl.trainer.reward_trainer import DataCollatorForPreference

from disco_trl.data.collator import ANSWERS
from disco_trl.data.columns import ROW_COLUMN
from disco_trl.models.outputs import RewardModelOutput
from disco_trl.trainer.callbacks import FiniteGuard


@pytest.fixture
def build(tmp_path, tiny_llama_dir):
    def build_trainer(**options):
        return disco_trainer(tmp_path, **{"model": tiny_llama_dir, "train_dataset": preferences(), **options})

    return build_trainer


def spread_out(trainer) -> None:
    """Give the head weights with which locations and scales differ visibly from answer to answer."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.model.score.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2


def inputs_of_the_model(batch) -> dict:
    return {name: tensor for name, tensor in batch.items() if name != ROW_COLUMN}


# The loss and its metrics

# Two pairs. μ ± σ of the chosen sides, then of the rejected ones:
#     pair 1:  1 ± 3   against  0 ± 4,    so z = (1 - 0) / √(3² + 4²)     =  0.2
#     pair 2:  0 ± 0.6 against  2 ± 0.8,  so z = (0 - 2) / √(0.6² + 0.8²) = -2
OUTPUT = RewardModelOutput(
    logits=torch.tensor([[1.0], [0.0], [0.0], [2.0]]),
    scale=torch.tensor([[3.0], [0.6], [4.0], [0.8]]),
    pooled_hidden_state=torch.zeros(4, 16),
    scale_state=torch.zeros(4, 16),
)
BATCH = {"input_ids": torch.ones(4, 3, dtype=torch.long), "attention_mask": torch.ones(4, 3, dtype=torch.long)}
# Φ(0.2) = 0.5792597, -ln = 0.5460044; Φ(-2) = 0.0227501, -ln = 3.7831843
NLL = (0.5460044 + 3.7831843) / 2


def loss_of(trainer, batch=BATCH, output=OUTPUT) -> float:
    """The loss that the trainer makes of a given output of a model."""
    trainer.model.train()
    return trainer.compute_loss(lambda **inputs: output, dict(batch)).item()


def test_loss_by_hand(build):
    assert loss_of(build()) == pytest.approx(NLL, abs=1e-6)


def test_loss_with_a_margin_by_hand(build):
    # z = (1 - 0.5) / 5 = 0.1 and (-2 - 1) / 1 = -3.
    # Φ(0.1) = 0.5398278, -ln = 0.6165051; Φ(-3) = 0.0013499, -ln = 6.6077262
    loss = loss_of(build(), {**BATCH, "margin": torch.tensor([0.5, 1.0])})
    assert loss == pytest.approx((0.6165051 + 6.6077262) / 2, abs=1e-5)


def test_loss_of_the_other_families_by_hand(build):
    # Cauchy: scales add. z = 1 / 7 and -2 / 1.4: ½ + arctan(z) / π = 0.5451672 and 0.1944001
    assert loss_of(build(reward_family="cauchy")) == pytest.approx(
        -(math.log(0.5451672) + math.log(0.1944001)) / 2, abs=1e-6
    )
    # Logistic: sigmoid(0.2) = 0.5498340 and sigmoid(-2) = 0.1192029
    assert loss_of(build(reward_family="logistic")) == pytest.approx(
        -(math.log(0.5498340) + math.log(0.1192029)) / 2, abs=1e-6
    )


def test_loss_with_centred_rewards_by_hand(build):
    # TRL's term: the mean of (μ chosen + μ rejected)² = (1² + 2²) / 2
    assert loss_of(build(center_rewards_coefficient=0.1)) == pytest.approx(NLL + 0.1 * 2.5, abs=1e-6)


@pytest.mark.parametrize("margin", [False, True])
def test_metrics_by_hand(build, margin):
    """Those of a margin leave it out: it is a wish for training and says nothing about the probability."""
    trainer = build()
    loss_of(trainer, {**BATCH, "margin": torch.tensor([0.5, 1.0])} if margin else BATCH)
    trainer._read_metrics()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert metrics == pytest.approx(
        {
            "nll": NLL,
            "prob_chosen": (0.5792597 + 0.0227501) / 2,
            "scale_mean": (3 + 0.6 + 4 + 0.8) / 4,
            "scale_min": 0.6,
            "scale_max": 4.0,
            # TRL's
            "num_tokens": 12,
            "min_reward": 0.0,
            "mean_reward": (1 + 0 + 0 + 2) / 4,
            "max_reward": 2.0,
            "accuracy": 0.5,
            "margin": (1 - 2) / 2,
        },
        abs=1e-6,
    )


def test_the_models_own_output_goes_into_the_loss(build):
    trainer = build()
    spread_out(trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        output = trainer.model(**inputs_of_the_model(batch))
    (chosen, rejected), (scale_c, scale_r) = (tensor.double().chunk(2) for tensor in (output.logits, output.scale))
    z = (chosen - rejected) / torch.sqrt(scale_c**2 + scale_r**2)
    assert z.std() > 0.05
    expected = -torch.log((1 + torch.erf(z / math.sqrt(2))) / 2).mean().item()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, abs=1e-5)


def test_what_is_logged(build):
    trainer = build(eval_dataset=preferences(rows=3, seed=1))
    spread_out(trainer)
    trainer.train()
    trainer.evaluate()
    names = {"loss", "nll", "prob_chosen", "scale_mean", "scale_min", "scale_max"}
    names |= {"accuracy", "margin", "min_reward", "mean_reward", "max_reward", "num_tokens"}
    *steps, _, evaluated = trainer.state.log_history
    assert {f"eval_{name}" for name in names} <= evaluated.keys()
    assert len(steps) == 4
    for step in steps:
        assert names <= step.keys()
        assert 0 < step["scale_min"] < step["scale_mean"] < step["scale_max"]
    assert evaluated["eval_loss"] == pytest.approx(evaluated["eval_nll"], abs=1e-5)


def test_an_incomplete_batch_counts_whole(build):
    """Three pairs where the batch has room for four: six scales, chosen and rejected."""
    trainer = build(eval_dataset=preferences(rows=3, seed=1))
    spread_out(trainer)
    found = trainer.evaluate()
    (batch,) = trainer.get_eval_dataloader()
    with torch.no_grad():
        scale = trainer.model(**inputs_of_the_model(batch)).scale
    assert found["eval_scale_mean"] == pytest.approx(scale.mean().item(), rel=1e-5)
    assert found["eval_scale_min"] == pytest.approx(scale.min().item(), rel=1e-5)
    assert found["eval_scale_max"] == pytest.approx(scale.max().item(), rel=1e-5)


# The batch


@pytest.mark.parametrize("prefix_sharing", [False, True])
def test_row_numbers_and_answers_stay_out_of_the_model(build, prefix_sharing):
    trainer = build(prefix_sharing=prefix_sharing, per_device_train_batch_size=2)  # as many pairs as OUTPUT has
    batch = next(iter(trainer.get_train_dataloader()))
    assert {ROW_COLUMN, ANSWERS} <= batch.keys()
    seen = {}

    def model(**inputs):
        seen.update(inputs)
        return OUTPUT

    trainer.model.train()
    trainer.compute_loss(model, batch)
    own = {"read_at", "position_ids", "nodes"} if prefix_sharing else set()
    assert seen.keys() == {"input_ids", "attention_mask", "use_cache"} | own


def test_a_collator_of_the_users(build):
    class Collator(DataCollatorForPreference):
        """TRL's, which knows no row numbers, with shorter texts."""

        def torch_call(self, examples):
            return {name: tensor[:, :5] for name, tensor in super().torch_call(examples).items()}

    trainer = build(data_collator=Collator(pad_token_id=0), scale_training="joint", calibrate=False)
    assert type(trainer.data_collator) is Collator
    assert next(iter(trainer.get_train_dataloader())).keys() == {"input_ids", "attention_mask"}
    trainer.train()
    assert trainer.model.scale_head.weight.abs().max() > 0


def test_identical_sides_are_dropped(build):
    rows = preferences().to_list()
    rows[3]["rejected"] = rows[3]["chosen"]
    trainer = build(train_dataset=Dataset.from_list(rows))
    assert [row[ROW_COLUMN] for row in trainer.train_dataset] == [row for row in range(16) if row != 3]


# Losses and gradients that are not finite

POISON = 300


def tokenized(rows: int = 16, poisoned: tuple[int, ...] = ()) -> Dataset:
    """Pairs of three tokens, in whose `poisoned` rows alone there is the token POISON."""
    pairs = [{"chosen_ids": [5, 6 + row, 2], "rejected_ids": [7, 6 + row, 2]} for row in range(rows)]
    for row in poisoned:
        pairs[row]["chosen_ids"] = [5, POISON, 2]
    return Dataset.from_list(pairs)


class WeightsBeforeEachStep(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights = weights(model)


def message_of_the_stop(trainer) -> str:
    """Train until a FloatingPointError, with the weights as they were before that step."""
    before = WeightsBeforeEachStep()
    trainer.add_callback(before)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    after = weights(trainer.model)
    for name, tensor in before.weights.items():
        assert torch.equal(tensor.nan_to_num(), after[name].nan_to_num()) or name.endswith(SCALE_STATE[1:])
        assert torch.isfinite(after[name]).all() or name == "model.embed_tokens.weight"
    return str(error.value)


def test_a_loss_that_is_not_finite_names_rows_and_checkpoint(build, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": "sequential"}
    # Batches of 4 in order: row 9 comes in the third step.
    trainer = build(train_dataset=tokenized(poisoned=(9,)), **options)
    trainer.model.model.embed_tokens.weight.data[POISON] = torch.nan
    message = message_of_the_stop(trainer)
    assert "step 3: the loss is nan" in message
    assert "in this step: 8, 9, 10, 11." in message
    assert f"Last good checkpoint: {tmp_path / 'checkpoint-2'}" in message
    assert trainer.model.scale_head.mean_hidden.isfinite().all()


def test_rows_are_those_of_the_users_dataset(build):
    """Row numbers outlast filtering and shuffling."""
    rows = preferences(rows=16).to_list()
    rows[0]["chosen"] *= 100  # filtered out
    rows[1]["rejected"] = rows[1]["chosen"]  # dropped
    rows[5]["chosen"] = "x y"  # two letters that no other row has
    trainer = build(train_dataset=Dataset.from_list(rows), max_length=60)
    assert len(trainer.train_dataset) == 14
    ids = trainer.processing_class("x y")["input_ids"]
    used = {token for row in trainer.train_dataset if row[ROW_COLUMN] != 5 for token in row["chosen_ids"]}
    used |= {token for row in trainer.train_dataset for token in row["rejected_ids"]}
    (own, *_) = set(ids) - used
    trainer.model.model.embed_tokens.weight.data[own] = torch.inf
    message = message_of_the_stop(trainer)
    named = re.search(r"in this step: ([\d, ]+)\.", message)[1].split(", ")
    assert "5" in named
    assert 1 < len(named) <= 4


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_names_all_rows_of_the_step(build, value, max_grad_norm):
    trainer = build(
        train_dataset=tokenized(),
        train_sampling_strategy="sequential",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=max_grad_norm,
    )

    def poison(gradient):
        gradient = gradient.clone()
        if trainer.state.global_step == 1:
            gradient[0, 3] = value
        return gradient

    trainer.model.model.layers[0].mlp.up_proj.weight.register_hook(poison)
    message = message_of_the_stop(trainer)
    assert "step 2: a gradient is not finite" in message
    assert "in this step: 4, 5, 6, 7." in message
    assert "none saved yet" in message


def test_gradients_are_guarded_with_lora(build):
    trainer = build(peft_config=LoraConfig())
    parameter = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    assert "step 1: a gradient is not finite" in message_of_the_stop(trainer)


def test_an_overflow_in_fp16_is_the_scalers_business(build):
    trainer = build()
    trainer.model.score.weight.grad = torch.full_like(trainer.model.score.weight, torch.inf)
    (guard,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, FiniteGuard))
    guard.rows.append(torch.tensor([1, 2]))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    guard.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert guard.rows == []
    trainer.accelerator.scaler = None
    with pytest.raises(FloatingPointError, match="gradient"):
        guard.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_an_evaluation_that_is_not_finite_goes_on(build):
    """There is nothing to protect: the weights do not change, and the log shows it."""
    trainer = build(train_dataset=tokenized(), eval_dataset=tokenized(rows=4, poisoned=(2,)))
    trainer.model.model.embed_tokens.weight.data[POISON] = torch.nan
    assert math.isnan(trainer.evaluate()["eval_loss"])
    trainer.train()
    assert trainer.model.scale_head.mean_hidden.isfinite().all()


# Nothing to train on


@pytest.mark.parametrize("streams", [False, True])
def test_a_dataset_of_which_no_pair_fits(tmp_path, tiny_llama_dir, streams):
    """Of a stream the model was trained for no step, saved with a random head, and loaded like any other."""
    rows = preferences(rows=8)
    with pytest.raises(ValueError, match="no pair is left of 8: 8 have a side of more than max_length=2 tokens"):
        disco_trainer(
            tmp_path,
            model=tiny_llama_dir,
            train_dataset=rows.to_iterable_dataset() if streams else rows,
            max_length=2,
        )


def test_a_run_without_a_batch(tmp_path, tiny_llama_dir):
    trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences().to_iterable_dataset())
    trainer.train_dataset = trainer.train_dataset.filter(lambda row: False)
    with pytest.raises(ValueError, match="no optimizer step was made of 4: the train dataset gave no batch"):
        trainer.train()
    options = {"per_device_train_batch_size": 4, "dataloader_drop_last": True}
    trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences(rows=3), **options)
    with pytest.raises(ValueError, match="enough for a batch with dataloader_drop_last=True"):
        trainer.train()
