"""What the tests ask a running server, and how they read its answers."""

import socket
from urllib.parse import urlsplit

import pytest
import requests
import torch


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
