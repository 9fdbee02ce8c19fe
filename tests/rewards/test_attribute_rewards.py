"""What `DiscoReward`, PPO and the commands make of a model that knows several attributes."""

import json

import pytest
import torch
from attribute_models import ANSWERS, PROMPTS, RATINGS, WEIGHTS, save_attribute_model
from command_line import refusal
from datasets import Dataset, load_dataset

from disco_trl import DiscoReward, DiscoRewardModel
from disco_trl.cli.main import main
from disco_trl.models.reward_view import RewardsByAttribute, RewardView
from disco_trl.rewards.annotate import Annotator, annotate_file


PAIRS = [
    {"prompt": prompt, "chosen": answer, "rejected": f"{answer} and a film"}
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
]
BOUNDED = {"attribute": "length", "minimum": {"tone": 3}, "min_probability": 0.3, "floor": -50.0}


@pytest.fixture(scope="module")
def path(tiny_llama_dir, tmp_path_factory) -> str:
    return save_attribute_model(tiny_llama_dir, tmp_path_factory.mktemp("judged"), "judged")


@pytest.fixture
def rows(tmp_path) -> str:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return str(tmp_path / "rows.jsonl")


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def close(values, expected) -> None:
    torch.testing.assert_close(torch.as_tensor(values), expected, rtol=1e-5, atol=1e-5)


# In a trainer of policies


def test_metrics_of_all_attributes_and_of_a_minimum(path):
    logged: dict = {}
    reward = DiscoReward(path, name="film", **BOUNDED)
    rewards = reward(PROMPTS, ANSWERS, log_metric=logged.__setitem__)
    for name in RATINGS:
        location = DiscoReward(path, attribute=name).distribution(PROMPTS, ANSWERS).location
        assert logged[f"film/location/mean/{name}"] == pytest.approx(location.mean().item(), abs=1e-5)
    assert logged["film/location/mean"] == logged["film/location/mean/length"]
    failed = [value == -50.0 for value in rewards]
    assert 0 < sum(failed) < 3
    assert logged["film/below_minimum"] == pytest.approx(sum(failed) / 3)
    logged.clear()
    DiscoReward(path)(PROMPTS, ANSWERS, log_metric=logged.__setitem__)
    assert "disco_mean/below_minimum" not in logged and "disco_mean/location/mean/tone" in logged


def test_nothing_to_reward(path):
    logged: dict = {}
    for view in ({}, {"attribute": "tone"}, BOUNDED):
        assert DiscoReward(path, **view)([], [], log_metric=logged.__setitem__) == []
    assert not logged


def test_a_floor_is_a_number(path):
    for floor in (float("-inf"), float("nan")):
        with pytest.raises(ValueError, match="would be a reward; give a finite number"):
            DiscoReward(path, minimum={"tone": 2}, floor=floor)


@pytest.mark.parametrize("view", [{}, {"attribute": "tone"}, {"weights": WEIGHTS}, BOUNDED], ids=str)
def test_ppo_gets_the_reward_of_a_view(path, view):
    """The calls of `get_reward` in TRL's PPO (1.12): the backbone over padded ids, then the head at every token."""
    reward = DiscoReward(path, **view)
    scalar = reward.model.as_scalar("lower_bound", view=RewardView(**view), k=0.5)
    sequences = reward.tokenize(PROMPTS, ANSWERS)
    pad = scalar.config.pad_token_id
    ids = torch.full((3, max(map(len, sequences)) + 2), pad)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    mask = ids != pad
    with torch.no_grad():
        backbone = getattr(scalar, scalar.base_model_prefix)
        output = backbone(
            input_ids=ids.masked_fill(~mask, 0),
            attention_mask=mask,
            position_ids=mask.cumsum(1) - mask.long(),
            return_dict=True,
            output_hidden_states=True,
            use_cache=False,
        )
        logits = scalar.score(output.hidden_states[-1])
    found = logits[torch.arange(3), mask.sum(dim=1) - 1].squeeze(-1)
    expected = DiscoReward(path, transform="lower_bound", k=0.5, **view)(PROMPTS, ANSWERS)
    close(found, torch.tensor(expected))


# All rewards of a batch


def test_batches_of_all_rewards(path):
    model = DiscoRewardModel.from_pretrained(path).eval()
    nothing = RewardsByAttribute.of_nothing(model)
    assert len(nothing) == 0 and list(nothing.of_attributes()) == list(RATINGS)
    with torch.no_grad():
        output = model(input_ids=torch.tensor([[5, 6, 7], [8, 9, 10]]))
        both = RewardsByAttribute.of_output(model, output)
    again = RewardsByAttribute.cat([nothing, both[:1], both[torch.tensor([1])]])
    for name in ("overall", *RATINGS):
        close(again.of_attribute(name).location, model.rewards_of(output, name).location)
        close(again.of_attribute(name).scale, model.rewards_of(output, name).scale)
    wide = both.to("cpu", torch.float64)
    assert wide.overall.location.dtype == wide.joint.scale.dtype == wide.joint.correlation.dtype == torch.float64


# Data sets


def test_score_adds_the_columns_of_all_attributes(path, rows, tmp_path):
    main(["score", path, rows, str(tmp_path / "out.jsonl"), "--attribute", "tone", "--all_attributes"])
    found = read(tmp_path / "out.jsonl")
    for side in ("chosen", "rejected"):
        answers = [row[side] for row in PAIRS]
        for name in RATINGS:
            expected = DiscoReward(path, attribute=name).distribution(PROMPTS, answers)
            close([row[f"location_{name}_{side}"] for row in found], expected.location)
            close([row[f"scale_{name}_{side}"] for row in found], expected.scale)
        assert [row[f"location_{side}"] for row in found] == [row[f"location_tone_{side}"] for row in found]
    expected = DiscoReward(path, attribute="tone")
    chosen, rejected = (
        expected.distribution(PROMPTS, [row[side] for row in PAIRS]) for side in ("chosen", "rejected")
    )
    close([row["prob_chosen"] for row in found], chosen.prob_greater(rejected))


