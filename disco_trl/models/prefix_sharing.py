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
from typing import Any, cast

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from ..data.forest import Nodes
from .distributed import is_main_process
from .prefix_trial import StatesOf, current_trial, try_forest
from .varlen_attention import COMPLETE_SINCE, VarlenKernel, installed_kernel, is_for_kernel, lacking


logger = logging.get_logger(__name__)

# Attention implementations that can be called for the tokens of one node. flex_attention is not among them, because it
# would compile anew for every shape of a node.
IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
PREFIX = "shared_prefix_"
# Architectures that the tests have tried. `prepare` trusts this list where it cannot try a model itself, because the
# weights are sharded.
KNOWN_MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "opt")
# Kinds of adapters that the tests have tried, for the same use.
KNOWN_ADAPTERS = (
    *("ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA"),
    *("GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "PSOFT"),
    *("PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA"),
    *("VERA", "WAVEFT"),
)
# Up to this number of keys, attention on a CPU is faster in float32 than in bfloat16: at 100 keys, forward and
# backward take half as long again in bfloat16.
FLOAT32_KEYS = 256
_ONE_TRIAL = threading.Lock()


# Attention


class _Layout:
    """
    The nodes of a row in the form that attention needs.

    Args:
        nodes ([`~disco_trl.data.forest.Nodes`]):
            Length and parent of each node.
    """

    def __init__(self, nodes: Nodes):
        self.lengths = nodes.lengths
        self.paths: list[list[int]] = []
        for node, parent in enumerate(nodes.parents):
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

    def tokens_up_to(self, places: Tensor) -> Tensor:
        """
        The tokens that a token sees, itself included, apart from sliding windows.

        Args:
            places (`torch.Tensor` of shape `(N,)`):
                Places of tokens in the row.

        Returns:
            `torch.Tensor` of shape `(N, T)`, boolean: Which tokens of the row each of them sees.
        """
        is_on_path = torch.zeros(len(self.paths), len(self.paths), dtype=torch.bool)
        for node, path in enumerate(self.paths):
            is_on_path[node, path] = True
        nodes = torch.tensor([node for node, length in enumerate(self.lengths) for _ in range(length)])
        is_on_path, nodes = is_on_path.to(places.device), nodes.to(places.device)
        row = torch.arange(len(nodes), device=places.device)
        return is_on_path[nodes[places]][:, nodes] & (row <= places[:, None])

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


def as_attention_mask(nodes: Nodes, device: torch.device) -> Tensor:
    """
    Give nodes the form of an attention mask.

    Args:
        nodes ([`~disco_trl.data.forest.Nodes`]):
            Nodes of a forest, as `disco_trl.data.forest.pack` returns them.
        device (`torch.device`):
            Device of the model.

    Returns:
        `torch.Tensor` of shape `(1, 1, 2, nodes)`: A tensor with the four dimensions of a finished mask, which models
        pass on unchanged. Its dtype is integer, which tells it from a mask.
    """
    mask: Any = torch.tensor([[[nodes.lengths, nodes.parents]]]).to(device, non_blocking=True)
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
    attend = _replaced(implementation, module)
    if attention_mask is None or attention_mask.ndim != 4 or attention_mask.dtype != torch.int64:
        return attend(module, query, key, value, attention_mask, **kwargs)
    layout = getattr(attention_mask, "forest_layout", None) or _Layout(Nodes(*attention_mask[0, 0].tolist()))
    # They belong to the whole row, and flash attention would read the bounds of packed sequences from them.
    kwargs.pop("position_ids", None)
    trial = current_trial()
    if trial is not None:
        trial.windows.append(kwargs.get("sliding_window"))
        trial.dtypes |= {query.dtype, key.dtype, value.dtype}  # Rotations take queries and keys out of autocast.
    try:
        return _attend_forest(implementation, attend, layout, module, query, key, value, kwargs), None
    except Exception as error:
        if trial is not None:
            trial.failure = error
        raise


def _replaced(implementation: str, module: torch.nn.Module) -> Any:
    """The attention function that a model would call without us."""
    if implementation != "eager":
        return ALL_ATTENTION_FUNCTIONS[implementation]
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(f"{type(module).__name__} has no function eager_attention_forward")
    return eager


def _attend_forest(
    implementation: str, attend: Any, layout: _Layout, module: torch.nn.Module, query: Tensor, key: Tensor,
    value: Tensor, kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    window = kwargs.get("sliding_window")
    device = query.device
    # Autocast is off below, so that short paths can be computed in float32. Inputs are cast as it would cast them.
    if torch.is_autocast_enabled(device.type):
        query, key, value = (tensor.to(torch.get_autocast_dtype(device.type)) for tensor in (query, key, value))
    if implementation != "eager" and is_for_kernel(query, value, kwargs):
        reason = lacking(window)
        if reason is None:
            return _attend_at_once(layout, query, key, value, kwargs)
        if (trial := current_trial()) is not None:
            trial.lacking = reason

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
    return torch.cat(outputs, dim=1)


def _attend_at_once(layout: _Layout, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Attend for all nodes in one kernel: the queries of each node to copies of the keys of its path."""
    places, query_starts, key_starts = layout.varlen(query.device)
    kernel = cast(VarlenKernel, installed_kernel())
    # Not `tensor[0]`, whose gradient is a row of zeros into which the gradient is copied.
    states, keys, values = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    output = kernel(
        states.contiguous(),
        keys.index_select(0, places),
        values.index_select(0, places),
        query_starts,
        key_starts,
        max(layout.lengths),
        max(layout.path_lengths),
        scale=kwargs.get("scaling"),
        window=kwargs.get("sliding_window"),
    )
    return output[None]


# Which models


def prepare(model: Any) -> str | None:
    """
    Prepare a model to run on forests, if it can.

    The attention function of the model is replaced by one that understands a forest, and otherwise calls the
    implementation that the model was loaded with. A few tokens are run through the model, as a forest and as separate
    sequences (see `disco_trl.models.prefix_trial`). All layers have to attend along the forest, with the sliding
    windows that the config states, and the hidden states have to agree. This tells a causal decoder from an encoder,
    from a recurrent model, from a model with other positions or windows, and from an adapter that mixes tokens. A
    model that fails is left unchanged. It is tried again only if its attention implementation or its adapters change.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A disco model, a causal language model, or an adapter around either.

    Returns:
        `str`, *optional*: The reason why the model cannot run on forests, as a clause, or `None` if it can.
    """
    inner = model.get_base_model() if is_peft_model(model) else model
    if inner is not model and model.active_peft_config.is_prompt_learning:
        return "its adapter puts tokens of its own before each sequence"
    # Another thread that scores with the model waits, as some parameters have other values during the trial.
    with _ONE_TRIAL:
        implementation = str(inner.config._attn_implementation)
        # An adapter adds modules, and merging it removes them.
        state = (
            implementation.removeprefix(PREFIX),
            tuple(getattr(model, "active_adapters", ())) if inner is not model else (),
            sum(1 for _ in model.modules()),
        )
        tried, refusal = getattr(model, "_prefix_sharing", (None, None))
        is_ready = implementation.startswith(PREFIX)
        if tried != state or (refusal is None and not is_ready):
            refusal = _prepare(model, inner)
            model._prefix_sharing = (state, refusal)
        return refusal


def _prepare(model: Any, inner: Any) -> str | None:
    config = inner.config.get_text_config()
    backbone = getattr(inner, inner.base_model_prefix, None)
    states_of: StatesOf
    if isinstance(backbone, PreTrainedModel) and getattr(inner, "head_name", None) == "score":
        states_of = _read_by_the_head
    elif isinstance(backbone, PreTrainedModel) and inner.get_output_embeddings() is not None:
        states_of = _at_the_last_token
    else:
        return "it is not a disco model on a decoder, whose reward is read at the last token, nor a language model"
    implementation = inner.config._attn_implementation.removeprefix(PREFIX)
    if implementation not in IMPLEMENTATIONS:
        return f"its attention implementation is {implementation!r}, not one of {', '.join(IMPLEMENTATIONS)}"
    if not {"full_attention", "sliding_attention"}.issuperset(getattr(config, "layer_types", None) or ()):
        return f"its layers ({', '.join(sorted(set(config.layer_types)))}) are not all of attention"
    name = PREFIX + implementation
    ALL_ATTENTION_FUNCTIONS.register(name, functools.partial(_attend, implementation))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}

    def attend_by(name: str) -> None:
        for part in configs.values():
            part._attn_implementation = name

    attend_by(implementation)
    # With ZeRO-3 and FSDP this process has a part of each parameter, or none, so the model cannot be tried here.
    if any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        refusal = _untried(model, config)
        if refusal is None:
            attend_by(name)
        return refusal
    refusal, trial = try_forest(model, config, functools.partial(attend_by, name), states_of)
    if refusal is not None:
        attend_by(implementation)
    elif trial.lacking is not None and is_main_process():
        logger.warning(
            f"Shared prefixes attend one node at a time on this GPU, which gives the same numbers and is slow: "
            f"{trial.lacking}. Install torch>={COMPLETE_SINCE}."
        )
    return refusal


def _read_by_the_head(model: Any, batch: dict[str, Any]) -> Tensor:
    # The model is called as a whole, because FSDP gathers the parameters of a sharded model only for a call.
    return model(**batch).pooled_hidden_state


def _at_the_last_token(model: Any, batch: dict[str, Any]) -> Tensor:
    """As a disco model reads its states, of a language model."""
    nodes, read_at = batch.get("nodes"), batch.get("read_at")
    given = {name: tensor for name, tensor in batch.items() if name not in ("nodes", "read_at")}
    if nodes is not None:
        given["attention_mask"] = as_attention_mask(nodes, given["input_ids"].device)
    states = model(**given, use_cache=False, output_hidden_states=True).hidden_states[-1]
    if nodes is not None:
        return states[0, read_at]
    return states[torch.arange(len(states), device=states.device), batch["attention_mask"].sum(dim=1) - 1]


def _untried(model: Any, config: Any) -> str | None:
    """Why a model whose weights are in pieces cannot be trusted to run on forests, or `None`."""
    if config.model_type not in KNOWN_MODEL_TYPES:
        return f"its weights are in pieces, and nobody has tried a {config.model_type!r} whole"
    adapters = model.peft_config.values() if is_peft_model(model) else ()
    kinds = {str(getattr(adapter.peft_type, "value", adapter.peft_type)) for adapter in adapters}
    if unknown := sorted(kinds.difference(KNOWN_ADAPTERS)):
        return f"its weights are in pieces, and nobody has tried an adapter of the kind {unknown[0]} whole"
    return None
