"""Several attributes in one model: what is trained, folded, saved and resumed."""

import random

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_training import WORDS, disco_trainer, furthest, logged, preferences, weights
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from disco_trl import DiscoRewardModel


def rated_pairs(rows: int = 24, seed: int = 0, overall: bool = True) -> Dataset:
    """Pairs of which two attributes are rated, by two people or none, one is compared, and the whole perhaps."""
    rng = random.Random(seed)

    def rating() -> dict[str, list[int | None]] | None:
        return rng.choice(
            [None, {"tone": [rng.randint(1, 3), None], "length": [rng.randint(1, 5), rng.randint(1, 5)]}]
        )

    def words() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(2, 9)))

    votes = {} if overall else {"chosen_votes": 0, "rejected_votes": 0}
    return Dataset.from_list(
        [
            {
                "prompt": words() + " ",
                "chosen": words() + " one",
                "rejected": words() + " two",
                "chosen_rating": rating(),
                "rejected_rating": rating(),
                "attribute": "safety" if overall and number % 3 == 0 else None,
                **votes,
            }
            for number in range(rows)
        ]
    )


def run(model, folder, **options):
    trainer = disco_trainer(folder, model=model, train_dataset=rated_pairs(), **options)
    trainer.train()
    return trainer


def test_attributes_are_found_and_trained(tiny_llama_dir, tmp_path):
    trainer = run(tiny_llama_dir, tmp_path)
    model = trainer.model
    assert model.attributes == ("length", "safety", "tone")
    assert model.likelihoods["length"]["rating_values"] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert model.likelihoods["tone"]["rating_values"] == [1.0, 2.0, 3.0]
    assert model.likelihoods["safety"] == {}
    head = model.reward_head
    for of_attribute in head.attributes.heads:
        assert of_attribute.weight.abs().max() > 0
    entries = logged(trainer)
    assert any("accuracy/safety" in entry for entry in entries)
    assert all("scale_mean/tone" in entry for entry in entries if "loss" in entry)
    # The row that every other tool reads is that of the sum.
    torch.testing.assert_close(head.weight.data, head.attributes.overall_row().data, rtol=0, atol=0)
    assert head.attributes.raw_weight.abs().max() > 0


def test_a_checkpoint_is_a_scalar_reward_model(tiny_llama_dir, tmp_path):
    trainer = run(tiny_llama_dir, tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    ids = torch.randint(0, 20, (5, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trainer.model.eval()
        expected = trainer.model(input_ids=ids)
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", num_labels=1)(input_ids=ids)
        again = DiscoRewardModel.from_pretrained(tmp_path / "saved").eval()
        found = again(input_ids=ids)
    torch.testing.assert_close(plain.logits, expected.logits, rtol=0, atol=1e-6)
    assert torch.equal(found.logits, expected.logits)
    assert again.attribute_weights == trainer.model.attribute_weights
    for name in again.attributes:
        one, other = again.rewards_of(found, name), trainer.model.rewards_of(expected, name)
        assert torch.equal(one.location, other.location)
        assert torch.equal(one.scale, other.scale)


def test_overall_votes_move_attributes_and_weights(tiny_llama_dir, tmp_path):
    """Through the sum: with weights of either sign, which they keep."""
    trainer = run(tiny_llama_dir, tmp_path, attribute_weights={"safety": 0.5, "tone": -0.5, "length": 0})
    weights_of = trainer.model.attribute_weights
    assert weights_of["length"] == 0
    assert weights_of["tone"] < 0 < weights_of["safety"]
    assert weights_of["safety"] != 0.5 and weights_of["tone"] != -0.5
    assert trainer.model.reward_head.attributes.rest.abs().max() > 0


def test_given_weights_stay(tiny_llama_dir, tmp_path):
    given = {"safety": 0.5, "tone": -0.25, "length": 1.0}
    trainer = run(tiny_llama_dir, tmp_path, attribute_weights=given, learn_attribute_weights=False)
    assert trainer.model.attribute_weights == given
    head = trainer.model.reward_head
    expected = sum(given[name] * head.by_attribute()[name].weight for name in given) + head.attributes.rest
    torch.testing.assert_close(head.weight.data, expected.data)


def test_a_head_that_was_trained_is_what_attributes_do_not_explain(tiny_llama_dir, tmp_path):
    scalar = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1)
    row = scalar.score.weight.detach().clone()
    trainer = disco_trainer(
        tmp_path,
        model=scalar,
        train_dataset=rated_pairs(),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama_dir),
    )
    assert torch.equal(trainer.model.reward_head.attributes.rest.data, row)
    assert torch.equal(trainer.model.reward_head.weight.data, row)


def test_without_overall_judgements_it_is_a_weighted_sum(tiny_llama_dir, tmp_path, caplog):
    trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=rated_pairs(overall=False))
    assert (
        "Nobody has judged the answers overall: the overall reward is the weighted sum of the attributes"
        in caplog.text
    )
    trainer.train()
    model = trainer.model
    assert model.is_weighted_sum and model.attributes == ("length", "tone")
    assert model.attribute_weights == {"length": 0.5, "tone": 0.5}
    inputs = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}
    with torch.no_grad():
        reward, joint = model.reward_distribution(**inputs), model.joint_distribution(**inputs)
        output = model(**inputs)
    projected = joint.project(model.attribute_weights)
    torch.testing.assert_close(reward.location, projected.location)
    torch.testing.assert_close(reward.scale, projected.scale)
    torch.testing.assert_close(output.logits[:, 0], projected.location)
    torch.testing.assert_close(output.scale[:, 0], projected.scale)


