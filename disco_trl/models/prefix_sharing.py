"""Prefix sharing: a decoder runs on a forest of token sequences, and computes every shared prefix once.

`disco_trl.data.forest` builds the forest. Its nodes are laid out in a single row, so that every layer except attention
computes each distinct token once. In attention the tokens of a node see the nodes on the path from the root, which is
what they would see in a row of their own. To a causal decoder the two are the same, so rewards and gradients equal
those of separate sequences up to rounding. [`prepare`] tries a model to find out whether this holds for it.

The forest reaches the attention layers in place of the attention mask. Everything in between (adapters, quantized
layers, gradient checkpointing, FSDP, DeepSpeed) passes a mask on without looking at it.
"""

import functools
import sys
import threading
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..data.forest import pack


# Attention implementations that can be called for the tokens of one node. flex_attention is not among them, because it
# would compile anew for every shape of a node.
IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
PREFIX = "shared_prefix_"
# Architectures that the tests have tried. `prepare` trusts this list where it cannot try a model itself, because the
# weights are sharded.
KNOWN_MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "opt")
# Up to this number of keys, attention on a CPU is faster in float32 than in bfloat16: at 100 keys, forward and
# backward take half as long again in bfloat16.
FLOAT32_KEYS = 256
# While `prepare` tries a model: the sliding window of each layer that has attended, in the order of the layers.
_TRIAL = threading.local()


# Attention


