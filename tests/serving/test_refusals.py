"""What the server refuses, and how it says so: bad input, a missing token, and a model that fails."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import torch
from reward_server import QUESTION, held_up, serve, tiny_reward
from server_questions import HEAD, close, located, post, raw, wait_for_queue

from disco_trl.data.tokenization import tokenize
from disco_trl.serving.bearer_token import checked_token


@pytest.fixture
def reward(tiny_llama_dir, tiny_tokenizer):
    return tiny_reward(tiny_llama_dir, tiny_tokenizer)


@pytest.fixture
def url(reward):
    with serve(reward) as url:
        yield url


@pytest.mark.parametrize(
    ("path", "request_body", "status", "field", "reason"),
    [
        ("/score", "[1, 2", 400, None, "not JSON"),
        ("/score", "", 400, None, "not JSON"),
        ("/score", "[" * 100_000, 400, None, "recursion limit"),
        ("/score", '{"items": ["a"], "pairs": ' + "[" * 20_000 + "]" * 20_000 + "}", 400, None, "recursion limit"),
        ("/get_reward", '{"query": ["a"], "labels": ' + '{"a":' * 201 + "1" + "}" * 202, 400, None, "recursion limit"),
        ("/score", "[]", 422, None, "JSON object"),
        ("/score", {}, 422, "items", "required"),
        ("/score", {"items": []}, 422, "items", "at least 1"),
        ("/score", {"items": "Good."}, 422, "items", "list"),
        ("/score", {"items": ["Good.", 3]}, 422, "items[1]", "must be a text"),
        ("/score", {"items": [None]}, 422, "items[0]", "must be a text"),
        ("/score", {"items": ["Good.", "\ud800"]}, 400, None, "hex escape at line 1 column 26"),
        ("/score", {"items": [[{"role": "user", "content": 3}]]}, 422, "items[0][0].content", "must be a text"),
        ("/score", {"items": [[{"content": "Good."}]]}, 422, "items[0][0].role", "required"),
        ("/score", {"items": [[]]}, 422, "items[0]", "at least 1"),
        (
            "/score",
            {"items": [[{"role": "user", "content": [{"url": ""}]}]]},
            422,
            "items[0][0].content",
            "text",
        ),
        ("/score", {"items": [{"prompt": "How?"}]}, 422, "items[0].completion", "required"),
        ("/score", {"items": [{"prompt": QUESTION, "completion": "Good."}]}, 422, "items[0]", "both"),
        ("/score", {"items": [{"completion": "a", "tools": "x"}]}, 422, "items[0].tools", "list"),
        (
            "/score",
            {"items": [{"completion": QUESTION, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}]},
            422,
            "items[0].chat_template_kwargs",
            "chat_template",
        ),
        ("/score", {"items": ["Good."], "transfrom": "mean"}, 422, "transfrom", "not permitted"),
        ("/score", {"items": ["Good."], "transform": "median"}, 422, "transform", "unknown"),
        ("/score", {"items": ["Good."], "transform": "quantile", "q": 2}, 422, "transform", "between 0 and 1"),
        ("/score", {"items": ["Good."], "transform": "quantile", "q": "0.5"}, 422, "q", "number"),
        ("/score", {"items": ["Good."], "k": 2}, 422, "transform", "no option 'k'"),
        ("/score", '{"items": ["Good."], "transform": "lower_bound", "k": NaN}', 422, "transform", "finite"),
        ("/score", {"items": ["Good.", "Bad."], "transform": "win_rate"}, 422, "items[0]", "'prompt' or 'group'"),
        ("/score", {"items": ["Good."], "pairs": [[0, 1]]}, 422, "pairs", "indices 0 to 0"),
        ("/score", {"items": ["Good."], "pairs": [[0]]}, 422, "pairs[0]", "at least 2"),
        ("/score", {"items": ["Good."], "pairs": [[0, 0.5]]}, 422, "pairs[0][1]", "integer"),
        ("/score", {"items": ["The film is good. " * 1000]}, 422, "items[0]", "2048 are the most"),
        (
            "/score",
            {"items": ["Good.", "a" * (64 * 2048 + 1)]},
            422,
            "items[1]",
            "131073 characters are more than 2048",
        ),
        ("/score", {"items": [[{"role": "a"}] * 30_000]}, 422, "items[0]", "150000 characters"),
        ("/get_reward", {"query": ["a" * (64 * 2048 + 1)]}, 422, "query[0]", "131073 characters"),
        (  # a prompt beside it is not tokenized, and does not count
            "/get_reward",
            {"query": ["a" * 64 * 2048], "prompts": ["b" * 64 * 2048]},
            422,
            "query[0]",
            "tokens, and 2048 are the most",
        ),
        ("/score", {"items": ["a"] * 1025}, 413, "items", "1024 are the most"),
        # Limits come before validation, and validation ends at the first error.
        ("/score", {"items": [1] * 500_000}, 413, "items", "1024 are the most"),
        ("/score", {"items": [[1] * 500_000]}, 422, "items[0][0]", "valid dictionary"),
        ("/score", {"items": ["a"], "pairs": [1] * 65_537}, 413, "pairs", "65536 are the most"),
        ("/score", {"items": ["a"], "pairs": [1] * 65_536}, 422, "pairs[0]", "valid list"),
        ("/score", {"items": ["a"], "pairs": [["x"] * 250_000]}, 422, "pairs[0][0]", "valid integer"),
        ("/score", {"items": ["a"], "x": 1, **{f"{n}": 1 for n in range(90_000)}}, 422, "x", "not permitted"),
        ("/score", {"items": [{"completion": [{"role": ""}], "tools": [1] * 300_000}]}, 422, "items[0].tools[0]", ""),
        ("/get_reward", {"query": ["a"], "prompts": [[]] * 1025}, 413, "prompts", "1024 are the most"),
        ("/get_reward", {"query": ["a"], "labels": [[]] * 1025}, 413, "labels", "1024 are the most"),
        ("/get_reward", {"query": "Good."}, 422, "query", "list"),
        ("/get_reward", {"query": ["Good.", 3]}, 422, "query[1]", "string"),
        ("/get_reward", {"query": ["Good."], "prompts": []}, 422, "prompts", "0 prompts for 1"),
        ("/get_reward", {"prompts": ["Good."]}, 422, "query", "required"),
        ("/nothing", {}, 404, None, "Not Found"),
    ],
)
def test_bad_input_is_refused_by_name(url, path, request_body, status, field, reason):
    body = request_body if isinstance(request_body, str) else json.dumps(request_body, separators=(",", ":"))
    response = requests.post(url + path, data=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert (response.status_code, response.json()["field"]) == (status, field), response.text
    assert reason in response.json()["error"] and "more)" not in response.json()["error"]
    assert located(post(url, items=["Good."])).isfinite().all()  # and the server goes on


def test_the_token_is_asked_for(reward):
    basic = base64.b64encode(b"anyone:s3cret").decode()
    with serve(reward, token="s3cret") as url:
        for header in (
            None,
            "Bearer wrong",
            "Bearer",
            "s3cret",
            "Basic !!",
            "Basic " + base64.b64encode(b"x").decode(),
        ):
            headers = {"Authorization": header} if header else {}
            response = requests.post(url + "/score", json={"items": ["Good."]}, headers=headers, timeout=60)
            assert response.status_code == 401 and "Bearer TOKEN" in response.json()["error"], header
        for header in ("Bearer s3cret", f"Basic {basic}"):
            headers = {"Authorization": header}
            assert requests.post(url + "/score", json={"items": ["Good."]}, headers=headers, timeout=60).ok
        # OpenRLHF takes a URL and no headers.
        with_token = url.replace("http://", "http://anyone:s3cret@") + "/get_reward"
        assert requests.post(with_token, json={"query": ["Good."]}, timeout=60).ok
        assert requests.get(url + "/metrics", timeout=60).status_code == 401
        assert requests.get(url + "/health", timeout=60).json()["status"] == "ready"


@pytest.mark.parametrize(
    "line",
    [
        "POST /health",
        "HEAD /health",
        "GET /health/",
        "GET //health",
        "GET /healthz",
        "GET /%68ealth",
        "GET /health%2f",
        "GET /./health",
        "GET /health;x",
        "GET http://test/health",
        "GET /openapi.json",
    ],
)
def test_only_health_to_the_letter_needs_no_token(reward, line):
    with serve(reward, token="s3cret") as url:
        answer = raw(url, f"{line} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
        assert b" 401 " in answer.splitlines()[0]


def test_health_with_a_body_needs_the_token(reward):
    with serve(reward, token="s3cret") as url:
        for body in (b"Content-Length: 1\r\n\r\nx", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"):
            answer = raw(url, b"GET /health HTTP/1.1\r\nHost: test\r\n" + body)
            assert b" 401 " in answer.splitlines()[0]


def test_whitespace_around_the_token_does_not_count(reward):
    basic = base64.b64encode(b"anyone:s3cret\n").decode()
    with serve(reward, token=checked_token(" s3cret\n", "token")) as url:
        for header in ("Bearer s3cret  ", "Bearer   s3cret", f"Basic {basic}"):
            response = requests.get(url + "/metrics", headers={"Authorization": header}, timeout=60)
            assert response.ok, header
        for header in ("Bearer s3 cret", "Bearer", "Bearers3cret"):
            response = requests.get(url + "/metrics", headers={"Authorization": header}, timeout=60)
            assert response.status_code == 401, header


def test_a_body_of_two_lengths_ends_the_connection(url):
    smuggled = b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n"
    head = HEAD.replace(b"Connection: close\r\n", b"") + b"Transfer-Encoding: chunked\r\n"
    answer = raw(url, head + f"Content-Length: {5 + len(smuggled)}\r\n\r\n0\r\n\r\n".encode() + smuggled)
    assert b" 400 " in answer.splitlines()[0] and b"Content-Length and Transfer-Encoding" in answer
    assert answer.count(b"HTTP/1.1") == 1


# Failures of the model


def test_a_reward_that_is_not_a_number_is_an_error(reward, url):
    with torch.no_grad():
        reward.model.score.weight.fill_(torch.nan)
    response = requests.post(url + "/score", json={"items": ["Good."]}, timeout=60)
    assert response.status_code == 500
    assert response.json()["field"] == "items[0]" and "not finite" in response.json()["error"]


def test_a_request_that_the_model_fails_on_fails_alone(reward):
    [bad_token] = set(tokenize(reward.processing_class, "~")) - {reward.processing_class.eos_token_id}

    def fail(model, args, kwargs) -> None:
        if (kwargs["input_ids"] == bad_token).any():
            raise RuntimeError("no memory")

    with serve(reward) as url, ThreadPoolExecutor(4) as clients, held_up(reward.model) as barrier:
        hook = reward.model.register_forward_pre_hook(fail, with_kwargs=True)
        first = clients.submit(post, url, items=["First."])
        assert barrier.entered.wait(60)
        bad = clients.submit(requests.post, url + "/score", json={"items": ["~", "Good."]}, timeout=60)
        good = clients.submit(post, url, items=["Good."])
        wait_for_queue(url, lambda waiting: waiting >= 8)
        barrier.open.set()
        assert bad.result().status_code == 500 and "the model failed" in bad.result().json()["error"]
        hook.remove()
        close(located(good.result()), reward.distribution([""], ["Good."]).location)
        assert len(first.result()["results"]) == 1