def test_a_resumed_run_ends_the_same(tiny_llama_dir, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = run(tiny_llama_dir, tmp_path / "whole", **options)
    resumed = disco_trainer(tmp_path / "resumed", model=tiny_llama_dir, train_dataset=rated_pairs(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert furthest(weights(whole.model), weights(resumed.model)) == 0


def test_an_adapter_holds_its_attributes(tiny_llama_dir, tmp_path):
    peft_config = LoraConfig(r=4, target_modules="all-linear")
    trainer = run(tiny_llama_dir, tmp_path, peft_config=peft_config)
    trainer.save_model(str(tmp_path / "adapter"))
    inputs = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}
    again = DiscoRewardModel.from_pretrained(tmp_path / "adapter").eval()
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model.get_base_model().joint_of(trainer.model(**inputs))
        found = again.get_base_model().joint_of(again(**inputs))
        merged = again.merge_and_unload()
        plain = merged(**inputs).logits
        whole = trainer.model(**inputs).logits
    assert found.names == ("length", "safety", "tone")
    torch.testing.assert_close(found.location, expected.location)
    torch.testing.assert_close(plain, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": ["tome"]}, r"attributes names 'tome', about which .* say something about 'length', 'safety'"),
        (
            {"attribute_weights": {"tome": 1}},
            "attribute_weights names 'tome', about which the training data say nothing",
        ),
        ({"attribute_weights": {"tone": 0.0}}, "must be finite numbers, of which one or more differ from 0"),
        (
            {"attributes": ["tone"], "attribute_weights": {"safety": 1}},
            "attribute_weights has 'safety', which attributes",
        ),
    ],
)
def test_settings_that_do_not_fit_the_data(options, message, tiny_llama_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=rated_pairs(), **options)


def test_weights_that_nothing_determines_are_not_learned(tiny_llama_dir, tmp_path):
    with pytest.raises(ValueError, match="nobody has judged the answers overall, so that nothing tells"):
        disco_trainer(
            tmp_path, model=tiny_llama_dir, train_dataset=rated_pairs(overall=False), learn_attribute_weights=True
        )
    plain = preferences(rows=8)
    with pytest.raises(ValueError, match="the training data say nothing about attributes, without which no weight"):
        disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=plain, learn_attribute_weights=True)
    with pytest.raises(ValueError, match="a weighted sum of 'laplace' rewards is of no family"):
        disco_trainer(
            tmp_path, model=tiny_llama_dir, train_dataset=rated_pairs(overall=False), reward_family="laplace"
        )


def test_some_attributes_are_chosen(tiny_llama_dir, tmp_path, caplog):
    trainer = run(tiny_llama_dir, tmp_path, attributes=["tone"])
    assert trainer.model.attributes == ("tone",)
    assert "what is said about length, safety is not read" in caplog.text


def test_a_checkpoint_goes_on_with_its_attributes(tiny_llama_dir, tmp_path):
    run(tiny_llama_dir, tmp_path / "first").save_model(str(tmp_path / "saved"))
    trainer = run(str(tmp_path / "saved"), tmp_path / "second")
    assert trainer.model.attributes == ("length", "safety", "tone")
    run(tiny_llama_dir, tmp_path / "other", attributes=["tone"]).save_model(str(tmp_path / "one"))
    with pytest.raises(ValueError, match="about 'length', and the checkpoint knows the attributes 'tone'"):
        disco_trainer(tmp_path / "more", model=str(tmp_path / "one"), train_dataset=rated_pairs())


def test_a_lost_attribute_is_an_error(tiny_llama_dir, tmp_path):
    run(tiny_llama_dir, tmp_path).save_model(str(tmp_path / "saved"))
    path = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {name: tensor for name, tensor in tensors.items() if "heads.1.weight" not in name}, path, {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"attributes\.heads\.1\.weight"):
        DiscoRewardModel.from_pretrained(tmp_path / "saved")


def test_evaluation_has_metrics_of_each_attribute(tiny_llama_dir, tmp_path):
    trainer = disco_trainer(
        tmp_path, model=tiny_llama_dir, train_dataset=rated_pairs(), eval_dataset=rated_pairs(seed=1)
    )
    metrics = trainer.evaluate()
    assert {"eval_accuracy", "eval_accuracy/safety", "eval_nll/safety", "eval_scale_mean/tone"} <= metrics.keys()
    assert "eval_accuracy/tone" not in metrics  # nobody compared it
