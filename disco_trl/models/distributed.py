"""Sharded models: keeping the reward head in float32, and refusing layouts in which rewards would be wrong.

Replicas (DDP) need nothing special. FSDP2 and DeepSpeed would run the head in bfloat16 too if the model is trained in
bfloat16. No reward can be computed where a row of tokens is split among devices (context or sequence parallelism), or
a batch between the two sides of a pair. `docs/distributed.md` lists what is supported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Iterator
from typing import Any

import accelerate
import torch
import torch.distributed.fsdp
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.tensor import DTensor

from .heads import DiscoHead
from .lending import lend


def check_parallelism(
    processes: int = 1,
    parallelism: Any = None,
    deepspeed: dict[str, Any] | None = None,
    dispatches: bool | None = None,
) -> None:
    """
    Refuse layouts that would give wrong rewards, or a head that is not in float32.

    Args:
        processes (`int`, *optional*, defaults to `1`):
            Number of processes that train together.
        parallelism (`accelerate.ParallelismConfig`, *optional*):
            What the processes divide among each other.
        deepspeed (`dict`, *optional*):
            Config of DeepSpeed.
        dispatches (`bool`, *optional*):
            `dispatch_batches` of accelerate.

    Raises:
        `ValueError`: If context, sequence or tensor parallelism is on, if `dispatch_batches` is on with several
            processes, or if DeepSpeed keeps the weights in half precision.
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
    """
    Make each reward head a unit of its own when `accelerator.prepare` applies FSDP2, and check that it is one.

    Args:
        accelerator (`accelerate.Accelerator`):
            Accelerator whose method `prepare` is replaced. Without FSDP2 it is left unchanged.
    """
    if not getattr(accelerator, "is_fsdp2", False):
        return
    prepare = accelerator.prepare

    @functools.wraps(prepare)
    def prepare_with_head(*args: Any, **kwargs: Any) -> Any:
        with heads_as_their_own_units():
            prepared = prepare(*args, **kwargs)
        for module in prepared if isinstance(prepared, tuple) else (prepared,):
            if isinstance(module, nn.Module):
                _check_heads(module)
        return prepared

    accelerator.prepare = prepare_with_head


# Heads that were sharded apart from the language model: accelerate leaves a model as it is that it gets once more.
_sharded: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _check_heads(model: nn.Module) -> None:
    """Check that each reward head of a model that accelerate has sharded was treated separately, in float32."""
    for name, head in model.named_modules():
        if not isinstance(head, DiscoHead):
            continue
        rounded = {str(weight.dtype) for weight in head.parameters() if weight.dtype != torch.float32}
        if rounded or head not in _sharded:
            how = f"is in {', '.join(rounded)}" if rounded else "was sharded with the weights of the language model"
            raise RuntimeError(
                f"after accelerator.prepare the reward head {name} {how}, so that its rewards would be rounded. "
                f"accelerate {accelerate.__version__} does not call torch.distributed.fsdp.fully_shard for each unit, "
                "as 1.10 to 1.15 do; install one of these"
            )


@contextlib.contextmanager
def heads_as_their_own_units() -> Iterator[None]:
    """
    Make FSDP2 shard each reward head as a unit of its own within the context, in float32 from weights to rewards.

    accelerate (1.10 to 1.15) has one precision policy for all units. With `mixed_precision: bf16` it casts the weights
    and the outputs of each unit to bfloat16, those of the head included. In a unit with weights of the language model
    the head would also have to have their dtype. There is no setting for a single module, so the function that
    accelerate calls for each unit, `torch.distributed.fsdp.fully_shard`, is replaced by one that treats heads
    separately, and modules without a reward head exactly as the original does. Other threads keep the original.
    """
    fully_shard = torch.distributed.fsdp.fully_shard

    def shard(module: Any, **options: Any) -> Any:
        policy = options.get("mp_policy")
        modules = [module] if isinstance(module, nn.Module) else module
        heads = [inner for part in modules for inner in part.modules() if isinstance(inner, DiscoHead)]
        _sharded.update(heads)
        if heads and policy is not None:
            whole = dataclasses.replace(policy, param_dtype=None, reduce_dtype=None, output_dtype=None)
            for head in heads:
                if head is not module and not isinstance(head, torch.distributed.fsdp.FSDPModule):
                    fully_shard(head, **{**options, "mp_policy": whole})
            # The units around the head return its float32 rewards without a cast.
            options["mp_policy"] = whole if module in heads else dataclasses.replace(policy, output_dtype=None)
        return fully_shard(module, **options)

    with lend(vars(torch.distributed.fsdp), "fully_shard", shard):
        yield


def is_in_shards(parameter: torch.Tensor) -> bool:
    """Whether this process has a part of a parameter, or none of it: FSDP2 makes it a DTensor, ZeRO-3 marks it."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def process_state(use_cpu: bool = False, **kwargs: Any) -> PartialState:
    """
    Get the state of this process among all, on accelerators and on CPUs.

    Args:
        use_cpu (`bool`, *optional*, defaults to `False`):
            Whether to use the CPU where there is an accelerator.
        **kwargs:
            Arguments for the process group, such as `timeout`.

    Returns:
        `accelerate.PartialState`: The state.
    """
    # Without an accelerator, and unless it is told to use the CPU, accelerate takes each process for the only one.
    use_cpu = use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=use_cpu, **kwargs)


def is_main_process() -> bool:
    """Whether this is the first of all processes, or the only one. Unlike [`process_state`] it sets nothing up."""
    is_one_of_several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not is_one_of_several or torch.distributed.get_rank() == 0
