"""The event loop computes nothing: while one request is read, scored or answered, others are talked to."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import requests
from reward_server import ANSWERS, serve, tiny_reward
from server_questions import close, located, post

from disco_trl.distributions.transforms import Transform


@pytest.fixture
def reward(tiny_llama_dir, tiny_tokenizer):
    return tiny_reward(tiny_llama_dir, tiny_tokenizer)


@dataclass(frozen=True)
class Waiting(Transform):
    """The location, once it may be computed."""

    name = "waiting"
    entered: threading.Event = field(default_factory=threading.Event)
    open: threading.Event = field(default_factory=threading.Event)

    def _of(self, reward, group):
        self.entered.set()
        assert self.open.wait(60)
        return reward.location


def test_health_is_answered_while_an_answer_is_computed(reward):
    reward.transform = waiting = Waiting()
    with serve(reward) as url, ThreadPoolExecutor(1) as clients:
        heavy = clients.submit(post, url, items=ANSWERS)
        assert waiting.entered.wait(60)
        assert requests.get(url + "/health", timeout=60).ok and not heavy.done()
        waiting.open.set()
        close(located(heavy.result()), reward.distribution([""] * 4, ANSWERS).location)


def test_health_is_answered_while_requests_are_read(reward, monkeypatch):
    entered, opened = threading.Event(), threading.Event()
    tokenize = reward.tokenize

    def slowly(*args, **kwargs):
        entered.set()
        assert opened.wait(60)
        return tokenize(*args, **kwargs)

    monkeypatch.setattr(reward, "tokenize", slowly)
    with serve(reward) as url, ThreadPoolExecutor(2) as clients:
        heavy = clients.submit(post, url, items=ANSWERS)
        assert entered.wait(60)
        # Validation waits for its turn in the same thread: were it done in the event loop, it would not.
        invalid = clients.submit(requests.post, url + "/score", json={"items": [1]}, timeout=60)
        for _ in range(50):
            assert requests.get(url + "/health", timeout=60).ok
        assert not heavy.done() and not invalid.done()
        opened.set()
        assert len(heavy.result()["results"]) == 4 and invalid.result().status_code == 422


def test_comparisons_have_a_limit(reward):
    items = [{"completion": answer, "group": "a"} for answer in ANSWERS]  # 6 pairs
    with serve(reward, max_pairs_per_request=6) as url:
        assert len(post(url, items=items, transform="win_rate")["results"]) == 4
        pairs = [[0, 1]] * 6
        assert len(post(url, items=items, pairs=pairs)["prob_greater"]) == 6
        for request in ({"pairs": [[0, 1]] * 7}, {"pairs": [[0, 1]], "transform": "win_rate"}):
            refused = requests.post(url + "/score", json={"items": items, **request}, timeout=60)
            assert refused.status_code == 413 and "7 pairs" in refused.json()["error"]
            assert "6 are the most" in refused.json()["error"]


def test_the_schema_describes_every_body(reward):
    with serve(reward) as url:
        schema = requests.get(url + "/openapi.json", timeout=60).json()

    def references(node):
        if isinstance(node, dict):
            yield from [node["$ref"]] if "$ref" in node else []
            node = list(node.values())
        if isinstance(node, list):
            for child in node:
                yield from references(child)

    names = {name.removeprefix("#/components/schemas/") for name in references(schema)}
    assert {"ScoreRequest", "RewardRequest", "ScoreResponse"} <= names <= schema["components"]["schemas"].keys()
