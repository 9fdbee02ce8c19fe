"""Serve a reward model over HTTP: POST /score and /get_reward, GET /health and /metrics.

On SIGTERM or SIGINT the server answers what it has accepted, and ends.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field

from .arguments import LoadingArguments, TransformArguments, at_least_one


LIMITS = ("max_queue", "max_batch_tokens", "max_body_bytes", "max_texts_per_request", "max_tokens")


@dataclass(kw_only=True)
class Arguments(TransformArguments, LoadingArguments):
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
    max_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of a text (default: what the model's positions allow)."}
    )

    def __post_init__(self) -> None:
        at_least_one(self, *LIMITS)


def run(args: Arguments) -> None:
    """Serve until SIGTERM or SIGINT; then answer what was accepted, and return."""
    token = args.token or os.environ.get("DISCO_TRL_TOKEN") or None
    if token is None and not _is_loopback(args.host):
        raise ValueError(
            f"{args.host} can be reached from other machines: set DISCO_TRL_TOKEN, which clients then have to show, "
            "or leave --host at 127.0.0.1"
        )
    try:
        import uvicorn

        from ..serving.app import create_app
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
    reward = DiscoReward(model, transform=args.transform, dtype=args.dtype, device=args.device, **options)
    limits = Limits(**{name: getattr(args, name) for name in LIMITS})
    uvicorn.run(create_app(reward, limits, token, name=model), host=args.host, port=args.port, access_log=False)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
