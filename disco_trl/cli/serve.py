"""`disco-trl serve`: answer requests for rewards over HTTP."""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys

from ..distributions.transforms import get_transform
from ..rewards.disco_reward import DiscoReward
from .arguments import add_loading_arguments, add_transform_arguments, transform_options


try:
    import uvicorn

    from ..serving.app import create_app
    from ..serving.middleware import Limits
except ImportError as error:
    raise ImportError(f"disco-trl serve needs {error.name}: pip install 'disco-trl[serve]'") from error


def main(argv: list[str]) -> None:
    """Run `disco-trl serve` with its arguments, until SIGTERM or SIGINT: then answer what was accepted, and return."""
    limits = Limits()
    parser = argparse.ArgumentParser(
        prog="disco-trl serve",
        description="Serve a reward model over HTTP: POST /score and /get_reward, GET /health and /metrics.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="path or Hub id of a disco or scalar reward model, or a PEFT adapter directory")
    parser.add_argument("--host", default="127.0.0.1", help="address (%(default)s); others can reach any but loopback")
    parser.add_argument("--port", type=int, default=8000, help="%(default)s; 0 takes a free one")
    parser.add_argument("--token", help="what clients must show; DISCO_TRL_TOKEN keeps it off the command line")
    add_loading_arguments(parser)
    add_transform_arguments(parser)
    for name, what in (
        ("max_queue", "tokens that may wait for the model"),
        ("max_batch_tokens", "tokens that go through the model at once"),
        ("max_body_bytes", "size of one request"),
        ("max_texts_per_request", "texts in one request"),
        ("max_tokens", "tokens in one text (what the model's positions allow)"),
    ):
        default = getattr(limits, name)
        shown = f"{what} ({default})" if default is not None else what
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=shown)
    args = parser.parse_args(argv)

    given = {name: value for name, value in vars(args).items() if name.startswith("max_") and value is not None}
    for name, value in given.items():
        if value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    token = args.token or os.environ.get("DISCO_TRL_TOKEN") or None
    if token is None and not _is_loopback(args.host):
        sys.exit(
            f"{parser.prog}: {args.host} can be reached from other machines: set DISCO_TRL_TOKEN, which clients then "
            "have to show, or leave --host at 127.0.0.1"
        )
    options = transform_options(args)
    # On a CPU every new shape of a bfloat16 batch leaves a compiled kernel in oneDNN's cache, and requests come in
    # all shapes. Its default of 1,024 kernels takes hundreds of megabytes; a forward needs a dozen at a time.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    try:
        get_transform(args.transform, **options)  # before the model takes its time
        reward = DiscoReward(args.model, transform=args.transform, dtype=args.dtype, device=args.device, **options)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    app = create_app(reward, Limits(**given), token, name=args.model)
    uvicorn.run(app, host=args.host, port=args.port, access_log=False)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
