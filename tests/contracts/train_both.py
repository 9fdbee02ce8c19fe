"""Both trainers with the same arguments, ours as the special case of contract C3.

TRL's own trainer is the definition of what an option means, in whichever version is installed: both have to make the
same tokens, the same logs and the same weights.
"""

from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from tiny_training import bradley_terry_trainer, furthest, logged, reward_trainer, weights
from trl import RewardTrainer

from disco_trl import DiscoRewardTrainer


TOKENS = ("chosen_ids", "rejected_ids", "margin")


def tokens(dataset: Dataset | IterableDataset) -> list[dict]:
    return [{name: row[name] for name in TOKENS if name in row} for row in dataset]


def with_the_names_of_sets(metrics: dict[str, float]) -> dict[str, float]:
    """What TRL finds in an evaluation of one set among several, with its own metrics named as transformers' are.

    TRL names them `eval_accuracy` for each set, so that of several sets the last one's are left. Ours have the prefix
    that transformers gives the loss: `eval_short_accuracy`.
    """
    prefixes = [name.removesuffix("_loss") for name in metrics if name.startswith("eval_") and name.endswith("_loss")]
    prefix = prefixes[-1] if prefixes else "eval"
    return {
        name if any(name.startswith(f"{own}_") for own in prefixes) else name.replace("eval", prefix, 1): value
        for name, value in metrics.items()
    }


def train_both(folder: Path, **arguments) -> tuple[DiscoRewardTrainer, RewardTrainer]:
    """Run both trainers and ask for the same tokens, logs and weights; returns them for further questions."""
    trainers = []
    for build, name in ((bradley_terry_trainer, "ours"), (reward_trainer, "theirs")):
        trainer = build(folder / name, **{"max_steps": 2, **arguments})
        trainer.train()
        trainers.append(trainer)
    ours, theirs = trainers
    assert tokens(ours.train_dataset) == tokens(theirs.train_dataset)
    for our_log, their_log in zip(logged(ours), logged(theirs), strict=True):
        their_log = with_the_names_of_sets(their_log)
        assert their_log == pytest.approx({name: our_log[name] for name in their_log}, abs=1e-4, rel=1e-4)
    assert furthest(weights(ours.model), weights(theirs.model)) < 1e-4
    return ours, theirs


def run_both(ours, theirs) -> tuple[float, float]:
    """Run both from the same weights, and ask for the same logs; returns how far theirs moved, and ours is from it."""
    start = weights(theirs.model)
    assert furthest(weights(ours.model), start) == 0
    theirs.train()
    ours.train()
    assert logged(theirs)
    for our_log, their_log in zip(logged(ours), logged(theirs), strict=True):
        # Ours has metrics beyond TRL's, never fewer, and none of TRL's names with another value.
        assert their_log == pytest.approx({name: our_log[name] for name in their_log}, abs=1e-4, rel=1e-4)
    return furthest(weights(theirs.model), start), furthest(weights(ours.model), weights(theirs.model))
