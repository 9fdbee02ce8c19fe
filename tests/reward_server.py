"""A real server on a free port of the loopback, in a thread of the test, and what stands in the way of its model."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import uvicorn
from tiny_models import randomize_heads

from disco_trl import DiscoReward, DiscoRewardModel
from disco_trl.serving.app import create_app
from disco_trl.serving.middleware import Limits


QUESTION = [{"role": "user", "content": "How is the film?"}]
ANSWERS = ["Good.", "People like it a lot, not all of them.", "It is short.", "The answer is Paris, and the piano."]
MESSAGES = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]


def tiny_reward(path: str, tokenizer, transform: str = "mean", **options) -> DiscoReward:
    """A reward function around a tiny model with a head that tells texts apart."""
    return DiscoReward(randomize_heads(DiscoRewardModel.from_pretrained(path)), tokenizer, transform, **options)


@contextlib.contextmanager
def serve(reward: DiscoReward, token: str | None = None, **limits) -> Iterator[str]:
    """The server's URL, while it runs."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(create_app(reward, Limits(**limits), token), access_log=False, log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()  # connections wait in the socket's backlog until the server takes them
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


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
