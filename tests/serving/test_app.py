"""`disco_trl.serving.app`, `gate`, `wire` and `batching`: a real server, asked over HTTP."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
import requests
import torch
from reward_server import ANSWERS, MESSAGES, QUESTION, held_up, serve, tiny_reward
from tiny_training import TOOL
from tokenizers.processors import TemplateProcessing

from disco_trl.cli.main import main
from disco_trl.data.tokenization import tokenize
from disco_trl.distributions.transforms import get_transform
from disco_trl.serving.app import RenderedTexts


@pytest.fixture
def reward(tiny_llama_dir, tiny_tokenizer):
    return tiny_reward(tiny_llama_dir, tiny_tokenizer)


@pytest.fixture
def url(reward):
    with serve(reward) as url:
        yield url


def post(url: str, path: str = "/score", **request) -> dict:
    response = requests.post(url + path, json=request, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def located(answer: dict) -> torch.Tensor:
    return torch.tensor([result["location"] for result in answer["results"]])


def close(actual, expected) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), expected, rtol=0, atol=1e-5)


def metric(url: str, name: str, **labels: str) -> float:
    wanted = name + ("{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}" if labels else "")
    for line in requests.get(url + "/metrics", timeout=60).text.splitlines():
        if line.startswith(wanted + " "):
            return float(line.split()[-1])
    return 0.0


def wait_for_queue(url: str, is_right) -> None:
    """Ask the server until the number of tokens in its queue is right."""
    for _ in range(10_000):
        if is_right(requests.get(url + "/health", timeout=60).json()["queue_tokens"]):
            return
    pytest.fail("the queue never came to that")


# Right answers


def test_items_of_every_kind_are_scored_as_training_tokenizes_them(reward, url):
    items = [
        "Good.",
        QUESTION + MESSAGES[0],
        {"prompt": "How? ", "completion": "Good."},
        {"prompt": QUESTION, "completion": MESSAGES[0]},
        {"prompt": QUESTION, "completion": MESSAGES[0], "tools": [TOOL]},
        {"completion": MESSAGES[0], "chat_template_kwargs": {"add_generation_prompt": True}},
        {"completion": [{"role": "assistant", "content": [{"type": "text", "text": "Good."}]}]},
    ]
    expected = reward.distribution(
        ["", QUESTION, "How? ", QUESTION, QUESTION, [], []],
        ["Good.", MESSAGES[0], "Good.", MESSAGES[0], MESSAGES[0], MESSAGES[0], items[-1]["completion"]],
        tools=[None, None, None, None, [TOOL], None, None],
        chat_template_kwargs=[None, None, None, None, None, {"add_generation_prompt": True}, None],
    )
    answer = post(url, items=items)
    close(located(answer), expected.location)
    close([result["scale"] for result in answer["results"]], expected.scale)
    close([result["reward"] for result in answer["results"]], expected.location)
    assert answer["family"] == "normal" and answer["transform"] == "mean" and answer["prob_greater"] == []
    assert len(set(located(answer).tolist())) == 6  # the messages with and without a `prompt` are one text


def test_many_clients_at_once_get_their_own_answers(reward, url):
    texts = [f"{answer} {number}" for number in range(40) for answer in ANSWERS]
    expected = reward.distribution([""] * len(texts), texts).location
    requested = [list(range(start, min(start + 1 + start % 7, len(texts)))) for start in range(0, len(texts), 3)]
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda rows: post(url, items=[texts[row] for row in rows]), requested))
    for rows, answer in zip(requested, answers, strict=True):
        close(located(answer), expected[rows])


def test_what_waits_goes_through_the_model_together(reward):
    with serve(reward) as url, ThreadPoolExecutor(9) as clients, held_up(reward.model) as barrier:
        first = clients.submit(post, url, items=["First."])
        assert barrier.entered.wait(60)
        others = [clients.submit(post, url, items=[answer] * 2) for answer in ANSWERS]
        tokens = 2 * sum(len(tokenize(reward.processing_class, answer)) for answer in ANSWERS)
        wait_for_queue(url, lambda waiting: waiting == tokens)
        barrier.open.set()
        close(located(first.result()), reward.distribution([""], ["First."]).location)
        for answer, other in zip(ANSWERS, others, strict=True):
            close(located(other.result()), reward.distribution([""] * 2, [answer] * 2).location)
        assert metric(url, "disco_batch_texts_count") == 2
        assert metric(url, "disco_texts_total") == 9


def test_batches_keep_to_their_budget_and_requests_may_straddle_them(reward):
    texts = ["The answer is short. " * (1 + row % 4) for row in range(20)]
    lengths = [len(tokenize(reward.processing_class, text)) for text in texts]
    with serve(reward, max_batch_tokens=max(lengths) + 1) as url:
        answer = post(url, items=texts)
        close(located(answer), reward.distribution([""] * 20, texts).location)
        assert 20 > metric(url, "disco_batch_texts_count") >= sum(lengths) / (max(lengths) + 1)


@pytest.mark.parametrize(
    ("transform", "options"),
    [("lower_bound", {"k": 2}), ("quantile", {"q": 0.25}), ("certainty_equivalent", {"beta": 3.0}), ("mean", {})],
)
def test_a_request_may_choose_its_transform(reward, url, transform, options):
    found = reward.distribution([""] * 4, ANSWERS)
    answer = post(url, items=ANSWERS, transform=transform, **options)
    close([result["reward"] for result in answer["results"]], get_transform(transform, **options)(found))
    assert answer["transform"] == transform


def test_the_servers_own_transform_is_the_default(tiny_llama_dir, tiny_tokenizer):
    reward = tiny_reward(tiny_llama_dir, tiny_tokenizer, "lower_bound", k=0.5)
    found = reward.distribution([""] * 4, ANSWERS)
    with serve(reward) as url:
        answer, bolder = post(url, items=ANSWERS), post(url, items=ANSWERS, k=0.25)
    close([result["reward"] for result in answer["results"]], found.location - 0.5 * found.scale)
    close([result["reward"] for result in bolder["results"]], found.location - 0.25 * found.scale)


def test_draws_differ_from_request_to_request_unless_seeded(url):
    def draws(**request):
        return [result["reward"] for result in post(url, items=ANSWERS, transform="sample", **request)["results"]]

    assert draws() != draws()
    assert draws(seed=3) == draws(seed=3)


@pytest.mark.parametrize("named_by", ["prompt", "group"])
def test_win_rate_is_worked_out_within_the_request(reward, url, named_by):
    rows = [0, 1, 0, 0, 1, 2]
    completions = [*ANSWERS, "No.", "Alone."]
    prompts = ["A? ", "B? ", "C? "]
    items = [{"prompt": prompts[row], "completion": text} for row, text in zip(rows, completions, strict=True)]
    if named_by == "group":
        items = [
            {"completion": item["prompt"] + item["completion"], "group": f"{row}"}
            for row, item in zip(rows, items, strict=True)
        ]
    found = reward.distribution([prompts[row] for row in rows], completions)
    expected = get_transform("win_rate")(found, torch.tensor(rows))
    answer = post(url, items=items, transform="win_rate")
    close([result["reward"] for result in answer["results"]], expected)


def test_pairs_of_items_are_compared(reward, url):
    pairs = [[0, 1], [1, 0], [2, 3], [3, 3]]
    found = reward.distribution([""] * 4, ANSWERS)
    answer = post(url, items=ANSWERS, pairs=pairs)
    close(answer["prob_greater"], found[[0, 1, 2, 3]].prob_greater(found[[1, 0, 3, 3]]))
    assert answer["prob_greater"][0] + answer["prob_greater"][1] == pytest.approx(1)


# OpenRLHF


def test_openrlhfs_contract(reward, url):
    def rendered(messages, **kwargs):
        return reward.processing_class.apply_chat_template(messages, tokenize=False, **kwargs)

    prompt = rendered(QUESTION, add_generation_prompt=True)
    queries = [f"{prompt}{answer}<|im_end|>" for answer in ANSWERS]  # a policy stops at its end-of-turn token
    expected = reward.distribution([QUESTION] * 4, MESSAGES)
    request = {"query": queries, "prompts": [prompt] * 4, "labels": [None, "x", 3, {}]}
    answer = post(url, "/get_reward", **request)
    close(answer["rewards"], expected.location)
    assert answer["scores"] == answer["rewards"]
    close(answer["extra_logs"]["location"], expected.location)
    close(answer["extra_logs"]["scale"], expected.scale)
    assert post(url, "/get_reward", query=queries[:1])["rewards"] == pytest.approx(answer["rewards"][:1], abs=1e-5)


def test_openrlhfs_prompts_are_the_groups_of_win_rate(tiny_llama_dir, tiny_tokenizer):
    reward = tiny_reward(tiny_llama_dir, tiny_tokenizer, "win_rate")
    expected = get_transform("win_rate")(reward.distribution([""] * 4, ANSWERS), torch.tensor([0, 0, 1, 1]))
    with serve(reward) as url:
        close(post(url, "/get_reward", query=ANSWERS, prompts=["a", "a", "b", "b"])["rewards"], expected)
        alone = requests.post(url + "/get_reward", json={"query": ANSWERS[:1], "prompts": ["a"]}, timeout=60)
    assert alone.status_code == 422 and "no two of these are" in alone.json()["error"]


def with_beginning_of_text(tokenizer):
    """A tokenizer as Llama's: it puts a token before plain text, and its chat template writes that token itself."""
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    return tokenizer


