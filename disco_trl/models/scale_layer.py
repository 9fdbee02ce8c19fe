"""What the scale of a reward reads: the mean hidden state of a middle layer, or the pooled last hidden state.

A model whose `config.disco` has a `"scale_layer"` k reads its scale from `hidden_states[k]`, as transformers counts
them: what layer k returns, and for the last k what the backbone returns, after its final norm. They are averaged over
the tokens of a text. Middle layers say more about how much people disagree than the last token of the last layer does
(see `docs/method.md`); the location is read as ever.

The mean of a text is the same in a padded batch, in a forest (`disco_trl.data.forest`) and token by token in PPO. In a
decoder it is over the tokens that are attended to, up to and including the one at which the reward is read. In an
encoder it is over all that are attended to.

The states are the *input* of the layer that follows, and not the output of layer k. The two are the same tensor, but
with reentrant gradient checkpointing an output that is seen within the layer has no gradient.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


# Where the hook on a layer puts the states: a list while a forward pass of this thread wants them, and `None`
# otherwise, as in a backward pass, in which gradient checkpointing calls the layers once more. The hook itself stays,
# because registering one is not safe where several threads call a model.
_READING: ContextVar[list[Tensor] | None] = ContextVar("disco_trl_scale_layer", default=None)

# Architectures in which `hidden_states[k]` is not what a module gets with shape (batch, tokens, hidden size): XLNet
# has the tokens before the rows, Funnel pools them, ALBERT calls the same layers again and again, and XLM and Flaubert
# have no modules that are layers.
LAYERS_OF_THEIR_OWN = ("albert", "flaubert", "funnel", "xlm", "xlnet")


def default_scale_layer(config: Any) -> int | None:
    """
    The layer that the scale of a new model reads, unless the user names another.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Config of the language model.

    Returns:
        `int`, *optional*: Two thirds of the number of layers, rounded, and at least 1. `None` for an architecture that
        cannot have a scale layer, as far as its config tells; [`layers_of`] looks at the model itself.
    """
    text_config = config.get_text_config()
    count = getattr(text_config, "num_hidden_layers", None)
    if not count or config.is_encoder_decoder or text_config.model_type in LAYERS_OF_THEIR_OWN:
        return None
    return max(1, round(2 / 3 * count))


def layers_of(model: Any) -> nn.ModuleList:
    """
    Find the layers of a model: the only list of `num_hidden_layers` modules in its backbone.

    Args:
        model ([`~disco_trl.DiscoRewardModel`]):
            The model.

    Returns:
        `torch.nn.ModuleList`: Its layers.

    Raises:
        `ValueError`: If there is no such list, or several; if the model is an encoder-decoder; or if the hidden states
            of its layers have another size than those that the reward head reads.
    """
    config = model.config.get_text_config()
    backbone = getattr(model, model.base_model_prefix, None)
    count, size = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    found: dict[str, nn.ModuleList] = {}
    for name, module in [] if backbone is None else backbone.named_modules():
        # A list within one that was found, such as the experts of a layer, is none of layers.
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == count and not is_inside:
            found[name] = module
    if model.config.is_encoder_decoder:
        reason = "it has the layers of an encoder and those of a decoder"
    elif config.model_type in LAYERS_OF_THEIR_OWN or len(found) != 1:
        reason = f"its backbone has no single list of {count} layers, each called once with the states of all tokens"
    elif size != model.reward_head.in_features:
        reason = f"its layers have hidden size {size}, and its reward head reads {model.reward_head.in_features}"
    else:
        return next(iter(found.values()))
    raise ValueError(
        f"{_name_of(model)}: {type(model).__name__} cannot have a scale_layer: {reason}. Its scale can only read the "
        "last hidden state (scale_layer=None)"
    )


def hook_layer(model: Any, layer: int) -> list[RemovableHandle]:
    """
    Have a model show its hidden states after a layer to [`reading`], and its backbone hand them on to [`states_of`].

    Args:
        model ([`~disco_trl.DiscoRewardModel`]):
            The model.
        layer (`int`):
            Number of the layer, from 1.

    Returns:
        `list[torch.utils.hooks.RemovableHandle]`: Handles that undo it.

    Raises:
        `ValueError`: If the model has no such layer; see [`layers_of`].
    """
    layers = layers_of(model)
    if not 1 <= layer <= len(layers):
        raise ValueError(
            f"{_name_of(model)}: scale_layer={layer} has to be a whole number from 1 to {len(layers)}, the number of "
            f"layers of this {type(model).__name__}"
        )
    backbone = getattr(model, model.base_model_prefix)
    return [
        layers[layer].register_forward_pre_hook(_show_input, with_kwargs=True)
        if layer < len(layers)
        else backbone.register_forward_hook(_show_output),
        backbone.register_forward_pre_hook(_begin),
        # Last, and even after an error, or the next call would be taken for a part of this one
        backbone.register_forward_hook(_end, with_kwargs=True, always_call=True),
    ]


def _name_of(model: Any) -> str:
    return model.config._name_or_path or type(model).__name__


def _show_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if (kept := _READING.get()) is not None:
        kept[:] = [args[0] if args else kwargs["hidden_states"]]


def _show_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if (kept := _READING.get()) is not None:
        kept[:] = [output[0]]


@contextlib.contextmanager
def reading() -> Iterator[list[Tensor]]:
    """
    Keep the hidden states that [`hook_layer`] shows in this thread, for as long as the context lasts.

    Yields:
        `list[torch.Tensor]`: Empty at first, and then the states of shape `(B, T, H)` of the latest forward pass.
    """
    kept: list[Tensor] = []
    token = _READING.set(kept)
    try:
        yield kept
    finally:
        _READING.reset(token)


def latest(kept: list[Tensor], model: Any, shape: torch.Size) -> Tensor:
    """
    The hidden states that [`reading`] has kept, once they are known to be what the model is taken to have.

    Args:
        kept (`list[torch.Tensor]`):
            What [`reading`] has yielded, after the forward pass.
        model ([`~disco_trl.DiscoRewardModel`]):
            The model.
        shape (`torch.Size`):
            `(B, T)`, of the tokens that the model was given.

    Returns:
        `torch.Tensor` of shape `(B, T, H)`: The states.

    Raises:
        `ValueError`: If there are none, or they have another shape.
    """
    expected = (*shape, model.reward_head.in_features)
    if not kept or kept[0].shape != expected:
        found = f"were of shape {tuple(kept[0].shape)}" if kept else "did not come by"
        raise ValueError(
            f"{_name_of(model)}: the hidden states after layer {model.scale_layer}, which the scale reads "
            f"(scale_layer), {found}, where {expected} was expected; {type(model).__name__} cannot have a scale_layer"
        )
    return kept[0]


def last_tokens(input_ids: Tensor, pad_token_id: int | None) -> Tensor:
    """
    The tokens at which the stock classifiers of decoders read a reward.

    Args:
        input_ids (`torch.Tensor` of shape `(B, T)`):
            Token ids.
        pad_token_id (`int`, *optional*):
            Id of the padding token.

    Returns:
        `torch.Tensor` of shape `(B,)`: In each row the place of the last token that is not the padding token, or of
        the first token if there is none.
    """
    if pad_token_id is None:
        return torch.full_like(input_ids[:, 0], input_ids.shape[1] - 1)
    return last_places(input_ids.ne(pad_token_id))


def last_places(is_token: Tensor) -> Tensor:
    """In each row of a boolean tensor of shape `(B, T)`, the last place that is true, or 0 if there is none."""
    return (torch.arange(is_token.shape[-1], device=is_token.device) * is_token).argmax(dim=-1)


def tokens_to_read(shape: torch.Size, attention_mask: Tensor | None, last: Tensor | None, device: Any) -> Tensor:
    """
    The tokens over which hidden states are averaged.

    Args:
        shape (`torch.Size`):
            `(B, T)`, of the tokens that are computed.
        attention_mask (`torch.Tensor` of shape `(B, P + T)`, *optional*):
            Which tokens are attended to. The first P are those of a prefix that has been computed before, as that of
            prefix tuning. By default all are.
        last (`torch.Tensor` of shape `(B,)`, *optional*):
            Place of the token at which the reward is read; `None` for an encoder, which sees all tokens anyway.
        device (`torch.device`):
            Device of the result.

    Returns:
        `torch.Tensor` of shape `(B, T)`, boolean: Which tokens count.

    Raises:
        `ValueError`: If `attention_mask` has another number of dimensions.
    """
    if attention_mask is None:
        is_read = torch.ones(shape, dtype=torch.bool, device=device)
    elif attention_mask.ndim != 2:
        raise ValueError(
            f"the attention_mask has {attention_mask.ndim} dimensions; this model has a scale_layer, which averages "
            "over the tokens of a text, and needs a mask of shape (batch, tokens)"
        )
    else:
        is_read = attention_mask[:, -shape[1] :].ne(0).to(device)
    if last is None:
        return is_read
    positions, last = torch.arange(shape[1], device=device), last.to(device)[:, None]
    # A text of nothing but padding tokens is read at one that nothing attends to.
    return (is_read & (positions <= last)) | (positions == last)


def mean_over_tokens(states: Tensor, is_read: Tensor) -> Tensor:
    """
    Average the hidden states of a padded batch over the tokens of each row.

    Args:
        states (`torch.Tensor` of shape `(B, T, H)`):
            Hidden states.
        is_read (`torch.Tensor` of shape `(B, T)`, boolean):
            Which tokens count.

    Returns:
        `torch.Tensor` of shape `(B, H)`, float32 at least: Means.
    """
    # Some kernels return nan for tokens that attend to nothing, and 0 · nan is nan.
    total = states.masked_fill(~is_read[..., None], 0).sum(dim=1, dtype=_precise(states))
    return total / is_read.sum(dim=1, keepdim=True).clamp_min(1)


def mean_over_paths(states: Tensor, is_read: Tensor) -> Tensor:
    """
    Average the hidden states of a forest over the tokens of each of its sequences.

    Args:
        states (`torch.Tensor` of shape `(1, T, H)`):
            Hidden states of the row that holds the forest.
        is_read (`torch.Tensor` of shape `(N, T)`, boolean):
            Which tokens of the row each sequence consists of, up to where its reward is read.

    Returns:
        `torch.Tensor` of shape `(N, H)`, float32 at least: Means.
    """
    dtype = _precise(states)
    with torch.autocast(states.device.type, enabled=False):
        is_read = is_read.to(states.device)
        return is_read.to(dtype) @ states[0].to(dtype) / is_read.sum(dim=1, keepdim=True)


def running_means(states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """
    Average the hidden states of a decoder at each token, over it and those before it.

    Args:
        states (`torch.Tensor` of shape `(B, T, H)`):
            Hidden states.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            Which tokens are attended to. By default all are.

    Returns:
        `torch.Tensor` of shape `(B, T, H)`, float32 at least: Means; 0 where no token has come yet.
    """
    is_read = tokens_to_read(states.shape[:2], attention_mask, None, states.device)
    total = states.masked_fill(~is_read[..., None], 0).cumsum(dim=1, dtype=_precise(states))
    return total / is_read.cumsum(dim=1).clamp_min(1)[..., None]


def _precise(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)


# A backbone that is called by itself, as PPO calls it


class _Direct(list[Tensor]):
    """What is kept of a forward pass of a backbone that no forward pass of the whole model goes around."""


def _begin(module: nn.Module, args: tuple[Any, ...]) -> None:
    if _READING.get() is None:
        _READING.set(_Direct())


def _end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    kept = _READING.get()
    if not isinstance(kept, _Direct):
        return
    _READING.set(None)
    if output is None or not kept:  # the forward pass has raised an error
        return
    mask = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
    # Detached, because it may be the very tensor, which would then hold itself.
    output[0].states_for_scale = (kept[0].detach(), mask)


def states_of(last_hidden_states: Tensor) -> Tensor:
    """
    What the scale reads at each token, for the last hidden states of a backbone that was called by itself.

    Args:
        last_hidden_states (`torch.Tensor` of shape `(B, T, H)`):
            What the backbone returned, the tensor itself.

    Returns:
        `torch.Tensor` of shape `(B, T, H)`: [`running_means`].

    Raises:
        `ValueError`: If it is another tensor.
    """
    found = getattr(last_hidden_states, "states_for_scale", None)
    if found is None:
        raise ValueError(
            "the scale of this model reads a middle layer (scale_layer in config.disco), whose hidden states do not "
            "come with this tensor; call `score` with the last hidden states that the backbone of this module has "
            "just returned, not with a part or a copy of them"
        )
    return running_means(*found)
