"""Running the server: health, metrics, shutdown, and arguments that it does not start with."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from reward_server import ANSWERS, serve, tiny_reward
from server_questions import close, located, post, wait_for_queue

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