@pytest.mark.parametrize("has_bos", [False, True])
@pytest.mark.parametrize("end", ["<|im_end|>\n", "<|im_end|>", "", "<|im_end|><|pad|><|pad|>"])
def test_a_rendered_conversation_gets_the_tokens_of_training(tiny_tokenizer, has_bos, end):
    tokenizer = with_beginning_of_text(tiny_tokenizer) if has_bos else tiny_tokenizer
    conversation = QUESTION + MESSAGES[1] + QUESTION
    prompt = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    # As an engine sends it: ids of prompt and answer, decoded with their special tokens.
    ids = tokenizer(prompt + ANSWERS[0] + end, add_special_tokens=False)["input_ids"]
    sent = tokenizer.decode(ids, skip_special_tokens=False)
    expected = tokenize(tokenizer, conversation + MESSAGES[0])
    assert RenderedTexts(tokenizer)(sent) == expected
    assert expected.count(tokenizer.convert_tokens_to_ids("<|begin|>")) == has_bos


@pytest.mark.parametrize("sent", ["The film is good.", "<|begin|>The film is good.", "The film is good.<|im_end|>"])
def test_plain_text_gets_the_tokens_of_training(tiny_tokenizer, sent):
    tokenizer = with_beginning_of_text(tiny_tokenizer)
    expected = tokenize(tokenizer, "The film is good.")
    assert RenderedTexts(tokenizer)(sent) == expected
    assert expected[0] == tokenizer.bos_token_id != expected[1] and expected[-1] == tokenizer.eos_token_id


