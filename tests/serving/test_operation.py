"""Running the server: health, metrics, shutdown, and arguments that it does not start with."""

import contextlib
import json
import re
import select
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from reward_server import ANSWERS, held_up, serve, serve_in_process, tiny_reward
from server_questions import HEAD, close, located, post, wait_for_queue

from disco_trl.cli.main import main
from disco_trl.data.tokenization import tokenize


@pytest.fixture
def reward(tiny_llama_dir, tiny_tokenizer):
    return tiny_reward(tiny_llama_dir, tiny_tokenizer)


@pytest.fixture
def url(reward):
    with serve(reward) as url:
        yield url


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
    texts = [f"The film is good, and short. {number} " * 20 for number in range(150)]
    tokens = sum(len(tokenize(reward.processing_class, text)) for text in texts)
    with serve_in_process(str(tmp_path)) as (server, url):
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


def test_a_shutdown_gives_up_what_takes_too_long(reward):
    reward.distribution([""], ["Good."])  # the first call tries the model
    calls = []
    reward.model.register_forward_pre_hook(lambda *_: calls.append(None))
    with ThreadPoolExecutor(2) as clients, held_up(reward.model) as barrier:
        with contextlib.ExitStack() as running:
            url = running.enter_context(serve(reward, shutdown_seconds=1))
            tokens = len(tokenize(reward.processing_class, "Good."))
            in_the_model = clients.submit(requests.post, url + "/score", json={"items": ["Good."]}, timeout=60)
            assert barrier.entered.wait(60)
            queued = clients.submit(requests.post, url + "/score", json={"items": ["Good."]}, timeout=60)
            wait_for_queue(url, lambda waiting: waiting == tokens)
            stopping = threading.Thread(target=running.pop_all().close)
            stopping.start()
            for response in (in_the_model.result(), queued.result()):
                assert response.status_code == 503 and response.json()["error"] == "the server is shutting down"
            barrier.open.set()  # a batch that runs is waited for
            stopping.join()
    assert len(calls) == 1


@pytest.mark.parametrize("seconds", [{"shutdown_seconds": 1, "answer_seconds": 10_000}, {"answer_seconds": 0.1}])
def test_a_client_that_does_not_read_holds_up_no_shutdown(reward, seconds):
    body = json.dumps({"items": ["Good."] * 1024}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with serve(reward, send_buffer=4096, **{"shutdown_seconds": 10_000, **seconds}) as url:
            connection.connect(("127.0.0.1", int(url.rpartition(":")[2])))
            connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert select.select([connection], [], [], 60)[0]  # the answer has begun
        # Leaving the block has shut the server down, and the rest of the answer is lost. (The system closes the
        # connection when it ends a process, and here the process goes on.)
        answer = b""
        connection.settimeout(0.5)
        with contextlib.suppress(ConnectionResetError, TimeoutError):
            while chunk := connection.recv(65536):
                answer += chunk
    head, _, content = answer.partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0]
    assert len(content) < int(re.search(rb"content-length: (\d+)", head)[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "set DISCO_TRL_TOKEN"),
        (["--host", "example.org"], "set DISCO_TRL_TOKEN"),
        (["--transform", "quantile", "--q", "2"], "between 0 and 1"),
        (["--k", "1"], "no option 'k'"),
        ([], "language model without a reward head"),
        (["--token", " "], "--token is set, but empty"),
        (["--token", "two words"], "--token contains a space"),
        (["--token", "schlüssel"], "--token contains .* outside ASCII"),
    ],
)
def test_the_command_refuses_to_start(tiny_llama_dir, monkeypatch, arguments, message):
    monkeypatch.delenv("DISCO_TRL_TOKEN", raising=False)
    with pytest.raises(SystemExit, match=message):
        main(["serve", tiny_llama_dir, *arguments])


def test_a_token_that_is_lost_on_the_way_is_not_an_open_server(tiny_llama_dir, monkeypatch):
    monkeypatch.setenv("DISCO_TRL_TOKEN", "")
    with pytest.raises(SystemExit, match="DISCO_TRL_TOKEN is set, but empty"):
        main(["serve", tiny_llama_dir])


def test_the_command_refuses_limits_below_one(tiny_llama_dir, capsys):
    with pytest.raises(SystemExit):
        main(["serve", tiny_llama_dir, "--max_queue", "0"])
    assert "--max_queue 0 must be at least 1" in capsys.readouterr().err
