"""What is logged of a batch, against counts by hand."""

from dataclasses import replace

import pytest
import torch
from tiny_training import disco_trainer, logged, preferences
from transformers import EarlyStoppingCallback

from disco_trl.distributions.judgements import Judgements
from disco_trl.distributions.reward_distribution import RewardDistribution
from disco_trl.trainer.metrics import as_numbers, pair_figures, summarize


def said(**columns) -> Judgements:
    """Judgements of three pairs; what is not named is absent."""
    tensors = {name: torch.tensor(values) for name, values in columns.items()}
    return replace(Judgements.forced_choices(3, torch.device("cpu")), **tensors)


CHOSEN = RewardDistribution(torch.tensor([1.0, -0.5, 0.0]), torch.tensor([1.0, 2.0, 0.5]), "normal")
REJECTED = RewardDistribution(torch.tensor([0.0, 0.5, 0.0]), torch.tensor([0.1, 0.2, 0.3]), "normal")


def test_forced_choices():
    metrics = as_numbers(summarize(pair_figures(CHOSEN, REJECTED, said())))
    prob = CHOSEN.prob_greater(REJECTED)
    assert metrics["accuracy"] == pytest.approx(1 / 3)  # equal locations are not ahead, as in TRL
    assert metrics["nll"] == pytest.approx(-prob.log().mean().item())
    assert metrics["prob_chosen"] == pytest.approx(prob.mean().item())
    assert (metrics["scale_min"], metrics["scale_max"]) == pytest.approx((0.1, 2.0))
    assert metrics["scale_mean"] == pytest.approx(4.1 / 6)


def test_votes_count_one_by_one():
    votes = said(wins=[3.0, 1.0, 0.0], losses=[1.0, 5.0, 0.0])
    metrics = as_numbers(summarize(pair_figures(CHOSEN, REJECTED, votes)))
    assert metrics["accuracy"] == pytest.approx((3 + 5) / 10)
    prob = CHOSEN.prob_greater(REJECTED)
    log_votes = 3 * prob[0].log() + (1 - prob[0]).log() + prob[1].log() + 5 * (1 - prob[1]).log()
    assert metrics["nll"] == pytest.approx(-log_votes.item() / 10)


def test_nobody_voted():
    metrics = as_numbers(summarize(pair_figures(CHOSEN, REJECTED, said(wins=[0.0] * 3, losses=[0.0] * 3))))
    assert set(metrics) == {"prob_chosen", "scale_mean", "scale_min", "scale_max"}


def test_figures_of_processes_are_put_together():
    votes = said(wins=[3.0, 1.0, 0.0], losses=[1.0, 5.0, 2.0])
    whole = pair_figures(CHOSEN, REJECTED, votes)
    assert whole.shape == (3, 8)
    parts = torch.cat([whole[:1], whole[1:]])
    assert as_numbers(summarize(parts)) == as_numbers(summarize(whole))


# What the trainer makes of them


def evaluations(tmp_path, model, *batch_sizes: int) -> list[dict[str, float]]:
    data = {"train_dataset": preferences(), "eval_dataset": preferences(rows=13, seed=1)}
    found = []
    for size in batch_sizes:
        trainer = disco_trainer(tmp_path, model=model, per_device_eval_batch_size=size, **data)
        with torch.no_grad():
            trainer.model.score.weight *= 30  # so that pairs differ
            trainer.model.score.scale.weight += 0.1
        trainer.predict(trainer.eval_dataset.select(range(3)))  # leaves nothing behind
        found.append(trainer.evaluate())
    return found


def test_an_evaluation_is_over_pairs_and_not_over_batches(tmp_path, tiny_llama_dir):
    in_fours, at_once = evaluations(tmp_path, tiny_llama_dir, 4, 13)
    names = ("nll", "accuracy", "prob_chosen", "scale_mean", "scale_min", "scale_max", "margin", "mean_reward", "loss")
    for name in names:
        assert in_fours[f"eval_{name}"] == pytest.approx(at_once[f"eval_{name}"], rel=1e-5, abs=1e-6), name
    assert in_fours["eval_nll"] == pytest.approx(in_fours["eval_loss"], rel=1e-5)
    assert abs(in_fours["eval_margin"]) > 1e-3


