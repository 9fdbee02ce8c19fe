"""A model in pieces on several devices: what is done so that its rewards stay right, and what is refused.

Replicas (DDP) need nothing. FSDP2 and DeepSpeed, asked for bfloat16, would give it to the reward head as well, and
with a row of tokens split up (context or sequence parallelism) or a batch cut between the two sides of a pair there is
no reward to be had. `docs/distributed.md` says what is supported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed.fsdp
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn

from .heads import DiscoHead


def check_parallelism(
    processes: int = 1,
    parallelism: Any = None,
    deepspeed: dict[str, Any] | None = None,
    dispatches: bool | None = None,
) -> None:
    """
    Refuse what would give wrong rewards, or a head that is not in float32.

    Args:
        processes (`int`): that train together.
        parallelism (`accelerate.ParallelismConfig`, *optional*): what they divide among each other.
        deepspeed (`dict`, *optional*): DeepSpeed's config.
        dispatches (`bool`, *optional*): accelerate's `dispatch_batches`.

    Raises:
        ValueError: context, sequence or tensor parallelism; `dispatch_batches` on several processes; or DeepSpeed with
            weights in half precision.
    """
    deepspeed = deepspeed or {}
    splits = "it splits each row of tokens among devices, and a reward is read at the row's last token"
    untried = "whether the head then stays whole, with the gradient of one process, has not been tried"
    for name, what, why in (("cp", "context", splits), ("sp", "sequence", splits), ("tp", "tensor", untried)):
        size = getattr(parallelism, f"{name}_size", None) or 1
        if name == "tp":
            size = max(size, deepspeed.get("tensor_parallel", {}).get("autotp_size", 0))
        if size > 1:
            raise ValueError(
                f"{what} parallelism ({name}_size={size}) is not supported: {why}. Set {name}_size=1; for a model "
                "that is too large for one device use FSDP2 or DeepSpeed ZeRO-3"
            )
    if processes > 1 and dispatches:
        raise ValueError(
            "accelerator_config: dispatch_batches=True hands each process a slice of a batch, in which all chosen "
            "answers stand before all rejected ones, so that the two sides of a pair would be parted; set it to False"
        )
    for dtype in ("bf16", "fp16"):
        if deepspeed.get(dtype, {}).get("enabled") is True:
            raise ValueError(
                f"DeepSpeed with {dtype}.enabled casts every weight, the reward head included, which has to stay in "
                'float32. Let it compute in bfloat16 and keep the weights: put "torch_autocast": {"enabled": true, '
                '"dtype": "bfloat16"} into its config instead, as examples/launch/zero2.json does, without '
                f"mixed_precision in accelerate's, and pass {dtype}=False to the trainer"
            )


def keep_head_apart(accelerator: Any) -> None:
    """With FSDP2, have `accelerator.prepare` make each reward head a unit of its own; else leave it as it is."""
    if not getattr(accelerator, "is_fsdp2", False):
        return
    prepare = accelerator.prepare

    @functools.wraps(prepare)
    def prepare_with_head(*args: Any, **kwargs: Any) -> Any:
        with head_as_its_own_unit():
            return prepare(*args, **kwargs)

    accelerator.prepare = prepare_with_head


@contextlib.contextmanager
def head_as_its_own_unit() -> Iterator[None]:
    """
    While it lasts, FSDP2 makes each reward head a unit of its own, in float32 from its weights to its rewards.

    accelerate (1.10 to 1.15) has one policy for all units. With `mixed_precision: bf16` each unit's weights, and what
    the unit returns, are cast to bfloat16: the head's too, and the rewards. And where the head falls into a unit with
    the language model's weights, those must not differ from it in dtype. There is no setting for a single module, so
    the function that accelerate calls for each unit is replaced by one that knows the head.
    """
    fully_shard = torch.distributed.fsdp.fully_shard

    @functools.wraps(fully_shard)
    def shard(module: Any, **options: Any) -> Any:
        policy = options.get("mp_policy")
        modules = [module] if isinstance(module, nn.Module) else module
        heads = [inner for part in modules for inner in part.modules() if isinstance(inner, DiscoHead)]
        if heads and policy is not None:
            whole = dataclasses.replace(policy, param_dtype=None, reduce_dtype=None, output_dtype=None)
            for head in heads:
                if head is not module and not isinstance(head, torch.distributed.fsdp.FSDPModule):
                    fully_shard(head, **{**options, "mp_policy": whole})
            # What is around the head hands its float32 on.
            options["mp_policy"] = whole if module in heads else dataclasses.replace(policy, output_dtype=None)
        return fully_shard(module, **options)

    torch.distributed.fsdp.fully_shard = shard
    try:
        yield
    finally:
        torch.distributed.fsdp.fully_shard = fully_shard


def process_state(use_cpu: bool = False, **kwargs: Any) -> PartialState:
    """Which of several processes this is, on accelerators and on CPUs; `kwargs` are for the process group."""
    # Unless told to use the CPU, accelerate takes each of several processes without an accelerator for the only one.
    use_cpu = use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=use_cpu, **kwargs)
