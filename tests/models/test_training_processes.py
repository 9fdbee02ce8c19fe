"""Training on several processes gives the result of one: uneven last batches and evaluations, length grouping, FSDP2.

If the rows of an epoch do not fill its last step, accelerate fills it with the epoch's first rows. The tests write
this out by hand for the single process. The repeated rows count in the loss, as with every trainer of transformers.
They do not count in the other logged metrics or in evaluation.

The tests run this file under a launcher (`torchrun --nproc_per_node 2 test_training_processes.py ddp|fsdp2 FOLDER`).
It then trains on each process, and the first process saves the results. For FSDP2 on a machine without GPUs, it makes
accelerate believe that there are several.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsdp2_on_cpu
import pytest
import torch
from datasets import Dataset
from forests import pairs, random_model
from tiny_models import PAD
from tiny_training import disco_trainer, furthest, logged, weights

from disco_trl.models.heads import DiscoHead


pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

Run = dict[str, Any]
ROWS = 14  # two steps of eight pairs, of which the second lacks two
EVALUATED = 13
SCENARIOS: dict[str, dict[str, Any]] = {
    "shared": {"train_sampling_strategy": "sequential"},
    "padded": {"train_sampling_strategy": "sequential", "prefix_sharing": False},
    "grouped": {"train_sampling_strategy": "group_by_length", "rows": 32},
    "layer": {"train_sampling_strategy": "sequential", "scale_layer": 2},
    # Where thresholds start depends on all rows, of which none may be repeated then.
    "attributes": {"train_sampling_strategy": "sequential", "rows": 16, "rated": "attributes and votes"},
    "weighted sum": {"train_sampling_strategy": "sequential", "rows": 16, "rated": "attributes"},
}
EVALUATION = (
    "loss",
    "nll",
    "accuracy",
    "prob_chosen",
    "margin",
    "mean_reward",
    "scale_mean",
    "scale_min",
    "scale_max",
)


RATED = ("loss", "scale_mean", "scale_min", "scale_max")


def with_ratings(rows: Dataset, said: str) -> Dataset:
    """The same rows with ratings of two attributes, which depend on the answer alone, and perhaps without votes."""

    def rate(row: dict[str, Any]) -> dict[str, Any]:
        given: dict[str, Any] = {} if said.endswith("votes") else {"chosen_votes": 0, "rejected_votes": 0}
        for side in ("chosen", "rejected"):
            total = sum(row[f"{side}_ids"])
            given[f"{side}_rating"] = {"tone": [1 + total % 3, 1 + total % 2], "length": [1 + total % 4, None]}
        return given

    return rows.map(rate)


def train(
    folder: Path, rows: Any = ROWS, scale_layer: int | None = None, rated: str | None = None, **options: Any
) -> Run:
    import conftest

    tokenizer = conftest.build_tokenizer()
    tokenizer.pad_token_id = PAD
    processes = int(os.environ.get("WORLD_SIZE", 1))
    model = random_model("llama")
    if scale_layer is not None:
        weight = model.scale_head.weight.data.clone()
        model.scale_head.weight.data.zero_()
        model.set_scale_layer(scale_layer)
        model.scale_head.weight.data.copy_(weight)
    train_dataset, eval_dataset = pairs(rows) if isinstance(rows, int) else rows, pairs(EVALUATED, seed=1)
    if rated is not None:
        train_dataset, eval_dataset = with_ratings(train_dataset, rated), with_ratings(eval_dataset, rated)
    trainer = disco_trainer(
        folder,
        model=model,
        processing_class=tokenizer,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        per_device_train_batch_size=8 // processes,
        per_device_eval_batch_size=4,
        max_steps=-1,
        **{"num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.02, "lr_scheduler_type": "constant", **options},
    )
    start = weights(trainer.model)
    trainer.train()
    logs = [log for log in logged(trainer) if "loss" in log]
    seen = []
    forward = DiscoHead.forward

    def watch(self, hidden_states, full_output=False, scale_states=None):
        result = forward(self, hidden_states, full_output, scale_states)
        if full_output:
            tensors = (self.weight, self.scale.weight, hidden_states, result.location, result.scale)
            seen.append([str(tensor.dtype) for tensor in tensors])
        return result

    DiscoHead.forward = watch
    evaluation = trainer.evaluate()
    DiscoHead.forward = forward
    end = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {
        "processes": trainer.accelerator.num_processes,
        "is_fsdp2": getattr(trainer.accelerator, "is_fsdp2", False),
        "shares": trainer.data_collator.share_prefixes,
        "logs": logs,
        # Where nobody compared two answers, the accuracy means nothing, and there is no NLL.
        "evaluation": {
            name: evaluation[f"eval_{name}"] for name in EVALUATION if rated != "attributes" or name in RATED
        },
        "head": [list(types) for types in {tuple(types) for types in seen}],
        "start": start,
        "end": {name: tensor.detach().clone() for name, tensor in end.items()},
    }


def launch(kind: str, folder: Path, **environment: str) -> dict[str, Run]:
    here = Path(__file__)
    paths = [str(here.parents[1]), str(here.parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", __file__]
    launched = subprocess.run(
        [*command, kind, str(folder)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    return torch.load(folder / "runs.pt", weights_only=True)


def assert_same_weights(one: Run, other: Run, tolerance: float) -> None:
    way = furthest(other["end"], other["start"])
    assert way > 0.01
    assert furthest(one["end"], other["end"]) < tolerance * max(way, 1)


# DDP


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> dict[str, Run]:
    # Two processes cannot share the GPU of a machine with one GPU. Without a GPU the variable changes nothing.
    return launch("ddp", tmp_path_factory.mktemp("ddp"), ACCELERATE_USE_CPU="true")


@pytest.mark.parametrize("name", SCENARIOS)
def test_ddp_is_one_process(name, ddp, tmp_path):
    two, options = ddp[name], {"rows": pairs(ROWS).select([*range(ROWS), 0, 1]), **SCENARIOS[name]}
    one = train(tmp_path, **options)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["shares"] == two["shares"] == (name != "padded")
    assert len(one["logs"]) == len(two["logs"]) == (8 if name == "grouped" else 4)
    for log, other in zip(two["logs"], one["logs"], strict=True):
        for entry in ("loss", "grad_norm"):
            assert log[entry] == pytest.approx(other[entry], rel=1e-5, abs=1e-5), entry
    assert_same_weights(two, one, 1e-5)
    # 13 pairs are evaluated, 8 at a time. Two processes repeat three pairs to fill the last batches, one process none.
    assert two["evaluation"] == pytest.approx(one["evaluation"], rel=1e-5, abs=1e-5)


def test_what_is_logged_leaves_repetitions_out(ddp, tmp_path):
    # The first step equals that of one process, so the second step starts from the same weights and predicts the same.
    one = train(tmp_path, num_train_epochs=1, **SCENARIOS["shared"])
    for step, pairs_of_step in enumerate((8, 6)):
        for entry in ("nll", "accuracy", "prob_chosen", "scale_mean"):
            assert ddp["shared"]["logs"][step][entry] == pytest.approx(one["logs"][step][entry], rel=1e-5), entry
        assert one["logs"][step]["accuracy"] * pairs_of_step == pytest.approx(
            round(one["logs"][step]["accuracy"] * pairs_of_step)
        )
    # The loss of two processes includes the two repeated pairs.
    assert ddp["shared"]["logs"][1]["loss"] != pytest.approx(one["logs"][1]["loss"], rel=1e-4)


# FSDP2


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory) -> dict[str, Run]:
    return launch("fsdp2", tmp_path_factory.mktemp("fsdp2"), **fsdp2_on_cpu.environment())


@pytest.mark.parametrize(("name", "scale_layer"), [("float32", None), ("layer", 2)])
def test_fsdp2_is_one_process(name, scale_layer, fsdp2, tmp_path):
    two = fsdp2[name]
    one = train(tmp_path, pairs(16), scale_layer, train_sampling_strategy="sequential", calibrate=False)
    assert two["is_fsdp2"]
    assert two["processes"] == 2
    for log, other in zip(two["logs"], one["logs"], strict=True):
        assert log["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert_same_weights(two, one, 1e-5)
    assert two["evaluation"] == pytest.approx(one["evaluation"], rel=1e-5, abs=1e-5)


def test_fsdp2_in_bfloat16_leaves_the_head_in_float32(fsdp2):
    two = fsdp2["bfloat16"]
    assert two["is_fsdp2"]
    ((weight, scale_weight, hidden, location, scale),) = two["head"]
    assert (weight, scale_weight, location, scale) == ("torch.float32",) * 4
    assert hidden == "torch.bfloat16"  # the language model computes in bfloat16
    head = two["end"]["score.weight"]
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())
    # If the rewards had been cast to bfloat16, all of them would be representable in it.
    rewards = torch.tensor([two["evaluation"][name] for name in ("scale_mean", "scale_min")])
    assert not torch.equal(rewards, rewards.bfloat16().float())


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    if kind == "ddp":
        runs = {name: train(folder / name, **options) for name, options in SCENARIOS.items()}
    else:
        fsdp2_on_cpu.believe_in_gpus()
        common = {"rows": 16, "train_sampling_strategy": "sequential", "use_cpu": False, "calibrate": False}
        runs = {}
        for name, options in {"float32": {}, "layer": {"scale_layer": 2}, "bfloat16": {"bf16": True}}.items():
            runs[name] = train(folder / name, **common, **options)
            fsdp2_on_cpu.forget_state()
    if int(os.environ["RANK"]) == 0:
        torch.save(runs, folder / "runs.pt")
    fsdp2_on_cpu.leave()
