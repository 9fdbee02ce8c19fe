"""Rewards of a model that knows several attributes, wherever they leave it."""

import pytest
import torch
from datasets import Dataset
from tiny_training import disco_trainer, preferences

from disco_trl import DiscoReward, DiscoRewardModel, best_of_n
from disco_trl.models.export import export
from disco_trl.models.reward_view import RewardView


PROMPTS = ["the film ", "a piano "]
ANSWERS = ["people like it best", "a short answer not at all"]
WEIGHTS = {"tone": 1.0, "length": -0.5}


def train(tiny_llama_dir, folder, overall: bool):
    rows = preferences(rows=16)
    said = {} if overall else {"chosen_votes": 0, "rejected_votes": 0}
    ratings = [{"tone": [1 + n % 3, 2], "length": [1 + n % 5, 5]} for n in range(16)]
    dataset = Dataset.from_list(
        [
            row | said | {"chosen_rating": rating, "rejected_rating": None}
            for row, rating in zip(rows, ratings, strict=True)
        ]
    )
    trainer = disco_trainer(
        folder, model=tiny_llama_dir, train_dataset=dataset, attribute_weights={"tone": 1, "length": -0.25}
    )
    trainer.train()
    # A correlation, as if people had been asked often enough
    with torch.no_grad():
        trainer.model.reward_head.attributes.correlation.copy_(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    trainer.save_model(str(folder / "saved"))
    return str(folder / "saved")


@pytest.fixture(scope="module")
def judged(tiny_llama_dir, tmp_path_factory) -> str:
    """A model of two attributes and overall judgements."""
    return train(tiny_llama_dir, tmp_path_factory.mktemp("judged"), True)


@pytest.fixture(scope="module")
def summed(tiny_llama_dir, tmp_path_factory) -> str:
    """A model of two attributes whose overall reward is their weighted sum."""
    return train(tiny_llama_dir, tmp_path_factory.mktemp("summed"), False)


def joint_of(path: str):
    model = DiscoRewardModel.from_pretrained(path).eval()
    reward = DiscoReward(path)
    sequences = reward.tokenize(PROMPTS, ANSWERS)
    with torch.no_grad():
        parts = [model.joint_distribution(input_ids=torch.tensor([ids])) for ids in sequences]
    return type(parts[0]).cat(parts)


def test_each_view_is_that_of_the_joint_distribution(judged):
    joint = joint_of(judged)
    assert joint.names == ("length", "tone")
    assert joint.correlation[0, 1] == 0.5
    for view, expected in (
        ({"attribute": "tone"}, joint.marginal("tone")),
        ({"weights": WEIGHTS}, joint.project(WEIGHTS)),
    ):
        found = DiscoReward(judged, **view).distribution(PROMPTS, ANSWERS)
        torch.testing.assert_close(found.location, expected.location, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=1e-5)


def test_without_overall_judgements_it_is_the_weighted_sum(summed, judged):
    joint = joint_of(summed)
    expected = joint.project({"tone": 1.0, "length": -0.25})
    found = DiscoReward(summed).distribution(PROMPTS, ANSWERS)
    torch.testing.assert_close(found.location, expected.location, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=1e-5)
    model = DiscoRewardModel.from_pretrained(judged)
    assert not model.is_weighted_sum
    assert [*model.attribute_weights] == ["length", "tone"]
    assert model.attribute_weights["length"] < 0 < model.attribute_weights["tone"]


def test_an_answer_that_fails_gets_at_most_the_floor(judged):
    free = DiscoReward(judged, attribute="length")
    tone = DiscoRewardModel.from_pretrained(judged).reward_head.by_attribute()["tone"]
    chance = joint_of(judged).prob_all_greater({"tone": tone.responses().thresholds[1].item()})
    level = chance.mean().item()  # between the two answers
    bound = DiscoReward(judged, attribute="length", minimum={"tone": 3}, min_probability=level, floor=-100.0)
    rewards, bounded = free(PROMPTS, ANSWERS), bound(PROMPTS, ANSWERS)
    for number in range(2):
        assert bounded[number] == (rewards[number] if chance[number] >= level else -100.0)
    # A floor does not lift anything.
    low = DiscoReward(judged, attribute="length", minimum={"tone": 3}, min_probability=0.999, floor=100.0)
    assert low(PROMPTS, ANSWERS) == rewards
    best = best_of_n(["a "], [ANSWERS], model=judged, minimum={"tone": 3}, min_probability=0.999, floor=-100.0)
    assert best[0].rewards.tolist() == [-100.0, -100.0]


def test_bars_overall(judged):
    with pytest.raises(ValueError, match="nobody has rated 'overall' in the training data, and the zero"):
        DiscoReward(judged, minimum={"overall": 2}, floor=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attribute": "tome"}, "does not know the attribute 'tome'; it knows 'overall', 'length', 'tone'"),
        ({"weights": {"tome": 1}}, "no attribute 'tome'; there are 'length', 'tone'"),
        ({"weights": {"tone": 0}}, "no attribute has a weight other than 0"),
        ({"weights": WEIGHTS, "attribute": "tone"}, "attribute and weights both say"),
        ({"minimum": {"tone": 3}}, "minimum needs a floor"),
        ({"floor": 0.0}, "floor is for answers that do not reach a minimum"),
        ({"minimum": {"tone": 1}, "floor": 0.0}, "1 is no rating of 'tone' that can be missed; give one of 2, 3"),
        ({"minimum": {"tome": 2}, "floor": 0.0}, "no attribute 'tome'; the model knows 'overall', 'length', 'tone'"),
        ({"minimum": {"tone": 2}, "floor": 0.0, "min_probability": 1}, "must be between 0 and 1"),
    ],
)
def test_what_a_model_has_no_reward_for_is_refused_before_it_scores(judged, options, message):
    with pytest.raises(ValueError, match=message):
        DiscoReward(judged, **options)


