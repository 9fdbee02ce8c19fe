"""A real server on a free port of the loopback, in a thread of the test or in a process of its own, and what stands in
the way of its model.
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import uvicorn
from tiny_models import randomize_heads

from disco_trl import DiscoReward, DiscoRewardModel
from disco_trl.serving.app import create_app
from disco_trl.serving.connections import server_settings
from disco_trl.serving.middleware import Limits


QUESTION = [{"role": "user", "content": "How is the film?"}]
ANSWERS = ["Good.", "People like it a lot, not all of them.", "It is short.", "The answer is Paris, and the piano."]
MESSAGES = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]


def tiny_reward(path: str, tokenizer, transform: str = "mean", **options) -> DiscoReward:
    """A reward function around a tiny model with a head that tells texts apart."""
    return DiscoReward(randomize_heads(DiscoRewardModel.from_pretrained(path)), tokenizer, transform, **options)


@contextlib.contextmanager
def serve(reward: DiscoReward, token: str | None = None, send_buffer: int | None = None, **limits) -> Iterator[str]:
    """The server's URL, while it runs. `send_buffer` is how much of an answer the system takes off its hands."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        if send_buffer is not None:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # its connections inherit it
        bounds = Limits(**limits)
        app = create_app(reward, bounds, token)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", **server_settings(bounds)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()  # connections wait in the socket's backlog until the server takes them
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def serve_in_process(path: str, *arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`disco-trl serve PATH` and its URL, once it listens; its standard error goes on behind that line."""
    command = [sys.executable, "-m", "disco_trl", "serve", path, "--port", "0", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            lines = (re.search(r"running on (http://\S+)", line) for line in server.stderr)
            yield server, next(filter(None, lines))[1]
        finally:
            server.kill()


@dataclass
class Barrier:
    """Holds up a model's forward: `entered` is set when the model has been called, and `open` lets it go on."""

    entered: threading.Event
    open: threading.Event


@contextlib.contextmanager
def held_up(model: torch.nn.Module) -> Iterator[Barrier]:
    """While it lasts, the model waits at a barrier each time that it is called."""
    barrier = Barrier(threading.Event(), threading.Event())

    def wait(*_) -> None:
        barrier.entered.set()
        assert barrier.open.wait(timeout=60)

    hook = model.register_forward_pre_hook(wait)
    try:
        yield barrier
    finally:
        barrier.open.set()
        hook.remove()