class _Layout:
    """
    The nodes of a row in the form that attention needs.

    Args:
        nodes (`torch.Tensor` of shape `(2, nodes)`):
            Length of each node, and the index of its parent (negative for a root).
    """

    def __init__(self, nodes: Tensor):
        self.lengths, parents = nodes.tolist()
        self.paths: list[list[int]] = []
        for node, parent in enumerate(parents):
            self.paths.append([*(self.paths[parent] if parent >= 0 else ()), node])
        self.path_lengths = [sum(self.lengths[node] for node in path) for path in self.paths]
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._varlen: tuple[Tensor, Tensor, Tensor] | None = None

    def mask(self, node: int, window: int | None, device: torch.device) -> Tensor:
        """Mask of a node, boolean of shape `(queries, keys)`: which keys of its path each query sees."""
        if (node, window) not in self._masks:
            queries, keys = self.lengths[node], self.path_lengths[node]
            mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
            self._masks[node, window] = mask if window is None else mask.triu(keys - queries - window + 1)
        return self._masks[node, window].to(device)

    def varlen(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """
        Indices for a kernel that takes sequences of various lengths.

        Returns:
            `tuple` of three integer `torch.Tensor`: Places in the row of the keys of all paths, one path after
            another; and where the queries and the keys of each node begin, both of shape `(nodes + 1,)`.
        """
        if self._varlen is None:
            starts = torch.tensor([0, *self.lengths]).cumsum(0)
            nodes = torch.arange(sum(self.lengths)).split(self.lengths)
            places = torch.cat([nodes[node] for path in self.paths for node in path])
            key_starts = torch.tensor([0, *self.path_lengths]).cumsum(0)
            self._varlen = (places.to(device), starts.to(device, torch.int32), key_starts.to(device, torch.int32))
        places, starts, key_starts = (tensor.to(device) for tensor in self._varlen)
        return places, starts, key_starts


def as_attention_mask(nodes: Tensor) -> Tensor:
    """
    Give nodes the form of an attention mask.

    Args:
        nodes (`torch.Tensor` of shape `(2, nodes)`):
            Nodes of a forest, as `disco_trl.data.forest.pack` returns them.

    Returns:
        `torch.Tensor` of shape `(1, 1, 2, nodes)`: A tensor with the four dimensions of a finished mask, which models
        pass on unchanged. Its dtype is integer, which tells it from a mask.
    """
    mask: Any = nodes[None, None]
    # The layout is computed once for all layers, unless something in between copies the tensor.
    mask.forest_layout = _Layout(nodes)
    return mask


def _attend(
    implementation: str, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """
    Attend along the paths of a forest: an attention function for the registry of transformers.

    It maps queries, keys and values of shape `(1, heads, T, D)` to outputs of shape `(1, T, heads, D)`. With any other
    mask it calls the implementation that it replaces.
    """
    attend: Any = (
        sys.modules[type(module).__module__].eager_attention_forward
        if implementation == "eager"
        else ALL_ATTENTION_FUNCTIONS[implementation]
    )
    if attention_mask is None or attention_mask.ndim != 4 or attention_mask.dtype != torch.int64:
        return attend(module, query, key, value, attention_mask, **kwargs)
    layout = getattr(attention_mask, "forest_layout", None) or _Layout(attention_mask[0, 0])
    # They belong to the whole row, and flash attention would read the bounds of packed sequences from them.
    kwargs.pop("position_ids", None)
    window = kwargs.get("sliding_window")
    if getattr(_TRIAL, "windows", None) is not None:
        _TRIAL.windows.append(window)
    device = query.device
    # Autocast is off below, so that short paths can be computed in float32. Inputs are cast as it would cast them.
    if torch.is_autocast_enabled(device.type):
        query, key, value = (tensor.to(torch.get_autocast_dtype(device.type)) for tensor in (query, key, value))
    if implementation != "eager" and _has_varlen_kernel(query, value, kwargs):
        return _attend_varlen(layout, module, query, key, value, **kwargs), None

    outputs = []
    queries, keys, values = (tensor.split(layout.lengths, dim=2) for tensor in (query, key, value))
    for node, path in enumerate(layout.paths):
        masked: Tensor | None = None
        is_causal = len(path) == 1 and (window is None or layout.lengths[node] <= window)
        # Flash attention aligns the last query with the last key. Other implementations do so only where there are as
        # many queries as keys, so that a path before the node needs a mask.
        if implementation == "eager" or not (is_causal or "flash" in implementation):
            masked = layout.mask(node, window, device)[None, None]
            if implementation == "eager":
                masked = torch.zeros_like(masked, dtype=query.dtype).masked_fill(~masked, torch.finfo(query.dtype).min)
        states = [
            queries[node],
            torch.cat([keys[part] for part in path], dim=2),
            torch.cat([values[part] for part in path], dim=2),
        ]
        if device.type == "cpu" and query.dtype.itemsize < 4 and layout.path_lengths[node] <= FLOAT32_KEYS:
            states = [state.float() for state in states]
        with torch.autocast(device.type, enabled=False):
            output, _ = attend(module, *states, masked, **kwargs)
        outputs.append(output.to(query.dtype))
    return torch.cat(outputs, dim=1), None


def _has_varlen_kernel(query: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether torch's flash attention for sequences of various lengths supports this call (CUDA, half precision)."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and not kwargs.get("dropout")
        and kwargs.get("softcap") is None
        and kwargs.get("s_aux") is None
        and _varlen_attn() is not None
    )


@functools.cache
def _varlen_attn() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    return varlen_attn


def _attend_varlen(
    layout: _Layout, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
) -> Tensor:
    """Attend for all nodes in one kernel: the queries of each node to copies of the keys of its path."""
    places, query_starts, key_starts = layout.varlen(query.device)
    window = kwargs.get("sliding_window")
    output = _varlen_attn()(
        query[0].transpose(0, 1).contiguous(),
        *(tensor[0].transpose(0, 1).index_select(0, places) for tensor in (key, value)),
        query_starts,
        key_starts,
        max(layout.lengths),
        max(layout.path_lengths),
        scale=kwargs.get("scaling"),
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None]


# Which models


def prepare(model: Any) -> str | None:
    """
    Prepare a model to run on forests, if it can.

    The attention function of the model is replaced by one that understands a forest, and otherwise calls the
    implementation that the model was loaded with. Then a few tokens are run through the model, as a forest and as
    separate sequences. All layers have to attend along the forest, with the sliding windows that the config states,
    and the hidden states have to agree. This tells a causal decoder from an encoder, from a recurrent model, and from
    a model with other positions or windows. A model that fails is left unchanged, and is tried only once.

    Args:
        model ([`~disco_trl.DiscoRewardModel`] or [`~peft.PeftModel`]):
            A disco model, or an adapter around one.

    Returns:
        `str`, *optional*: The reason why the model cannot run on forests, as a clause, or `None` if it can.
    """
    if is_peft_model(model):
        if model.active_peft_config.is_prompt_learning:
            return "its adapter puts tokens of its own before each sequence"
        model = model.get_base_model()
    # `set_attn_implementation` may have replaced our function since.
    is_ready = str(model.config._attn_implementation).startswith(PREFIX)
    if not hasattr(model, "_prefix_sharing_refusal") or (model._prefix_sharing_refusal is None and not is_ready):
        model._prefix_sharing_refusal = _prepare(model)
    return model._prefix_sharing_refusal


def _prepare(model: Any) -> str | None:
    config = model.config.get_text_config()
    backbone = getattr(model, model.base_model_prefix, None)
    if getattr(model, "head_name", None) != "score" or not isinstance(backbone, PreTrainedModel):
        return "it is not a disco model on a decoder, whose reward is read at the last token"
    implementation = model.config._attn_implementation.removeprefix(PREFIX)
    if implementation not in IMPLEMENTATIONS:
        return f"its attention implementation is {implementation!r}, not one of {', '.join(IMPLEMENTATIONS)}"
    if not {"full_attention", "sliding_attention"}.issuperset(getattr(config, "layer_types", None) or ()):
        return f"its layers ({', '.join(sorted(set(config.layer_types)))}) are not all of attention"
    name = PREFIX + implementation
    ALL_ATTENTION_FUNCTIONS.register(name, functools.partial(_attend, implementation))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    for part in configs.values():
        part._attn_implementation = name
    # With ZeRO-3 and FSDP this process has a part of each parameter, or none, so the model cannot be tried here.
    if any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        known = config.model_type in KNOWN_MODEL_TYPES
        refusal = None if known else f"its weights are in pieces, and nobody has tried a {config.model_type!r} whole"
    else:
        refusal = _try_forest(model, config)
    if refusal is not None:
        for part in configs.values():
            part._attn_implementation = implementation
    return refusal


@torch.no_grad()
def _try_forest(model: Any, config: Any) -> str | None:
    """Compare a small forest with the same sequences in rows. Return why they differ, or `None`."""
    windows = _TRIAL.windows = []
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        # Everything runs in evaluation mode, except 4-bit layers: in that mode bitsandbytes repacks their weights on a
        # CPU, which rounds them permanently.
        module.training = hasattr(getattr(module, "weight", None), "quant_state")
    try:
        ids = [token for token in range(min(config.vocab_size, 24)) if token != config.pad_token_id]
        tokens = torch.tensor(ids)[torch.arange(40) * 7 % len(ids)].tolist()
        sequences = [tokens[:20], tokens[:12] + tokens[30:35], tokens[25:30]]
        batch = {name: tensor.to(model.device) for name, tensor in pack(sequences, config.pad_token_id).items()}
        rows = torch.nn.utils.rnn.pad_sequence(
            list(map(torch.tensor, sequences)), batch_first=True, padding_value=config.pad_token_id
        ).to(model.device)
        mask = rows.ne(config.pad_token_id).long()
        # Under autocast other kernels run.
        for dtype in (None, torch.bfloat16) if rows.is_cuda else (None,):
            windows.clear()
            # The model is called as a whole, because FSDP gathers the parameters of a sharded model only for a call.
            with torch.autocast(rows.device.type, dtype=dtype, enabled=dtype is not None):
                shared = model(**batch).pooled_hidden_state
                alone = model(input_ids=rows, attention_mask=mask, use_cache=False).pooled_hidden_state
            if windows != _windows_of_layers(config):
                return "its layers do not all attend by transformers' common interface"
            # Rounding errors are far below these tolerances, and the effect of a wrong token or position far above. An
            # accelerator may multiply float32 in TF32.
            exact = dtype is None and alone.dtype == torch.float32 and not getattr(model, "is_quantized", False)
            difference = ((shared - alone).float().norm() / alone.float().norm()).item()
            tolerance = 0.1 if not exact else 1e-2 if rows.is_cuda else 1e-4
            if not difference < tolerance:
                return (
                    f"it does not give a prefix the same hidden states in both ways (they differ by {difference:.2g})"
                )
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        return f"it does not take a forest for an attention mask ({type(error).__name__}: {str(error)[:200]})"
    finally:
        _TRIAL.windows = None
        for module, mode in modes.items():
            module.training = mode
    return None


def _windows_of_layers(config: Any) -> list[int | None]:
    """Sliding window of each layer as the config states it, `None` for a layer without one."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return [window if kind == "sliding_attention" else None for kind in layer_types]
    uses_it = getattr(config, "use_sliding_window", True)
    return [window if uses_it else None] * config.num_hidden_layers