def test_a_model_without_attributes(tiny_llama_dir):
    model = DiscoRewardModel.from_pretrained(tiny_llama_dir)
    for view in (RewardView(attribute="tone"), RewardView(weights=WEIGHTS)):
        with pytest.raises(ValueError, match=r"does not know the attribute|knows no attributes"):
            view.of_nothing(model)
    assert model.attributes == () and model.attribute_weights == {}


def test_ppo_reads_a_view_at_every_token(summed):
    model = DiscoRewardModel.from_pretrained(summed).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    for view in (RewardView(), RewardView(weights=WEIGHTS), RewardView(attribute="tone")):
        scalar = model.as_scalar("lower_bound", view=view, k=1.0)
        with torch.no_grad():
            hidden = model.model(ids).last_hidden_state
            at_each = scalar.score(hidden)
            whole = scalar(input_ids=ids).logits
        assert at_each.shape == (1, 4, 1)
        torch.testing.assert_close(at_each[:, -1], whole, rtol=1e-5, atol=1e-5)


# Exports


def plain_rewards(path) -> torch.Tensor:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    sequences = DiscoReward(path, AutoTokenizer.from_pretrained(path)).tokenize(PROMPTS, ANSWERS)
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits[:, 0] for ids in sequences])


@pytest.mark.parametrize("options", [{}, {"attribute": "tone"}, {"weights": WEIGHTS}])
@pytest.mark.parametrize("kind", ["judged", "summed"])
def test_a_plain_model_of_each_view(kind, options, request, tmp_path):
    source = request.getfixturevalue(kind)
    export(source, tmp_path / "out", to="scalar", **options)
    expected = DiscoReward(source, **options).distribution(PROMPTS, ANSWERS).location
    torch.testing.assert_close(plain_rewards(tmp_path / "out"), expected, rtol=1e-5, atol=1e-6)


def test_a_disco_model_of_one_attribute_and_of_all(judged, tmp_path):
    export(judged, tmp_path / "one", to="disco", attribute="tone")
    one = DiscoReward(str(tmp_path / "one")).distribution(PROMPTS, ANSWERS)
    expected = DiscoReward(judged, attribute="tone").distribution(PROMPTS, ANSWERS)
    torch.testing.assert_close(one.location, expected.location)
    torch.testing.assert_close(one.scale, expected.scale)
    model = DiscoRewardModel.from_pretrained(tmp_path / "one")
    assert model.attributes == ()
    assert model.likelihoods["overall"]["rating_values"] == [1.0, 2.0, 3.0]
    export(judged, tmp_path / "all", to="disco")
    everything = DiscoRewardModel.from_pretrained(tmp_path / "all")
    assert everything.attributes == ("length", "tone")
    assert everything.reward_head.attributes.correlation[0, 1] == 0.5


def test_what_no_file_can_hold_is_refused(judged, summed, tmp_path):
    with pytest.raises(ValueError, match="the scale of a weighted sum of attributes is no function"):
        export(judged, tmp_path / "out", to="disco", weights=WEIGHTS)
    with pytest.raises(
        ValueError, match=r"its overall reward is a weighted sum .* name one of them \('length', 'tone'\)"
    ):
        export(summed, tmp_path / "out", to="two-logit")
    with pytest.raises(ValueError, match="does not know the attribute 'tome'"):
        export(judged, tmp_path / "out", to="scalar", attribute="tome")
    assert not (tmp_path / "out").exists()
