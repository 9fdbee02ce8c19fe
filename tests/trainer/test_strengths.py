"""Training on how much better an answer is: boundaries, checkpoints, ties, and what moves what."""

import json

import pytest
import torch
from datasets import Dataset
from tiny_training import SMALL_RUN, disco_trainer, logged, preferences, weights

from disco_trl import DiscoRewardConfig, DiscoRewardModel, DiscoRewardTrainer


def graded(strengths: list, rows: int = 16, **columns: list) -> Dataset:
    data = preferences(rows=rows)
    for name, values in {"preference_strength": strengths, **columns}.items():
        data = data.add_column(name, (values * rows)[:rows])
    return data


def train(path, model, tokenizer, data, **options):
    trainer = disco_trainer(path, model=model, processing_class=tokenizer, train_dataset=data, **options)
    trainer.train()
    return trainer


def test_levels_come_from_the_data_and_go_into_the_checkpoint(tiny_llama_dir, tiny_tokenizer, tmp_path):
    trainer = train(tmp_path, tiny_llama_dir, tiny_tokenizer, graded([3, 0, -1, 2]), scale_training="joint")
    trainer.save_model()
    settings = json.loads((tmp_path / "config.json").read_text())["disco"]["likelihood"]
    assert settings == {"strength_levels": 3, "tie_width": "learned"}
    loaded = DiscoRewardModel.from_pretrained(tmp_path)
    ours, theirs = (model.reward_head.likelihood.values() for model in (trainer.model, loaded))
    torch.testing.assert_close(ours, theirs)
    assert ours["strength_boundaries"].shape == (2,)


def test_an_adapter_has_its_boundaries_too(tiny_llama_dir, tiny_tokenizer, tmp_path):
    from peft import LoraConfig

    trainer = DiscoRewardTrainer(
        tiny_llama_dir,
        DiscoRewardConfig(str(tmp_path), **SMALL_RUN),
        train_dataset=graded([2, -1]),
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    loaded = DiscoRewardModel.from_pretrained(tmp_path)
    ours = trainer.accelerator.unwrap_model(trainer.model).reward_head.likelihood.values()
    torch.testing.assert_close(loaded.reward_head.likelihood.values(), ours)
    # Nobody said 0, so that a tie was not on offer: the lowest boundary is 0.
    assert "tie_width" not in ours


@pytest.mark.parametrize("scale_training", ["at_end", "joint"])
def test_a_tie_is_a_strength_of_zero(scale_training, tiny_llama_dir, tiny_tokenizer, tmp_path):
    by_strength = graded([2, 0, -1, 0])
    by_tie = graded([2, None, -1, None], tie=[None, True, None, True])
    runs = [
        train(tmp_path / name, tiny_llama_dir, tiny_tokenizer, data, scale_training=scale_training, max_steps=2)
        for name, data in (("strength", by_strength), ("tie", by_tie))
    ]
    assert logged(runs[0], "loss") == logged(runs[1], "loss")
    torch.testing.assert_close(weights(runs[0].model), weights(runs[1].model), rtol=0, atol=0)


def test_strengths_move_the_boundaries_alone_unless_all_is_trained_jointly(tiny_llama_dir, tiny_tokenizer, tmp_path):
    """The first step: from a constant scale, 1 or 3 levels for the same pairs, by plain gradient descent."""
    found = {}
    for scale_training in ("at_end", "joint"):
        runs = [
            train(
                tmp_path / f"{scale_training}-{strength}",
                tiny_llama_dir,
                tiny_tokenizer,
                graded([strength, -strength]),
                scale_training=scale_training,
                strength_levels=3,
                calibrate=False,
                max_steps=1,
                optim="sgd",
                learning_rate=0.1,
            )
            for strength in (1, 3)
        ]
        one, other = (weights(run.model) for run in runs)
        found[scale_training] = {name for name in one if not torch.equal(one[name], other[name])}
    assert found["at_end"] == {"score.likelihood.strength_boundaries"}
    assert {"score.weight", "score.scale.weight", "model.embed_tokens.weight"} <= found["joint"]


def test_one_level_is_votes(tiny_llama_dir, tiny_tokenizer, tmp_path):
    runs = [
        train(tmp_path / str(number), tiny_llama_dir, tiny_tokenizer, data, calibrate=False)
        for number, data in enumerate((graded([1, -1, 1, 1]), graded([2, -3, 1, 2]), graded([1, -1, 1, 1])))
    ]
    assert "strength_levels" not in runs[0].model.config.disco.get("likelihood", {})
    assert runs[1].model.config.disco["likelihood"]["strength_levels"] == 3
    assert logged(runs[0], "loss") == logged(runs[2], "loss") != logged(runs[1], "loss")


def test_a_checkpoint_keeps_its_levels(tiny_llama_dir, tiny_tokenizer, tmp_path):
    train(tmp_path / "one", tiny_llama_dir, tiny_tokenizer, graded([3, 0, -1])).save_model()
    again = train(tmp_path / "two", str(tmp_path / "one"), tiny_tokenizer, graded([1, 0, -2]))
    assert again.model.config.disco["likelihood"]["strength_levels"] == 3
    with pytest.raises(ValueError, match="strength 4, but the checkpoint knows only strengths up to 3"):
        train(tmp_path / "three", str(tmp_path / "one"), tiny_tokenizer, graded([4]))


@pytest.mark.parametrize("levels", [0, 21, 2.5])
def test_levels_that_make_no_sense_are_refused(levels, tmp_path):
    with pytest.raises(ValueError, match="strength_levels="):
        DiscoRewardConfig(str(tmp_path), strength_levels=levels, use_cpu=True)


def test_an_evaluation_logs_the_votes_beside_the_whole(tiny_llama_dir, tiny_tokenizer, tmp_path):
    trainer = disco_trainer(
        tmp_path,
        model=tiny_llama_dir,
        processing_class=tiny_tokenizer,
        train_dataset=graded([3, 0, -1]),
        eval_dataset=graded([2, -3]),
    )
    metrics = trainer.evaluate()
    # A level is less probable than its sign.
    assert metrics["eval_loss"] > metrics["eval_nll"]