def test_without_a_chat_template_every_text_is_plain(tiny_tokenizer):
    tiny_tokenizer.chat_template = None
    assert RenderedTexts(tiny_tokenizer)("Good.") == tokenize(tiny_tokenizer, "Good.")


# Refusals


@pytest.mark.parametrize(
    ("path", "request_body", "status", "field", "reason"),
    [
        ("/score", "[1, 2", 400, None, "not JSON"),
        ("/score", "", 422, None, "JSON object"),
        ("/score", "[" * 100_000, 400, None, ""),
        ("/score", "[]", 422, None, "JSON object"),
        ("/score", {}, 422, "items", "required"),
        ("/score", {"items": []}, 422, "items", "at least 1"),
        ("/score", {"items": "Good."}, 422, "items", "list"),
        ("/score", {"items": ["Good.", 3]}, 422, "items[1]", "must be a text"),
        ("/score", {"items": [None]}, 422, "items[0]", "must be a text"),
        ("/score", {"items": ["Good.", "\ud800"]}, 422, "items[1]", "cannot be tokenized"),
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
        ("/score", {"items": ["a"] * 1025}, 413, "items", "1024 are the most"),
        ("/get_reward", {"query": "Good."}, 422, "query", "list"),
        ("/get_reward", {"query": ["Good.", 3]}, 422, "query[1]", "string"),
        ("/get_reward", {"query": ["Good."], "prompts": []}, 422, "prompts", "0 prompts for 1"),
        ("/get_reward", {"prompts": ["Good."]}, 422, "query", "required"),
        ("/nothing", {}, 404, None, "Not Found"),
    ],
)
def test_bad_input_is_refused_by_name(url, path, request_body, status, field, reason):
    body = request_body if isinstance(request_body, str) else json.dumps(request_body)
    response = requests.post(url + path, data=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert (response.status_code, response.json()["field"]) == (status, field), response.text
    assert reason in response.json()["error"]
    assert located(post(url, items=["Good."])).isfinite().all()  # and the server goes on


def raw(url: str, *parts: bytes) -> bytes:
    """What the server says to bytes sent over a fresh connection, until it closes it."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


HEAD = b"POST /score HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        # Announced and never sent; sent in chunks of no announced length.
        (HEAD + b"Content-Length: 5000\r\n\r\n",),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"7d0\r\n" + b" " * 2000 + b"\r\n"),
    ],
    ids=["announced", "chunked"],
)
def test_a_body_is_not_read_beyond_the_limit(reward, parts):
    with serve(reward, max_body_bytes=1000, body_seconds=0.5) as url:
        answer = raw(url, *parts)
        assert b" 413 " in answer.splitlines()[0] and b"larger than 1000 bytes" in answer
        assert metric(url, "disco_requests_total", path="/score", status="413") == 1


@pytest.mark.parametrize("length", [b"Content-Length: 20000000", b"Transfer-Encoding: chunked"])
def test_who_is_refused_may_end_the_body_and_loses_no_answer(reward, length):
    with serve(reward, max_body_bytes=1000) as url:
        address = urlsplit(url)
        with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
            connection.sendall(HEAD + length + b"\r\n\r\n")
            if b"chunked" in length:
                connection.sendall(b"1312d00\r\n" + b" " * 2000)
            answer = connection.recv(65536)
            # Were the connection closed by now, these bytes would be answered by a reset.
            connection.sendall(b" " * (20_000_000 - 2000 * (b"chunked" in length)))
            connection.sendall(b"\r\n0\r\n\r\n" * (b"chunked" in length))
            while chunk := connection.recv(65536):
                answer += chunk
        assert b" 413 " in answer.splitlines()[0] and b"larger than 1000 bytes" in answer


def test_a_body_that_never_comes_is_not_waited_for(reward):
    with serve(reward, body_seconds=0.1) as url:
        answer = raw(url, HEAD + b"Content-Length: 500\r\n\r\n", b'{"items": ')
        assert b" 408 " in answer.splitlines()[0] and b"did not arrive in 0.1 s" in answer


def test_the_bodies_of_all_requests_have_a_limit(reward):
    with serve(reward, max_bodies_bytes=100) as url:
        response = requests.post(url + "/score", json={"items": ["Good. " * 30]}, timeout=60)
        assert response.status_code == 503 and response.headers["Retry-After"] == "1"
        assert len(post(url, items=["Good."])["results"]) == 1  # the place is free again


def test_a_full_queue_is_a_503_that_says_when_to_come_back(reward):
    tokens = len(tokenize(reward.processing_class, "Good."))
    with serve(reward, max_queue=2 * tokens) as url:
        with ThreadPoolExecutor(3) as clients, held_up(reward.model) as barrier:
            first = clients.submit(post, url, items=["Good."])
            assert barrier.entered.wait(60)  # out of the queue, and in the model
            second = clients.submit(post, url, items=["Good.", "Good."])
            wait_for_queue(url, lambda waiting: waiting == 2 * tokens)
            refused = requests.post(url + "/score", json={"items": ["Good."]}, timeout=60)
            assert refused.status_code == 503 and int(refused.headers["Retry-After"]) >= 1
            barrier.open.set()
            assert len(first.result()["results"]) == 1 and len(second.result()["results"]) == 2
        never = requests.post(url + "/score", json={"items": ["Good."] * 3}, timeout=60)
        assert never.status_code == 413 and "send fewer" in never.json()["error"]
        assert metric(url, "disco_requests_total", path="/score", status="503") == 1


def test_a_client_that_leaves_frees_its_place(reward):
    tokens = len(tokenize(reward.processing_class, "Good."))
    with serve(reward, max_queue=tokens) as url, ThreadPoolExecutor(2) as clients, held_up(reward.model) as barrier:
        first = clients.submit(post, url, items=["Good."])
        assert barrier.entered.wait(60)
        address = urlsplit(url)
        body = json.dumps({"items": ["Good."]}).encode()
        with socket.create_connection((address.hostname, address.port), timeout=60) as leaver:
            leaver.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_for_queue(url, lambda waiting: waiting == tokens)
        wait_for_queue(url, lambda waiting: waiting == 0)
        second = clients.submit(post, url, items=["Good."])
        wait_for_queue(url, lambda waiting: waiting == tokens)
        barrier.open.set()
        assert first.result() == second.result()
        assert metric(url, "disco_requests_total", path="/score", status="disconnected") == 1
        assert metric(url, "disco_texts_total") == 2  # the leaver's was never scored


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


# Operation


def test_health_and_metrics(reward, url):
    health = requests.get(url + "/health", timeout=60).json()
    assert health["status"] == "ready" and health["family"] == "normal" and health["transform"] == "mean"
    assert health["max_tokens"] == 2048 and health["queue_tokens"] == 0
    post(url, items=ANSWERS)
    requests.post(url + "/score", data="{", headers={"Content-Type": "application/json"}, timeout=60)
    requests.get(url + "/else", timeout=60)
    response = requests.get(url + "/metrics", timeout=60)
    assert response.headers["Content-Type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    tokens = sum(len(tokenize(reward.processing_class, answer)) for answer in ANSWERS)
    expected = {
        'disco_requests_total{path="/score",status="200"}': 1,
        'disco_requests_total{path="/score",status="400"}': 1,
        'disco_requests_total{path="other",status="404"}': 1,
        'disco_request_seconds_count{path="/score"}': 2,
        "disco_texts_total": 4,
        "disco_tokens_total": tokens,
        "disco_batch_texts_sum": 4,
        "disco_queue_tokens": 0,
    }
    assert {name: float(lines[name]) for name in expected} == expected


def test_sigterm_answers_what_was_accepted_and_takes_no_more(reward, tmp_path):
    reward.model.save_pretrained(tmp_path)
    reward.processing_class.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "disco_trl", "serve", str(tmp_path), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    texts = [f"The film is good, and short. {number} " * 20 for number in range(150)]
    tokens = sum(len(tokenize(reward.processing_class, text)) for text in texts)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            for line in server.stderr:
                if found := re.search(r"running on (http://\S+)", line):
                    url = found[1]
                    break
            with ThreadPoolExecutor(3) as clients:
                answers = [clients.submit(post, url, items=texts) for _ in range(3)]
                wait_for_queue(url, lambda waiting: waiting > 2 * tokens)  # all three are accepted
                server.send_signal(signal.SIGTERM)
                for line in server.stderr:
                    if "Shutting down" in line:
                        break
                with pytest.raises(requests.ConnectionError):
                    requests.get(url + "/health", timeout=60)
                assert not all(answer.done() for answer in answers)
                expected = reward.distribution([""] * len(texts), texts).location
                for answer in answers:
                    close(located(answer.result()), expected)
            assert "Application shutdown complete" in server.stderr.read()
            assert server.wait(60) in (0, -signal.SIGTERM)
        finally:
            server.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "set DISCO_TRL_TOKEN"),
        (["--host", "example.org"], "set DISCO_TRL_TOKEN"),
        (["--transform", "quantile", "--q", "2"], "between 0 and 1"),
        (["--k", "1"], "no option 'k'"),
        ([], "language model without a reward head"),
    ],
)
def test_the_command_refuses_to_start(tiny_llama_dir, monkeypatch, arguments, message):
    monkeypatch.delenv("DISCO_TRL_TOKEN", raising=False)
    with pytest.raises(SystemExit, match=message):
        main(["serve", tiny_llama_dir, *arguments])


def test_the_command_refuses_limits_below_one(tiny_llama_dir, capsys):
    with pytest.raises(SystemExit):
        main(["serve", tiny_llama_dir, "--max_queue", "0"])
    assert "--max_queue 0 must be at least 1" in capsys.readouterr().err
