"""A real server of a model that knows several attributes: every request may ask for another reward."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import torch
from attribute_models import ANSWERS, PROMPTS, RATINGS, WEIGHTS, save_attribute_model
from reward_server import held_up, serve, tiny_reward
from server_questions import close, located, metric, post, wait_for_queue

import disco_trl.serving.verl
from disco_trl import DiscoReward, DiscoRewardModel
from disco_trl.serving.client import RemoteReward, ServerError


ITEMS = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
VIEWS = [
    {},
    {"attribute": "tone"},
    {"attribute": "overall"},
    {"weights": WEIGHTS},
    {"minimum": {"tone": 3}, "min_probability": 0.3, "floor": -50.0},
    {"attribute": "length", "minimum": {"tone": 3, "length": 2}, "min_probability": 0.2, "floor": -50.0},
]


@pytest.fixture(scope="module", params=["judged", "adapter", "summed"])
def path(request, tiny_llama_dir, tmp_path_factory) -> str:
    return save_attribute_model(tiny_llama_dir, tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def url(path):
    with serve(DiscoReward(path)) as url:
        yield url


@pytest.fixture(scope="module")
def judged(tiny_llama_dir, tmp_path_factory) -> str:
    return save_attribute_model(tiny_llama_dir, tmp_path_factory.mktemp("judged"), "judged")


def fails(path: str, minimum: dict, min_probability: float) -> list[bool]:
    """By the joint distribution itself, answer by answer."""
    model = DiscoRewardModel.from_pretrained(path)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    heads = inner.reward_head.by_attribute()
    bars = {
        name: heads[name].responses().thresholds[RATINGS[name].index(value) - 1].item()
        for name, value in minimum.items()
    }
    found = []
    with torch.no_grad():
        for ids in DiscoReward(path).tokenize(PROMPTS, ANSWERS):
            joint = inner.joint_of(model.eval()(input_ids=torch.tensor([ids])))
            found.append(joint.prob_all_greater(bars).item() < min_probability)
    return found


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_a_request_chooses_its_reward(path, url, view):
    reward = DiscoReward(path, **view)
    expected = reward.distribution(PROMPTS, ANSWERS)
    answer = post(url, items=ITEMS, pairs=[[0, 1], [2, 1]], **view)
    close(located(answer), expected.location)
    close([result["scale"] for result in answer["results"]], expected.scale)
    close(answer["prob_greater"], expected[[0, 2]].prob_greater(expected[[1, 1]]))
    close([result["reward"] for result in answer["results"]], torch.tensor(reward(PROMPTS, ANSWERS)))
    bounded = [False] * 3
    if "minimum" in view:
        bounded = fails(path, view["minimum"], view["min_probability"])
    assert [result["cap"] for result in answer["results"]] == [-50.0 if fail else None for fail in bounded]
    for result, location, fail in zip(answer["results"], expected.location.tolist(), bounded, strict=True):
        assert result["reward"] == pytest.approx(-50.0 if fail else location, abs=1e-5)


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_the_attributes_are_in_every_answer(path, url, view):
    answer = post(url, items=ITEMS, **view)
    for name in RATINGS:
        expected = DiscoReward(path, attribute=name).distribution(PROMPTS, ANSWERS)
        close([result["attributes"][name]["location"] for result in answer["results"]], expected.location)
        close([result["attributes"][name]["scale"] for result in answer["results"]], expected.scale)
        assert [result["attributes"][name]["location_error"] for result in answer["results"]] == [None] * 3


def test_openrlhf_gets_a_number_and_logs_the_attributes(path, url):
    answer = post(url, "/get_reward", query=ANSWERS)
    nothing = [""] * 3
    close(answer["rewards"], DiscoReward(path).distribution(nothing, ANSWERS).location)
    assert answer["extra_logs"].keys() == {"location", "scale", "location_length", "location_tone"}
    for name in RATINGS:
        expected = DiscoReward(path, attribute=name).distribution(nothing, ANSWERS).location
        close(answer["extra_logs"][f"location_{name}"], expected)


def test_requests_of_different_rewards_share_a_batch(judged):
    reward = DiscoReward(judged)
    views = VIEWS[1:4]
    with serve(reward) as url, ThreadPoolExecutor(4) as clients, held_up(reward.model) as barrier:
        clients.submit(post, url, items=["First."])
        assert barrier.entered.wait(60)
        answers = [clients.submit(post, url, items=ITEMS, **view) for view in views]
        tokens = 3 * sum(map(len, reward.tokenize(PROMPTS, ANSWERS)))
        wait_for_queue(url, lambda waiting: waiting == tokens)
        barrier.open.set()
        for view, answer in zip(views, answers, strict=True):
            close(located(answer.result()), DiscoReward(judged, **view).distribution(PROMPTS, ANSWERS).location)
        assert metric(url, "disco_batch_texts_count") == 2  # the first, and all others together
        assert metric(url, "disco_texts_total") == 10


def test_what_the_server_was_started_with_is_the_default(judged):
    started = {"attribute": "length", "minimum": {"tone": 3}, "min_probability": 0.9999, "floor": -50.0}
    length, tone = (DiscoReward(judged, attribute=name).distribution(PROMPTS, ANSWERS).location for name in RATINGS)
    with serve(DiscoReward(judged, **started)) as url:
        own = post(url, items=ITEMS)
        close(located(own), length)
        assert [result["reward"] for result in own["results"]] == [-50.0] * 3
        rendered = post(url, "/get_reward", query=ANSWERS)["rewards"]
        close(rendered, torch.tensor(DiscoReward(judged, **started)([""] * 3, ANSWERS)))
        # Another reward, under the server's constraint; another floor; a milder constraint; and none.
        other = post(url, items=ITEMS, attribute="tone")
        close(located(other), tone)
        assert [result["reward"] for result in other["results"]] == [-50.0] * 3
        assert [r["reward"] for r in post(url, items=ITEMS, floor=-7.0)["results"]] == [-7.0] * 3
        milder = post(url, items=ITEMS, min_probability=0.9)
        close([result["reward"] for result in milder["results"]], torch.tensor([-50.0, length[1], -50.0]))
        free = post(url, items=ITEMS, minimum={}, weights={"tone": 2})
        close([result["reward"] for result in free["results"]], 2 * tone)
        assert {result["cap"] for result in free["results"]} == {None}
        health = requests.get(url + "/health", timeout=60).json()
        assert health["view"] == {**started, "weights": None}
        assert health["attributes"]["tone"] == {"weight": pytest.approx(0.8187, abs=1e-3), "rating_values": [1, 2, 3]}
        # The clients take it over, too.
        assert RemoteReward(url)(PROMPTS, ANSWERS) == [-50.0] * 3
        close(RemoteReward(url, minimum={}, attribute="tone")(PROMPTS, ANSWERS), tone)


@pytest.mark.parametrize(
    ("changes", "status", "field", "reason"),
    [
        ({"attribute": "tome"}, 422, "attribute", "does not know the attribute 'tome'; it knows 'overall', 'length'"),
        ({"attribute": 3}, 422, "attribute", "string"),
        ({"attribute": "tone", "weights": WEIGHTS}, 422, "weights", "give one of them"),
        ({"weights": {"tome": 1}}, 422, "weights", "no attribute 'tome'; there are 'length', 'tone'"),
        ({"weights": {"tone": 0}}, 422, "weights", "no attribute has a weight other than 0"),
        ({"weights": {}}, 422, "weights", "no attribute has a weight other than 0"),
        ({"weights": {"tone": "1"}}, 422, "weights.tone", "number"),
        ('{"items": ["a"], "weights": {"tone": NaN}}', 422, "weights.tone", "finite"),
        ('{"items": ["a"], "minimum": {"tone": 2}, "floor": Infinity}', 422, "floor", "finite"),
        ({"weights": {str(n): n for n in range(1000)}}, 413, "weights", "1000 attributes, and 64 are the most"),
        ({"minimum": {str(n): n for n in range(1000)}}, 413, "minimum", "1000 attributes"),
        ({"minimum": {"tone": 2}}, 422, "minimum", "minimum needs a floor"),
        ({"minimum": {"tone": 1}, "floor": 0}, 422, "minimum", "1 is no rating of 'tone' that can be missed"),
        ({"minimum": {"tome": 2}, "floor": 0}, 422, "minimum", "no attribute 'tome'"),
        ({"minimum": {"overall": 2}, "floor": 0}, 422, "minimum", "nobody has rated 'overall'"),
        ({"floor": 0}, 422, "floor", "floor is for answers that do not reach a minimum"),
        ({"min_probability": 1}, 422, "min_probability", "less than 1"),
    ],
    ids=str,
)
def test_refusals_name_the_field(judged_url, changes, status, field, reason):
    body = changes if isinstance(changes, str) else json.dumps({"items": ["a"], **changes})
    answer = requests.post(judged_url + "/score", body, headers={"Content-Type": "application/json"}, timeout=60)
    assert (answer.status_code, answer.json()["field"]) == (status, field), answer.text
    assert reason in answer.json()["error"]


@pytest.fixture(scope="module")
def judged_url(judged):
    with serve(DiscoReward(judged)) as url:
        yield url


def test_a_model_without_attributes(tiny_llama_dir, tiny_tokenizer):
    with serve(tiny_reward(tiny_llama_dir, tiny_tokenizer)) as url:
        [result] = post(url, items=["a"])["results"]
        assert result["attributes"] is None and result["cap"] is None
        assert requests.get(url + "/health", timeout=60).json()["attributes"] == {}
        for changes in ({"attribute": "tone"}, {"weights": WEIGHTS}, {"minimum": {"tone": 2}, "floor": 0}):
            answer = requests.post(url + "/score", json={"items": ["a"], **changes}, timeout=60)
            assert answer.status_code == 422 and "attribute" in answer.json()["error"]
        with pytest.raises(ValueError, match="does not know the attribute 'tone'; it knows 'overall'"):
            RemoteReward(url, attribute="tone")


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_the_client_rewards_and_logs_as_the_model_itself_does(path, url, view):
    logged: dict = {"local": {}, "remote": {}}
    rewards = {
        name: reward(PROMPTS, ANSWERS, log_metric=logged[name].__setitem__, log_extra=None)
        for name, reward in (("local", DiscoReward(path, **view)), ("remote", RemoteReward(url, **view)))
    }
    close(rewards["remote"], torch.tensor(rewards["local"]))
    kept = {key: value for key, value in logged["local"].items() if "shift" not in key and "drift" not in key}
    assert logged["remote"] == pytest.approx(kept, abs=1e-5)
    assert {"disco_mean/location/mean/length", "disco_mean/location/mean/tone"} <= kept.keys()
    assert ("disco_mean/below_minimum" in kept) == ("minimum" in view)


def test_the_client_refuses_what_the_server_has_not(judged_url):
    for view in ({"attribute": "tome"}, {"weights": {"tome": 1}}, {"minimum": {"tome": 1}, "floor": 0.0}):
        with pytest.raises(ValueError, match="does not know the attribute 'tome'; it knows 'overall', 'length', 'to"):
            RemoteReward(judged_url, **view)
    with pytest.raises(ServerError, match=r"weights: .*give one of them"):
        RemoteReward(judged_url, weights=WEIGHTS, attribute="tone")(PROMPTS, ANSWERS)


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_verl_gets_the_reward_and_logs_the_attributes(judged, judged_url, view):
    reward = DiscoReward(judged, **view)
    expected = reward.distribution(PROMPTS[:1], ANSWERS[:1])
    found = disco_trl.serving.verl.compute_score(
        "films", ANSWERS[0], None, {"prompt": PROMPTS[0]}, url=judged_url, **view
    )
    assert found["score"] == pytest.approx(reward(PROMPTS[:1], ANSWERS[:1])[0], abs=1e-5)
    assert found["location"] == pytest.approx(expected.location.item(), abs=1e-5)
    for name in RATINGS:
        location = DiscoReward(judged, attribute=name).distribution(PROMPTS[:1], ANSWERS[:1]).location.item()
        assert found[f"location_{name}"] == pytest.approx(location, abs=1e-5)