def test_there_is_no_accuracy_where_nobody_compared(tmp_path, tiny_llama_dir):
    """Which side is called chosen means nothing then, and TRL counts it all the same."""
    data = preferences(rows=12)
    for name, value in {"chosen_votes": 0, "rejected_votes": 0, "chosen_rating": 4, "rejected_rating": 2}.items():
        data = data.add_column(name, [value] * len(data))
    voted = data.remove_columns("chosen_votes").add_column("chosen_votes", [3] + [0] * 11)  # in one batch of six
    for train, compared in ((data, False), (voted, True)):
        trainer = disco_trainer(
            tmp_path, model=tiny_llama_dir, train_dataset=train, eval_dataset=train, max_steps=6, logging_steps=6
        )
        trainer.train()
        found = trainer.evaluate()
        entries = [entry for entry in logged(trainer) if "mean_reward" in entry]
        assert entries and all(("accuracy" in entry) == compared == ("nll" in entry) for entry in entries)
        assert ("eval_accuracy" in found) == compared == ("eval_nll" in found)
    assert entries[0]["accuracy"] in (0, 1) and found["eval_accuracy"] in (0, 1)  # of three votes on one pair


OURS = ("nll", "accuracy", "prob_chosen", "scale_mean", "scale_min", "scale_max", "margin", "mean_reward")


def test_each_of_several_eval_sets_has_its_metrics(tmp_path, tiny_llama_dir):
    """TRL logs its own as `eval_...` for each set, so that only the last one's can be asked for by name."""
    sets = {name: preferences(rows=rows, seed=rows) for name, rows in (("a", 5), ("b", 9))}
    trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences(), eval_dataset=sets)
    with torch.no_grad():
        trainer.model.score.weight *= 30
    together = trainer.evaluate()
    for name, dataset in sets.items():
        alone = trainer.evaluate(dataset)
        for metric in (*OURS, "loss", "min_reward", "max_reward"):
            assert together[f"eval_{name}_{metric}"] == pytest.approx(alone[f"eval_{metric}"], rel=1e-5), metric
    assert not {f"eval_{metric}" for metric in OURS} & together.keys()
    assert together["eval_a_margin"] != pytest.approx(together["eval_b_margin"], rel=1e-2)
    logged = [entry for entry in trainer.state.log_history if "eval_a_loss" in entry or "eval_b_loss" in entry]
    assert [{key.split("_")[1] for key in entry if key.startswith("eval_")} for entry in logged] == [{"a"}, {"b"}]
    card = str(trainer._make_model_card())
    assert "eval_a_nll" in card and "eval_b_nll" in card


def test_metrics_have_the_callers_prefix(tmp_path, tiny_llama_dir):
    trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences())
    found = trainer.evaluate(preferences(rows=5, seed=5), metric_key_prefix="test")
    assert {f"test_{metric}" for metric in OURS} <= found.keys()
    assert not [key for key in found if key.startswith("eval_")]


def test_the_best_model_by_a_metric_of_one_set(tmp_path, tiny_llama_dir):
    """The set `b` holds the training pairs the other way round: its likelihood falls, and the first step is best."""
    rows = preferences(rows=8)
    other_way = rows.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    options |= {"load_best_model_at_end": True, "learning_rate": 0.02, "train_sampling_strategy": "sequential"}
    for name, best, steps in (("a", 6, 6), ("b", 1, 3)):
        trainer = disco_trainer(
            tmp_path / name,
            model=tiny_llama_dir,
            train_dataset=rows,
            eval_dataset={"a": rows, "b": other_way},
            metric_for_best_model=f"eval_{name}_nll",
            callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
            **options,
        )
        trainer.train()
        history = {
            log["step"]: log[f"eval_{name}_nll"] for log in trainer.state.log_history if f"eval_{name}_nll" in log
        }
        assert (trainer.state.best_global_step, max(history)) == (best, steps)
        assert trainer.state.best_metric == min(history.values())
        assert trainer.evaluate()[f"eval_{name}_nll"] == pytest.approx(min(history.values()), rel=1e-5)


def test_every_accumulated_batch_counts_whole(tmp_path, tiny_llama_dir):
    """The Trainer fetches the batches of a step before the first is computed, and accelerate then calls each the last
    of its epoch, which it cuts to the two rows that the real last one has."""
    trainer = disco_trainer(
        tmp_path,
        model=tiny_llama_dir,
        train_dataset=preferences(rows=6),
        train_sampling_strategy="sequential",
        max_steps=1,
        gradient_accumulation_steps=2,
    )
    with torch.no_grad():
        trainer.model.score.weight *= 30
    parts = [trainer._prepare_dataset(preferences(rows=6).select(rows), trainer.processing_class, trainer.args, "part")
             for rows in (range(4), range(4, 6))]  # fmt: skip
    first, last = (trainer.evaluate(part)["eval_nll"] for part in parts)
    trainer.train()
    (nll,) = (log["nll"] for log in trainer.state.log_history if "nll" in log)
    assert nll == pytest.approx((first + last) / 2, rel=1e-5)
    assert abs(first - last) > 1e-3
