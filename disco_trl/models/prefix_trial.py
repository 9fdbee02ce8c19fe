"""The trial of prefix sharing: a few tokens go through a model as a forest and as separate sequences.

The result must hold for the model as it will be trained. Much of what is new in a model does nothing yet: LoRA's
second matrix, a gate or a bias is zero at first, so that an adapter that mixes the tokens of a row would pass. While
the trial lasts, trainable parameters that are constant are therefore given values.

In half precision, rounding hides small differences between a forest and rows. A second comparison is free of it: of
the same forest twice, with other tokens in the sequences beside the one that is looked at.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.forest import pack


# Size of the values that constant parameters get. The effect of an adapter is then a good part of that of the layer
# that it adapts, and norms, which begin at one, stay what they are.
NOISE = 0.1
# By how much the hidden state of a sequence may change, as a share of its norm, with what stands beside it in the row.
# Where tokens are computed one by one it is not a bit; adapters that mix them change it by 0.6 to 50 % in the tests.
LARGEST_INFLUENCE = 1e-3


@dataclass
class Trial:
    """
    What the attention functions note down while a model is tried.

    Attributes:
        windows (`list[int | None]`):
            Sliding window of each layer that has attended along a forest, in the order of the layers.
        dtypes (`set[torch.dtype]`):
            Types that attention has computed in. Those of weights and outputs do not tell: accelerate wraps a model
            that it has prepared in autocast, and makes float32 of what it returns.
        lacking (`str`, *optional*):
            Why torch's kernel was not used in a call that is one for it.
        failure (`Exception`, *optional*):
            Error that was raised within attention along a forest, which is our own code or a kernel.
    """

    windows: list[int | None] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)
    lacking: str | None = None
    failure: Exception | None = None


_THREAD = threading.local()


def current_trial() -> Trial | None:
    """The trial that goes on in this thread, if there is one."""
    return getattr(_THREAD, "trial", None)


StatesOf = Callable[[Any, dict[str, Tensor]], Tensor]
"""From a model and a batch, padded or a forest, to the last hidden state of each sequence, of shape `(N, H)`."""


@torch.no_grad()
def try_forest(model: Any, config: Any, share: Callable[[], None], states_of: StatesOf) -> tuple[str | None, Trial]:
    """
    Compare the hidden states of a small forest with those of the same sequences in rows.

    The model, its gradients and torch's random state are left as they were.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model, with all its adapters.
        config ([`~transformers.PreTrainedConfig`]):
            Config of its text model.
        share (`Callable`):
            Makes the model understand forests. It is called after the rows have gone through.
        states_of (`Callable`):
            What is compared.

    Returns:
        `tuple[str | None, Trial]`: Why the model cannot run on forests, as a clause, or `None` if it can; and what
        was noted down.
    """
    trial = _THREAD.trial = Trial()
    try:
        with _random_state_kept(model.device), _in_evaluation(model), constants_filled(model):
            return _compare(model, config, share, states_of, trial), trial
    finally:
        _THREAD.trial = None


def _compare(model: Any, config: Any, share: Callable[[], None], states_of: StatesOf, trial: Trial) -> str | None:
    pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
    ids = [token for token in range(min(config.vocab_size, 24)) if token != pad_token_id]
    tokens = torch.tensor(ids)[torch.arange(40) * 7 % len(ids)].tolist()
    sequences = [tokens[:20], tokens[:12] + tokens[30:35], tokens[25:30]]
    rows = nn.utils.rnn.pad_sequence(list(map(torch.tensor, sequences)), batch_first=True, padding_value=pad_token_id)
    padded = {"input_ids": rows, "attention_mask": rows.ne(pad_token_id).long()}
    packed = pack(sequences, pad_token_id)
    watched, ids_beside = _change_beside(packed, ids)
    is_cuda = model.device.type == "cuda"
    # Under autocast other kernels run.
    dtypes: list[torch.dtype | None] = [None]
    if is_cuda:
        dtypes.append(torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16)

    def hidden_states(batch: dict[str, Tensor], dtype: torch.dtype | None) -> Tensor:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
            return states_of(model, inputs)

    try:
        alone = [hidden_states(padded, dtype) for dtype in dtypes]
    except Exception as error:
        return f"a few tokens do not go through it in a padded batch either ({_told(error)})"
    if not all(states.isfinite().all() for states in alone):
        return "its hidden states are not finite, in a padded batch either"
    share()
    for dtype, expected in zip(dtypes, alone, strict=True):
        trial.windows.clear()
        trial.dtypes.clear()
        try:
            shared = hidden_states(packed, dtype)
            windows = list(trial.windows)
            again = hidden_states(packed, dtype)
            beside_others = hidden_states({**packed, "input_ids": ids_beside}, dtype)
        except Exception as error:
            return _explain(error, trial)
        if windows != _windows_of_layers(config):
            return "its layers do not all attend by transformers' common interface"
        # Rounding errors are far below these tolerances, and the effect of a wrong token or position far above. An
        # accelerator may multiply float32 in TF32.
        exact = trial.dtypes == {torch.float32} and not getattr(model, "is_quantized", False)
        tolerance = 0.1 if not exact else 1e-2 if is_cuda else 1e-4
        difference = _distance(shared, expected)
        influence = _distance(beside_others[watched], shared[watched])
        allowed = tolerance if _rounds_by_batch(model) else LARGEST_INFLUENCE + 3 * _distance(again, shared)
        if not (difference < tolerance and influence < allowed):
            # All rows but the first, which has no padding
            other_rows = torch.cat([rows[:1], _following(rows[1:], ids)])
            between_rows = _distance(hidden_states({**padded, "input_ids": other_rows}, dtype)[0], expected[0])
            if not between_rows < allowed:
                return (
                    f"it mixes the tokens of a batch, rows of padded batches too (they change a hidden state by "
                    f"{between_rows:.2g}), so that a reward depends on what else is in its batch"
                )
            if difference < tolerance:
                return f"it mixes the tokens of different sequences (they change a hidden state by {influence:.2g})"
            return f"it does not give a prefix the same hidden states in both ways (they differ by {difference:.2g})"
    return None


def _distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).float().norm() / other.float().norm()).item()


def _change_beside(packed: dict[str, Any], ids: list[int]) -> tuple[int, Tensor]:
    """
    Other tokens for all sequences of a forest but one.

    Args:
        packed (`dict`):
            The forest, from `disco_trl.data.forest.pack`.
        ids (`list[int]`):
            Ids to choose from, in ascending order.

    Returns:
        `tuple[int, torch.Tensor]`: Index of the sequence that stands last in the row and keeps its tokens, and the
        new `input_ids`.
    """
    watched = int(packed["read_at"].argmax())
    lengths, parents = packed["nodes"].lengths, packed["nodes"].parents
    ends = [*itertools.accumulate(lengths)]
    is_other = packed["attention_mask"].bool()
    node = next(node for node, end in enumerate(ends) if packed["read_at"][watched] < end)
    while node >= 0:
        is_other[:, ends[node] - lengths[node] : ends[node]] = False
        node = parents[node]
    return watched, torch.where(is_other, _following(packed["input_ids"], ids), packed["input_ids"])


def _following(tokens: Tensor, ids: list[int]) -> Tensor:
    """Each token replaced by the one that follows it in `ids`, in a circle; other tokens are left as they are."""
    following = torch.arange(max(*ids, int(tokens.max())) + 1)
    following[torch.tensor(ids)] = torch.tensor([*ids[1:], ids[0]])
    return following[tokens]


def _rounds_by_batch(model: Any) -> bool:
    """
    Whether rounding depends on the other tokens: experts compute those routed to them in one matrix product, and
    bitsandbytes rounds to 8 bits by the largest values of a batch.
    """
    return getattr(model, "is_loaded_in_8bit", False) or any("experts" in name for name, _ in model.named_modules())


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def _explain(error: Exception, trial: Trial) -> str:
    """
    The reason for an error on a forest.

    An architecture that uses its attention mask in a way of its own trips over the shape or the values of a forest,
    outside of attention. Any other error is a fault, in this package or in a library below it, and says nothing about
    the architecture.
    """
    trips = isinstance(error, RuntimeError | ValueError | IndexError) and not isinstance(error, torch.OutOfMemoryError)
    if trips and error is not trial.failure:
        return f"it does not take a forest for an attention mask ({_told(error)})"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"trying it failed, which need not be the model's fault ({_told(error)}, in {frame.name}, "
        f"{Path(frame.filename).name}:{frame.lineno}); an architecture that is supported then computes up to three "
        "times as many tokens as it has to, so try another release of torch or another attn_implementation ('sdpa', "
        "'eager'), and report this error"
    )


def _windows_of_layers(config: Any) -> list[int | None]:
    """Sliding window of each layer as the config states it, `None` for a layer without one."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return [window if kind == "sliding_attention" else None for kind in layer_types]
    uses_it = getattr(config, "use_sliding_window", True)
    return [window if uses_it else None] * config.num_hidden_layers


