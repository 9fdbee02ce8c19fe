"""Limits of the server: bodies, the queue, and clients that leave."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
import requests
from reward_server import held_up, serve, tiny_reward
from server_questions import HEAD, metric, post, raw, wait_for_queue

from disco_trl.data.tokenization import tokenize


@pytest.fixture
def reward(tiny_llama_dir, tiny_tokenizer):
    return tiny_reward(tiny_llama_dir, tiny_tokenizer)


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
