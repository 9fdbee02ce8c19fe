"""Functions of log-probabilities that keep their digits in both tails, in value and in gradient.

All work elementwise on float64 tensors. A comparison of two rewards is a handful of numbers, so double precision costs
nothing beside the language model that the rewards come from.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


LOG_2 = math.log(2)


def to_float64(tensor: Tensor) -> Tensor:
    """
    Converts a tensor to float64, on the CPU if its device has no such type.

    Args:
        tensor (`torch.Tensor`):
            Tensor of any shape and floating-point type.

    Returns:
        `torch.Tensor`: The same numbers in float64, through which gradients flow.
    """
    # MPS has no float64: the CPU works on such tensors, and `to_dtype_of` takes the result back.
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def to_dtype_of(result: Tensor, *inputs: Tensor) -> Tensor:
    """
    Converts a float64 result to what the inputs that it was computed from call for.

    Args:
        result (`torch.Tensor`):
            Tensor of any shape, in float64.
        *inputs (`torch.Tensor`):
            The inputs before [`to_float64`].

    Returns:
        `torch.Tensor`: The result on the device of the first input, in the widest type of all inputs and at least
        float32. A probability in half precision would be rounded to 1 from 0.9998 on.
    """
    dtype = torch.float32
    for tensor in inputs:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return result.to(device=inputs[0].device, dtype=dtype)


def is_identity(matrix: Tensor) -> bool:
    """Whether a square matrix is exactly the identity."""
    return torch.equal(matrix, torch.eye(len(matrix)).to(matrix))


def negative_magnitude(x: Tensor) -> Tensor:
    """Returns −|x|, with gradient −1 at `x = 0`."""
    # Not `-x.abs()`: its gradient is 0 at x = 0, where every training run begins.
    return torch.where(x < 0, x, -x)


def log_prob_by_tail(x: Tensor, log_tail: Tensor) -> Tensor:
    """
    Evaluates log F of a symmetric distribution from its lower tail, without cancellation on either side.

    Args:
        x (`torch.Tensor`):
            Where F is evaluated.
        log_tail (`torch.Tensor`):
            log F(−|x|), of the shape of `x`.

    Returns:
        `torch.Tensor`: log F(x), of the shape of `x`.
    """
    return torch.where(x < 0, log_tail, torch.log1p(-log_tail.exp()))


def log_difference(larger: Tensor, smaller: Tensor) -> Tensor:
    """
    Evaluates log(e^larger − e^smaller), such as the log-probability of an interval from those of its ends.

    Args:
        larger, smaller (`torch.Tensor`):
            Logarithms of any shapes that broadcast, with `smaller < larger`. If both are equal to float64's precision,
            the result is that of a gap of 2⁻⁵², which keeps it and its gradient finite.

    Returns:
        `torch.Tensor`: The logarithm of the difference, of the broadcast shape.
    """
    gap = (larger - smaller).clamp_min(2**-52)
    # log(1 - e^-gap): by expm1 where the two are close, by log1p where they are not (M. Mächler, 2012). Each branch
    # gets harmless arguments where the other one is taken, because `where` multiplies the gradients of both.
    is_close = gap < LOG_2
    close = torch.log(-torch.expm1(-torch.where(is_close, gap, 1.0)))
    apart = torch.log1p(-torch.exp(-torch.where(is_close, 1.0, gap)))
    return larger + torch.where(is_close, close, apart)