# What holds while a model is tried


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Whatever draws random numbers in evaluation mode too, a training run at the same seed does not notice."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """
    Everything runs in evaluation mode, except 4-bit layers: in that mode bitsandbytes repacks their weights on a CPU,
    which rounds them permanently.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = hasattr(getattr(module, "weight", None), "quant_state")
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def constants_filled(model: nn.Module) -> Iterator[None]:
    """
    Give trainable parameters whose elements are all the same, such as zeros or ones, values that differ.

    Afterwards they hold what they held before, to the last bit. Frozen parameters are what they will stay. The values
    come from a generator of their own. They are the same in all processes.

    Args:
        model (`torch.nn.Module`):
            Model whose parameters are filled in place, those of a model sharded by FSDP2 in each process's shard.
    """
    # While the parameters of a unit are gathered, its shards are out of reach.
    _reshard(model)
    generator = torch.Generator().manual_seed(0)
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for parameter in model.parameters():
            local: Tensor = getattr(parameter, "to_local", lambda parameter=parameter: parameter)().data
            if parameter.requires_grad and _is_constant(local):
                kept.append((local, local.clone()))
                # Away from zero, as a single number might come close to it.
                noise = (torch.rand(local.shape, generator=generator) + 0.5) * NOISE
                noise[torch.rand(local.shape, generator=generator) < 0.5] *= -1
                local.add_((noise.to(local.device) * (1 + local.abs())).to(local.dtype))
        yield
    finally:
        _reshard(model)
        for local, before in kept:
            local.copy_(before)


def _is_constant(tensor: Tensor) -> bool:
    """Whether a tensor of real numbers holds the same one everywhere. Most are told by their first two elements."""
    if not tensor.numel() or not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        return False
    flat = tensor.reshape(-1)
    return bool((flat[:2] == flat[0]).all()) and bool((flat == flat[0]).all())


def _reshard(model: nn.Module) -> None:
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
