"""`DiscoRewardTrainer.hyperparameter_search`: real trials with Optuna, each from the same beginning."""

import optuna
import pytest
from peft import LoraConfig
from tiny_training import disco_trainer, furthest, preferences, weights

from disco_trl.trainer.search import mean_nll


optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(params=["full", "lora"])
def trainer(request, tmp_path, tiny_llama_dir, tiny_tokenizer):
    return disco_trainer(
        tmp_path,
        model=tiny_llama_dir,
        processing_class=tiny_tokenizer,
        train_dataset=preferences(rows=24),
        eval_dataset=preferences(rows=12, seed=1),
        peft_config=LoraConfig(r=2, target_modules="all-linear") if request.param == "lora" else None,
        epistemic=True,
    )


def test_each_trial_begins_where_the_first_began(trainer):
    before = weights(trainer.model)
    objectives = []

    def objective(metrics):
        objectives.append(metrics["eval_nll"])
        return objectives[-1]

    rates = [0.01, 1e-3, 0.01]
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": rates[trial.number]}, objective, n_trials=3, backend="optuna"
    )
    assert objectives[0] == pytest.approx(objectives[2], abs=1e-6) and objectives[0] != objectives[1]
    assert best.objective == min(objectives)
    assert furthest(weights(trainer.model), before) == 0
    assert trainer._memory.seen == 0 and trainer.model_init is None


def test_default_space(trainer):
    best = trainer.hyperparameter_search(n_trials=3, sampler=optuna.samplers.RandomSampler(seed=0))
    assert set(best.hyperparameters) == {"learning_rate", "per_device_train_batch_size"}
    assert 1e-3 / 4 <= best.hyperparameters["learning_rate"] <= 4e-3
    assert best.hyperparameters["per_device_train_batch_size"] in (2, 4, 8)
    assert best.objective > 0


def test_the_objective_over_one_and_several_eval_sets():
    assert mean_nll({"eval_loss": 9.0, "eval_nll": 0.5, "eval_accuracy": 0.8}) == 0.5
    assert mean_nll({"eval_a_nll": 0.5, "eval_a_loss": 9.0, "eval_b_nll": 0.7, "train_nll": 9.0}) == pytest.approx(0.6)