def test_map_adds_them_in_one_pass(path):
    reward = DiscoReward(path, weights=WEIGHTS)
    reward.distribution(PROMPTS, ANSWERS)  # which tries prefix sharing out
    calls = []
    reward.model.register_forward_pre_hook(lambda *_: calls.append(1))
    texts = Dataset.from_list([{"prompt": p, "completion": a} for p, a in zip(PROMPTS, ANSWERS, strict=True)])
    plain = reward.map(texts)
    assert len(calls) == 1
    scored = reward.map(texts, prefix="my_", all_attributes=True)
    assert len(calls) == 2
    added = ["location", "scale", "reward_mean", "location_length", "scale_length", "location_tone", "scale_tone"]
    assert scored.column_names == ["prompt", "completion", *(f"my_{name}" for name in added)]
    assert scored["my_location"][:] == plain["location"][:]
    weighted = sum(WEIGHTS[name] * torch.tensor(scored[f"my_location_{name}"][:]) for name in WEIGHTS)
    close(scored["my_location"][:], weighted)


def test_names_that_make_two_columns_of_one(path):
    reward = DiscoReward(path)
    reward.model.reward_head.attributes.names = ("chosen", "error")
    reward.model.config.disco["attributes"]["names"] = ["chosen", "error"]
    reward.model.reward_head.scale.location_error.fill_(0.1)
    with pytest.raises(ValueError, match="two columns would be named 'location_error'"):
        reward.map(Dataset.from_list(PAIRS), all_attributes=True)


def test_a_model_without_attributes_has_no_such_columns(reward_dir):
    with pytest.raises(ValueError, match="all_attributes: the model knows no attributes beside its overall reward"):
        DiscoReward(reward_dir()).map(Dataset.from_list(PAIRS), all_attributes=True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"attribute": "tone"}, "view"),
        ({"weights": WEIGHTS}, "view"),
        ({"minimum": {"tone": 3}, "floor": -50.0}, "view"),
        ({"minimum": {"tone": 3}, "floor": -51.0}, "view"),
        ({"all_attributes": True}, "attributes"),
    ],
    ids=str,
)
def test_another_reward_does_not_go_on_with_the_parts_of_the_first(changed, said, path, tmp_path):
    dataset, out = Dataset.from_list(PAIRS), tmp_path / "out.jsonl"
    before = {"minimum": {"tone": 3}, "floor": -50.0} if changed.get("floor") == -51.0 else {}
    failing = Annotator(DiscoReward(path, **before))
    failing.reward.model.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        annotate_file(dataset, out, failing, 1)
    all_attributes = changed.pop("all_attributes", False)
    with pytest.raises(ValueError, match=rf"with other settings \(then {said} .*delete the folder"):
        annotate_file(dataset, out, Annotator(DiscoReward(path, **changed), all_attributes=all_attributes), 1)
    annotate_file(dataset, out, Annotator(DiscoReward(path, **before)), 1)
    assert len(read(out)) == 3


def test_filter_looks_at_the_reward_that_is_asked_for(path, rows, tmp_path, capsys):
    for name in RATINGS:
        out = tmp_path / f"{name}.jsonl"
        model = ["--model_name_or_path", path, "--attribute", name, "--min_prob", "1e-9"]
        main(["filter", rows, str(out), *model])
        reward = DiscoReward(path, attribute=name)
        one, other = (reward.distribution(PROMPTS, [row[side] for row in PAIRS]) for side in ("chosen", "rejected"))
        close([row["prob_chosen"] for row in read(out)], one.prob_greater(other))
    out = str(tmp_path / "out.jsonl")
    said = refusal(capsys, "filter", rows, out, "--min_prob", "0.1", "--attribute", "tone")
    assert "--attribute and --weights say which reward the model gives; pass --model_name_or_path" in said
    said = refusal(
        capsys, "filter", rows, out, "--model_name_or_path", path, "--minimum", '{"tone": 2}', "--floor", "0"
    )
    assert "--minimum and --floor bound what a transform makes of a reward" in said


def test_best_of_n_chooses_by_the_reward_that_is_asked_for(path, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "the film ", "candidates": ANSWERS}) + "\n")
    view = ["--minimum", '{"tone": 3}', "--min_probability", "0.3", "--floor", "-50"]
    for name, arguments in (("tone", []), ("length", view)):
        out = tmp_path / f"{name}.parquet"
        main(["best-of-n", path, str(tmp_path / "rows.jsonl"), str(out), "--attribute", name, *arguments])
        [row] = load_dataset("parquet", data_files=str(out), split="train").to_list()
        options = BOUNDED if arguments else {"attribute": name}
        rewards = DiscoReward(path, **options)(["the film "] * 3, ANSWERS)
        close(row["rewards"], torch.tensor(rewards))
        assert row["best_index"] == rewards.index(max(rewards))
        expected = DiscoReward(path, attribute=name).distribution(["the film "] * 3, ANSWERS)
        close(row["locations"], expected.location)


def test_score_caps_what_fails(path, rows, tmp_path):
    view = ["--attribute", "length", "--minimum", '{"tone": 3}', "--min_probability", "0.3", "--floor", "-50"]
    main(["score", path, rows, str(tmp_path / "out.jsonl"), *view])
    expected = DiscoReward(path, **BOUNDED)(PROMPTS, ANSWERS)
    close([row["reward_mean_chosen"] for row in read(tmp_path / "out.jsonl")], torch.tensor(expected))
    assert 0 < expected.count(-50.0) < 3
