"""Connections on which no request, or no reader, arrives: they cost little, and keep nobody out."""

import contextlib
import json
import resource
import select
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from reward_server import held_up, serve, serve_in_process, tiny_reward
from server_questions import HEAD, metric, post, wait_for_queue

from disco_trl.data.tokenization import tokenize
from disco_trl.serving.connections import BACKLOG, MAX_HEAD_BYTES, OTHER_FILES, fit_open_files
from disco_trl.serving.middleware import MAX_DISCARDING, Limits


HALF_HEAD = b"POST /score HTTP/1.1\r\nHost: test\r\nX: "


@pytest.fixture
def reward(tiny_llama_dir, tiny_tokenizer):
    return tiny_reward(tiny_llama_dir, tiny_tokenizer)


def connect(url: str) -> socket.socket:
    address = urlsplit(url)
    return socket.create_connection((address.hostname, address.port), timeout=60)


def rest_of(connection: socket.socket) -> bytes:
    """What the server still says, until it closes the connection, with or without a reset."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def test_a_head_has_an_end(reward):
    line = b"X: " + b"x" * 1000 + b"\r\n"
    most = 2**26
    with serve(reward) as url, connect(url) as connection:
        sent = len(HALF_HEAD)
        connection.sendall(HALF_HEAD)
        with contextlib.suppress(ConnectionError):
            while sent < most:
                sent += connection.send(line * 100)
        # What the system's buffers hold was sent as well.
        assert MAX_HEAD_BYTES < sent < most


def test_a_head_has_so_many_lines(reward):
    with serve(reward) as url, connect(url) as connection:
        connection.sendall(HEAD + b"a:\r\n" * 200 + b"\r\n")
        answer = rest_of(connection)
    assert b" 431 " in answer.splitlines()[0] and b"100 are the most" in answer


HEALTH = b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n"


@pytest.mark.parametrize(("start", "status"), [(b"", b""), (HALF_HEAD, b""), (HEALTH + HALF_HEAD, b" 200 ")])
def test_a_head_has_to_arrive_in_time(reward, start, status):
    with serve(reward, head_seconds=0.3) as url, connect(url) as connection:
        connection.sendall(start)
        connection.settimeout(0.01)
        answer = b""
        while True:
            try:
                chunk = connection.recv(65536)
            except TimeoutError:
                with contextlib.suppress(ConnectionError):
                    connection.send(b"x" if start else b"")  # a byte from time to time does not prolong the wait
                continue
            except ConnectionResetError:
                break
            answer += chunk
            if not chunk:
                break
    assert status in answer and bool(status) == bool(answer)


def test_who_sends_nothing_keeps_nobody_out(reward):
    with serve(reward, max_connections=8, head_seconds=600) as url, contextlib.ExitStack() as connections:
        idle = [connections.enter_context(connect(url)) for _ in range(50)]
        for connection in idle:
            with contextlib.suppress(ConnectionError):  # it may have been closed for the next one by now
                connection.sendall(HALF_HEAD)
        assert len(post(url, items=["Good."])["results"]) == 1
        # The longest wait ends first.
        assert all(rest_of(connection) == b"" for connection in idle[:42])


def test_a_request_is_not_given_up_for_who_comes_later(reward):
    with (
        serve(reward, max_connections=8, head_seconds=600) as url,
        contextlib.ExitStack() as connections,
        ThreadPoolExecutor(1) as clients,
        held_up(reward.model) as barrier,
    ):
        first = clients.submit(post, url, items=["Good."])
        assert barrier.entered.wait(60)
        for _ in range(50):
            connections.enter_context(connect(url)).sendall(HALF_HEAD[:1])
        assert requests.get(url + "/health", timeout=60).ok
        barrier.open.set()
        assert len(first.result()["results"]) == 1


def test_more_requests_than_connections_are_told_to_come_back(reward):
    with serve(reward, max_connections=16) as url, ThreadPoolExecutor(14) as clients, held_up(reward.model) as barrier:
        tokens = len(tokenize(reward.processing_class, "Good."))
        accepted = [clients.submit(post, url, items=["Good."])]
        assert barrier.entered.wait(60)
        accepted += [clients.submit(post, url, items=["Good."]) for _ in range(13)]
        wait_for_queue(url, lambda waiting: waiting == 13 * tokens)  # seven eighths have their place
        refused = requests.post(url + "/score", json={"items": ["Good."]}, timeout=60)
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
        assert requests.get(url + "/health", timeout=60).ok  # needs no place
        barrier.open.set()
        assert all(len(request.result()["results"]) == 1 for request in accepted)
        assert len(post(url, items=["Good."])["results"]) == 1


def test_who_is_refused_occupies_no_place_for_long(reward):
    announced = HEAD + b"Content-Length: 500\r\n\r\n"
    with serve(reward, token="s3cret", body_seconds=600) as url, contextlib.ExitStack() as connections:
        strangers = [connections.enter_context(connect(url)) for _ in range(80)]
        for connection in strangers:
            connection.sendall(announced)
        assert all(b" 401 " in connection.recv(65536) for connection in strangers)
        # 64 may go on to send their bodies, and the others are closed behind their answer.
        closed: set[socket.socket] = set()
        while len(closed) < 80 - MAX_DISCARDING:
            ready = select.select([other for other in strangers if other not in closed], [], [], 60)[0]
            assert ready
            closed.update(connection for connection in ready if not connection.recv(65536))
        assert len(closed) == 80 - MAX_DISCARDING


def test_a_client_that_does_not_read_is_left(reward):
    body = json.dumps({"items": ["Good."] * 1024}).encode()
    with (
        serve(reward, send_buffer=4096, answer_seconds=0.2) as url,
        socket.socket() as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", urlsplit(url).port))
        connection.sendall(HEAD.replace(b"close", b"keep-alive"))
        connection.sendall(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert select.select([connection], [], [], 60)[0]  # the answer has begun
        while metric(url, "disco_requests_total", path="/score", status="200") < 1:
            pass
        connection.settimeout(60)
        with pytest.raises(ConnectionError):
            while True:
                connection.sendall(HEALTH)


def test_the_process_may_open_a_file_for_each_connection(caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    rest = BACKLOG + OTHER_FILES
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (rest, hard))
        assert fit_open_files(Limits(max_connections=100)).max_connections == 100
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (rest + 100, hard)
        assert not caplog.records
        if hard != resource.RLIM_INFINITY:
            assert fit_open_files(Limits(max_connections=hard)).max_connections == hard - rest
            assert "raise the hard limit" in caplog.text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def resident(pid: int) -> float:
    """Megabytes of memory that a process occupies."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_strangers_cost_little_memory(reward, tmp_path):
    reward.model.save_pretrained(tmp_path)
    reward.processing_class.save_pretrained(tmp_path)
    with (
        serve_in_process(str(tmp_path), DISCO_TRL_TOKEN="s3cret") as (server, url),
        contextlib.ExitStack() as connections,
    ):
        assert requests.get(url + "/health", timeout=60).ok
        before = resident(server.pid)
        for _ in range(400):
            connections.enter_context(connect(url)).sendall(HALF_HEAD + b"x" * 12_000)
        with connections.enter_context(connect(url)) as endless, contextlib.suppress(ConnectionError):
            for _ in range(400):
                endless.sendall((b"X: " + b"x" * 1000 + b"\r\n") * 1000)
        bad = connections.enter_context(connect(url))
        bad.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n" + b" " * 1_000_000)
        assert b" 401 " in rest_of(bad)
        assert requests.get(url + "/health", timeout=60).ok
        assert resident(server.pid) < before + 100
