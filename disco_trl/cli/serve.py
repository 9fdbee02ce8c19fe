"""Serve a reward model over HTTP: POST /score and /get_reward, GET /health and /metrics.

On SIGTERM or SIGINT the server answers what it has accepted, for at most `--shutdown_seconds`, and ends.
"""

from __future__ import annotations

import gc
import ipaddress
import os
from dataclasses import dataclass, field

from ..serving.bearer_token import checked_token
from .arguments import LoadingArguments, TransformArguments, ViewArguments, at_least_one


LIMITS = (
    "max_queue",
    "max_batch_tokens",
    "max_body_bytes",
    "max_texts_per_request",
    "max_pairs_per_request",
    "max_tokens",
    "max_connections",
    "shutdown_seconds",
)


@dataclass(kw_only=True)
class Arguments(TransformArguments, ViewArguments, LoadingArguments):
    """The arguments of `disco-trl serve`."""

    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address (default: %(default)s); any but a loopback address can be reached by others."},
    )
    port: int = field(default=8000, metadata={"help": "Port; 0 takes a free one (default: %(default)s)."})
    token: str | None = field(
        default=None,
        metadata={
            "help": "Token that clients must show. DISCO_TRL_TOKEN in the environment keeps it off the command line."
        },
    )
    max_queue: int = field(
        default=2**20, metadata={"help": "Tokens that may wait for the model (default: %(default)s)."}
    )
    max_batch_tokens: int = field(
        default=8192, metadata={"help": "Tokens that go through the model at once (default: %(default)s)."}
    )
    max_body_bytes: int = field(default=2**20, metadata={"help": "Bytes of a request (default: %(default)s)."})
    max_texts_per_request: int = field(default=1024, metadata={"help": "Texts of a request (default: %(default)s)."})
    max_pairs_per_request: int = field(
        default=2**16,
        metadata={
            "help": "Probabilities P(a > b) of a request: its pairs, and the pairs of answers to one prompt that "
            "win_rate compares (default: %(default)s)."
        },
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of a text (default: what the model's positions allow)."}
    )
    max_connections: int = field(
        default=4096,
        metadata={
            "help": "Open connections. If there are more, those that have waited longest for a request are closed "
            "(default: %(default)s)."
        },
    )
    shutdown_seconds: int = field(
        default=60,
        metadata={
            "help": "Seconds after SIGTERM in which accepted requests are answered; then they are given up "
            "(default: %(default)s)."
        },
    )

    def __post_init__(self) -> None:
        at_least_one(self, *LIMITS)


def run(args: Arguments) -> None:
    """Serve until SIGTERM or SIGINT; then answer what was accepted, for a limited time, and return."""
    token = None
    if args.token is not None:
        token = checked_token(args.token, "--token")
    elif "DISCO_TRL_TOKEN" in os.environ:
        token = checked_token(os.environ["DISCO_TRL_TOKEN"], "DISCO_TRL_TOKEN")
    if token is None and not _is_loopback(args.host):
        raise ValueError(
            f"{args.host} can be reached from other machines: set DISCO_TRL_TOKEN, which clients then have to show, "
            "or leave --host at 127.0.0.1"
        )
    try:
        import uvicorn

        from ..serving.app import create_app
        from ..serving.connections import fit_open_files, server_settings
        from ..serving.middleware import Limits
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: pip install 'disco-trl[serve]'") from error
    from ..distributions.transforms import get_transform
    from ..rewards.disco_reward import DiscoReward

    # On a CPU every new shape of a bfloat16 batch leaves a compiled kernel in oneDNN's cache, and requests come in
    # all shapes. Its default of 1,024 kernels takes hundreds of megabytes; a forward needs a dozen at a time.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    options = args.transform_options
    get_transform(args.transform, **options)  # before the model takes its time
    model = args.model_name_or_path
    loading = {"dtype": args.dtype, "device": args.device, **args.view_options}
    reward = DiscoReward(model, transform=args.transform, **loading, **options)
    limits = fit_open_files(Limits(**{name: getattr(args, name) for name in LIMITS}))
    app = create_app(reward, limits, token, name=model)
    # Otherwise the garbage collector walks the hundreds of thousands of objects of torch and transformers again and
    # again while a large body is read, and everything waits: 2.3 s for 1 MiB of empty lists, and 0.3 s without them.
    gc.collect()
    gc.freeze()
    uvicorn.run(app, host=args.host, port=args.port, **server_settings(limits))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
