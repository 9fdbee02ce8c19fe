"""torch's flash attention for sequences of various lengths, as the installed release of torch has it.

`torch.nn.attention.varlen.varlen_attn` attends for all nodes of a forest in one call, on CUDA in half precision. Its
signature has grown from release to release:

==================  ================================================================================================
torch               `varlen_attn`
==================  ================================================================================================
2.6 to 2.9          does not exist
2.10                is causal or not; no other scale than 1/√D, no window, as many heads of keys as of queries
2.11                `scale` and `window_size`
2.12 to 2.14        `enable_gqa`: fewer heads of keys than of queries
==================  ================================================================================================

What a release lacks is made up for here, except windows. Where the kernel cannot be used, `prefix_sharing` attends for
one node after another, with the same result.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


# The release from which nothing is missing.
COMPLETE_SINCE = "2.12"


class VarlenKernel:
    """
    `varlen_attn` of some release of torch, called in one way.

    Args:
        function (`Callable`):
            The function; what it supports is read from its signature.
    """

    def __init__(self, function: Callable[..., Any]):
        parameters = inspect.signature(function).parameters
        self.function = function
        self.has_scale = "scale" in parameters
        self.has_window = "window_size" in parameters
        self.has_groups = "enable_gqa" in parameters
        self.is_known = self.has_window or "is_causal" in parameters

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_starts: Tensor,
        key_starts: Tensor,
        longest_query: int,
        longest_key: int,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """
        Attend causally within each of N sequences, the last query of each at its last key.

        Args:
            query (`torch.Tensor` of shape `(queries, heads, D)`):
                Queries of all sequences, one sequence after another.
            key, value (`torch.Tensor` of shape `(keys, groups, D)`):
                Keys and values of all sequences. Each group serves `heads / groups` heads of queries.
            query_starts, key_starts (`torch.Tensor` of shape `(N + 1,)`, int32):
                Where the queries and the keys of each sequence begin.
            longest_query, longest_key (`int`):
                Largest number of queries and of keys of a sequence.
            scale (`float`, *optional*):
                Factor of the products of queries and keys, by default 1/√D.
            window (`int`, *optional*):
                Number of keys that a query sees, the one at its own position included; by default all before it.

        Returns:
            `torch.Tensor` of shape `(queries, heads, D)`: The outputs.
        """
        options: dict[str, Any] = {}
        if self.has_window:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        else:
            options["is_causal"] = True
        if self.has_scale:
            options["scale"] = scale
        elif scale is not None and not math.isclose(factor := scale * math.sqrt(query.shape[-1]), 1):
            query = query * factor
        groups = key.shape[1]
        if self.has_groups:
            options["enable_gqa"] = query.shape[1] != groups
        elif query.shape[1] != groups:
            key, value = (tensor.repeat_interleave(query.shape[1] // groups, dim=1) for tensor in (key, value))
        return self.function(query, key, value, query_starts, key_starts, longest_query, longest_key, **options)


@functools.cache
def installed_kernel() -> VarlenKernel | None:
    """The kernel of the installed torch, or `None` if it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return VarlenKernel(varlen_attn)


def is_for_kernel(query: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """
    Whether a kernel of this kind supports the tensors of a call, whatever the release of torch.

    Args:
        query, value (`torch.Tensor` of shape `(1, heads, T, D)`):
            As an attention function of transformers receives them.
        options (`dict`):
            Keyword arguments of the attention function.

    Returns:
        `bool`: True on CUDA in half precision, for heads of at most 256 dimensions, without dropout or additions to
        the products of queries and keys.
    """
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and not options.get("dropout")
        and all(options.get(name) is None for name in ("softcap", "s_aux", "position_bias"))
        and _has_flash_attention(query.device)
    )


@functools.cache
def _has_flash_attention(device: torch.device) -> bool:
    """Whether the GPU is of NVIDIA's Ampere generation or newer; what ROCm needs, its build knows."""
    return torch.version.cuda is None or torch.cuda.get_device_capability(device) >= (8, 0)


def lacking(window: int | None) -> str | None:
    """
    What the installed torch lacks for a call that is otherwise one for the kernel.

    Args:
        window (`int`, *optional*):
            Sliding window of the layer.

    Returns:
        `str` or `None`: A clause, or `None` if the kernel can be called.
    """
    kernel = installed_kernel()
    if kernel is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if not kernel.is_known:
        return f"varlen_attn of torch {torch.__version__} has a signature that is not known here"
    if window is not None and not kernel.has_window:
        return f"varlen_attn of torch {torch.__version__} has no sliding window"
    return None
