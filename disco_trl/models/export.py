"""Export: a reward model of any kind as files that other tools load as they are.

- `to="scalar"` writes the stock class with one label, the location. Any tool that loads a scalar reward model, however
  strict, loads it.
- `to="two-logit"` writes the stock class with two labels, the location and the raw scale, for engines (vLLM, SGLang,
  ONNX Runtime) whose clients compute the scale with [`from_two_logits`].
- `to="disco"` writes a disco checkpoint, which other tools load as a scalar reward model.

An adapter is merged into its base model, in float32 and before any rounding. This also helps where the directory of an
adapter cannot be loaded: `AutoModelForSequenceClassification.from_pretrained(adapter_dir)` neither resizes the base
model for tokens that training has added (with TRL's `chat_template_path` it fails with an index out of bounds) nor
sets the padding token of training, by which the last token is found.

An adapter that was trained with QLoRA is merged into the base model as it was before quantization. Training saw the
base with its rounding errors, so the rewards of the merged model differ from those of the 4-bit base with the adapter
(`DiscoRewardModel.from_pretrained(adapter, quantization_config=...)`). No check can say which of the two is right;
what is checked is that the merged model agrees with the unquantized base with the adapter. As to the size of the
difference: the model of the quickstart (SmolLM2-135M, trained on the unquantized base) on 60 held-out tweets, whose
locations have a standard deviation of 2.4 and whose log scales have one of 0.16, changes with a base in nf4 by 0.37
and 0.05 on average and by 1.3 and 0.23 at most. Rounding it to bfloat16 changes it by 0.05 and 0.003 on average. Where
this matters, use a QLoRA adapter with the base that it was trained on.

**Two logits.** The raw scale is linear in the hidden state, up to the constant weight · mean_hidden. The heads of
decoders have no bias that could hold it, so for every architecture it is in `config.json`, with the other constants,
under `reward_distribution`. Without disco-trl, location and scale in the units of training are

```python
constants = config["reward_distribution"]
raw = (logits[1] - constants["raw_scale_offset"]) / constants["max_log_scale"]
location, scale = logits[0], constants["unit_scale"] * exp(constants["max_log_scale"] * tanh(raw))
```

Both logits read the pooled last hidden state. A scale that reads a middle layer (`scale_layer`) cannot be exported in
this form. One that is the same for all answers can: its logit is 0 everywhere, and the formula gives the constant.

A learned location error (`score.likelihood`) is not included. Probabilities from a two-logit model use σ alone, and
are overconfident by that much.

The logits are needed without an activation. `problem_type` is `"regression"`, so that the pipelines of Transformers
and `classify` in vLLM apply neither softmax nor sigmoid (for any other endpoint of vLLM pass `use_activation=False`);
with SGLang use `/classify`, because `/v1/classify` applies a softmax. Texts have to be tokenized as in training, with
the end-of-text token. The classes and pipelines of Transformers are tested. What is said of vLLM and SGLang follows
their documentation, and neither was run.

**Verification.** The written files are loaded again in the usual way and compared with the source on sample texts, one
by one and in a padded batch, before they get their name. In float32 arithmetic, with the weights as rounded to
`dtype`, all outputs have to agree within [`TOLERANCE`]. What bfloat16 or float16 costs in use depends on the
language model and not on the export: it is measured against the source in float32 and reported.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data.files import locked, written_at_once
from ..data.tokenization import tokenize
from ..distributions.reward_distribution import RewardDistribution, get_family
from .heads import DiscoHead
from .inference import load_trained, run_in_batches
from .modeling import DiscoRewardModel
from .outputs import OWN_OUTPUTS
from .scale_head import MAX_LOG_SCALE


TARGETS = ("scalar", "two-logit", "disco")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The entry of config.json that holds the constants of a two-logit model.
TWO_LOGIT_ENTRY = "reward_distribution"

# Largest difference that verification accepts: of locations relative to max(1, |μ|), and of log σ. The order of
# additions in float32 accounts for about 1e-6, and merging an adapter for about 1e-5.
TOLERANCE = 1e-4

SAMPLE_TEXTS = (
    "Yes.",
    "The capital of France is Paris.",
    "I did not like the film at all, but my sister, who has seen it twice, says that it grows on you: 8/10?",
    "def add(a, b):\n    return a + b  # works for strings, too",
    "Ich weiß es nicht… 申し訳ありませんが、わかりません。 🙂",
    "To learn the piano, practise a little every day. " * 6,
)


def from_two_logits(logits: Tensor, constants: Mapping[str, Any]) -> RewardDistribution:
    """
    Convert the logits of a two-logit model to reward distributions.

    Args:
        logits (`torch.Tensor` of shape `(..., 2)`):
            Logits of the model, without an activation.
        constants (`Mapping`):
            Entry `reward_distribution` of its config.json.

    Returns:
        [`~disco_trl.RewardDistribution`]: Location and scale of shape `(...)`, in float32.
    """
    location, raw_with_offset = logits.double().unbind(-1)
    bound = constants["max_log_scale"]
    raw = raw_with_offset - constants["raw_scale_offset"]
    scale = constants["unit_scale"] * torch.exp(bound * torch.tanh(raw / bound))
    return RewardDistribution(location.float(), scale.float(), constants["reward_family"])


class ProofError(RuntimeError):
    """Error for written files that do not give the rewards of their source."""


@dataclass(frozen=True)
class ExportReport:
    """
    What was written, and how far its rewards are from those of its source on the sample texts.

    Attributes:
        architecture (`str`):
            Class that loads the files.
        dtype (`str`):
            Dtype of the weights.
        location_difference (`float`):
            Largest |Δμ| / max(1, |μ|) in float32 arithmetic, caused by merging or by writing and loading. At most
            [`TOLERANCE`].
        log_scale_difference (`float`, *optional*):
            Largest |Δ log σ| of the same kind. `None` for a scalar model.
        location_rounding (`float`):
            Largest |Δμ| between the exported model, run in `dtype`, and the source in float32.
        log_scale_rounding (`float`, *optional*):
            Largest |Δ log σ| of the same kind. `None` for a scalar model.
        constant_scale (`float`, *optional*):
            The scale of all answers, in reward units, if it is the same for all. `None` for a scalar model.
    """

    architecture: str
    dtype: str
    location_difference: float
    log_scale_difference: float | None
    location_rounding: float
    log_scale_rounding: float | None
    constant_scale: float | None

    def __str__(self) -> str:
        def figures(location: float, log_scale: float | None) -> str:
            return f"location {location:.1e}" + ("" if log_scale is None else f", log scale {log_scale:.1e}")

        lines = [
            f"{self.architecture}, {self.dtype}: loads in the plain way and gives the rewards of its source",
            f"  largest difference on {len(SAMPLE_TEXTS)} texts, alone and padded, in float32: "
            + figures(self.location_difference, self.log_scale_difference)
            + f" (allowed: {TOLERANCE:.0e})",
        ]
        if self.dtype != "float32":
            lines.append(
                f"  run in {self.dtype}, against the source in float32: "
                + figures(self.location_rounding, self.log_scale_rounding)
            )
        if self.constant_scale is not None:
            lines.append(
                f"  the scale is {self.constant_scale:.6g} for all answers, and says nothing about a single one"
            )
        return "\n".join(lines)


def export(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    to: str,
    dtype: str = "float32",
    overwrite: bool = False,
) -> ExportReport:
    """
    Write a reward model, its tokenizer and its chat template as files that other tools load.

    Args:
        model (`str` or `os.PathLike`):
            Directory or Hub id of a disco checkpoint, a scalar reward model or a PEFT adapter.
        output (`str` or `os.PathLike`):
            Directory to write. It appears only after verification has succeeded.
        to (`str`):
            `"scalar"`, `"two-logit"` or `"disco"`; see the documentation of this module.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype of the weights: `"float32"`, `"bfloat16"` or `"float16"`. The head of a disco checkpoint stays in
            float32.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a model in `output`.

    Returns:
        [`ExportReport`]: What was written, and how close it is to its source.

    Raises:
        `ValueError`: If the model cannot be exported to that form, with the reason, or if `output` is in use.
        [`ProofError`]: If the loaded files do not give the rewards of the source. Nothing is left in `output`.
    """
    if to not in TARGETS:
        raise ValueError(f"to={to!r} is unknown; choose one of {', '.join(map(repr, TARGETS))}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(map(repr, DTYPES))}")
    model, output = os.fspath(model), Path(output)
    _check_output(model, output, overwrite)

    tokenizer, source = _load(model, to)
    head = (source.get_base_model() if is_peft_model(source) else source).scale_head
    constant = (head.fixed_scale or head.unit_scale) if to != "scalar" and head.is_constant else None
    sequences = _samples(tokenizer, source)
    expected = _score(source, sequences)
    merging: _Differences = (0.0, None)
    if is_peft_model(source):
        _check_output(source.get_base_model().config._name_or_path, output, overwrite)
        source = source.merge_and_unload(safe_merge=True)
        merging = _compare("the merged model", _score(source, sequences), expected)
    _round_weights(source, DTYPES[dtype], with_head=to != "disco")
    rounded = _score(source, sequences)
    with locked(output.resolve()), written_at_once(output.resolve(), folder=True) as folder:
        _write(source, folder, to, DTYPES[dtype])
        tokenizer.save_pretrained(folder)
        del source  # its memory is needed for what comes now
        written = _reload(folder, to, DTYPES[dtype])
        in_dtype = _score(written, sequences)
        location_rounding, log_scale_rounding = _differences(in_dtype, expected, relative=False)
        if not math.isfinite(location_rounding):
            raise ProofError(f"in {dtype} its rewards are not finite: the language model overflows; use bfloat16")
        in_float32 = in_dtype if dtype == "float32" else _score(written.float(), sequences)
        location_difference, log_scale_difference = _compare("the reloaded model", in_float32, rounded)
    return ExportReport(
        architecture=type(written).__name__,
        dtype=dtype,
        location_difference=max(location_difference, merging[0]),
        log_scale_difference=None if log_scale_difference is None else max(log_scale_difference, merging[1] or 0.0),
        location_rounding=location_rounding,
        log_scale_rounding=log_scale_rounding,
        constant_scale=constant,
    )


def _check_output(model: str, output: Path, overwrite: bool) -> None:
    if Path(model).exists() and Path(model).resolve().is_relative_to(output.resolve()):
        raise ValueError(f"{output} is where the model itself is, or its adapter's base; choose another output")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise ValueError(f"{output} is a file; choose another output")
    if not overwrite:
        raise ValueError(f"{output} is not empty; choose another output, or pass --overwrite to replace it")
    if not (output / "config.json").exists():
        raise ValueError(f"{output} is not empty and holds no model (no config.json), so it is not replaced")


# The source


def _load(path: str, to: str) -> tuple[PreTrainedTokenizerBase, Any]:
    """Load tokenizer and model, in float32 and evaluation mode. Raise a `ValueError` if it cannot be exported."""
    source = load_trained(path, dtype=torch.float32)
    inner = source.get_base_model() if is_peft_model(source) else source
    if getattr(inner, "is_quantized", False):
        raise ValueError(
            f"{path}: {inner.config._name_or_path} is stored in quantized form, and weights are merged and written "
            "in full precision; name the model that it was quantized from (of an adapter: as "
            "base_model_name_or_path in adapter_config.json)"
        )
    if is_peft_model(source) and not hasattr(source, "merge_and_unload"):
        kind = source.active_peft_config.peft_type.value
        raise ValueError(
            f"{path}: a {kind} adapter does not change weights, so it cannot be merged; use it with its base model by "
            "DiscoRewardModel.from_pretrained"
        )

    scale = inner.scale_head
    if to == "two-logit" and scale.fixed_scale is not None:
        raise ValueError(
            f"{path}: its scale is fixed at {scale.fixed_scale:g} and no function of the hidden state, so a second "
            "logit would say nothing; use --to scalar"
        )
    if to == "two-logit" and get_family(inner.config.disco["reward_family"]).shape_names:
        raise ValueError(
            f"{path}: a {inner.config.disco['reward_family']!r} reward has shape parameters beside location and "
            "scale, which two logits cannot hold; use --to scalar or --to disco"
        )
    if to == "two-logit" and scale.layer is not None and not scale.is_constant:
        raise ValueError(
            f"{path}: its scale reads the mean hidden state of layer {scale.layer} (scale_layer), and the second of "
            "two logits reads what the first one does, the last hidden state; use --to scalar or --to disco"
        )
    # A scale that training has left or made constant is an honest result. One that no training has seen is none, and a
    # file that promises a scale would mislead.
    if to != "scalar" and scale.fixed_scale is None and scale.is_constant and not scale.rows_seen:
        raise ValueError(
            f"{path}: its scale is the same for all answers, because its weight is zero and no answers have trained "
            "it; use --to scalar"
        )

    tokenizer = _load_tokenizer(path, inner)
    rows = len(inner.get_input_embeddings().weight)
    if len(tokenizer) > rows:
        raise ValueError(f"{path}: its tokenizer has {len(tokenizer)} tokens, but the model only {rows}")
    text_config = inner.config.get_text_config()
    if text_config.pad_token_id is None:
        # TRL does the same. The stock code finds the last token by it.
        text_config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token else tokenizer.eos_token_id
    return tokenizer, source


def _load_tokenizer(path: str, inner: Any) -> PreTrainedTokenizerBase:
    places = dict.fromkeys((path, inner.config._name_or_path))  # an adapter's directory may have none
    reasons = []
    for place in places:
        try:
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reasons.append(f"{place}: {error}")
    raise ValueError("the model has no tokenizer, without which it is of no use; save it there. " + " ".join(reasons))


def _samples(tokenizer: PreTrainedTokenizerBase, source: Any) -> list[list[int]]:
    """Tokenize the sample texts, the last two as a conversation if the tokenizer has a chat template."""
    contents: list[Any] = list(SAMPLE_TEXTS)
    if tokenizer.chat_template is not None:
        roles = ("user", "assistant")
        contents[-1] = [{"role": role, "content": text} for role, text in zip(roles, SAMPLE_TEXTS[-2:], strict=True)]
    # Where a text is cut does not matter for a comparison. The 8 are for RoBERTa, which counts positions from the id
    # of its padding token.
    limit = getattr(source.config, "max_position_embeddings", None) or 4096
    return [tokenize(tokenizer, content)[: max(limit - 8, 1)] for content in contents]


# What is written


@torch.no_grad()
def _round_weights(source: Any, dtype: torch.dtype, with_head: bool) -> None:
    """Round weights to the values that they will have in the files, and keep them in float32."""
    for name, parameter in source.named_parameters():
        if with_head or not name.startswith(f"{source.head_name}."):
            parameter.copy_(parameter.to(dtype))


def _write(source: Any, folder: Path, to: str, dtype: torch.dtype) -> None:
    """Save the model as an instance of the class that will load it. Loading the weights into it is strict."""
    config, state = copy.deepcopy(source.config), source.state_dict()
    head: DiscoHead = source.get_submodule(source.head_name)
    target_class: type[PreTrainedModel] = type(source)
    head_prefix = f"{source.head_name}."
    if to != "disco":
        (target_class,) = (base for base in target_class.__bases__ if base is not DiscoRewardModel)
        # Of the head, the location row alone. All else is in its submodules.
        row = {f"{head_prefix}weight", f"{head_prefix}bias"}
        state = {name: value for name, value in state.items() if name in row or not name.startswith(head_prefix)}
    if to == "two-logit":
        offset = torch.dot(head.scale.weight[0].double(), head.scale.mean_hidden.double()).item()
        setattr(
            config,
            TWO_LOGIT_ENTRY,
            {
                "reward_family": config.disco["reward_family"],
                "unit_scale": head.scale.unit_scale * head.scale.log_level.exp().item(),
                "max_log_scale": MAX_LOG_SCALE,
                "raw_scale_offset": offset,
                "formula": "location = logits[0]; scale = unit_scale * exp(max_log_scale * "
                "tanh((logits[1] - raw_scale_offset) / max_log_scale))",
            },
        )
        config.id2label = {0: "location", 1: "raw_scale"}
        config.label2id = {"location": 0, "raw_scale": 1}
        state[f"{head_prefix}weight"] = torch.cat([head.weight, head.scale.weight])
        if head.bias is not None:
            state[f"{head_prefix}bias"] = torch.cat([head.bias, torch.zeros_like(head.bias)])
    if to != "disco":
        _make_plain(config)
    state = {
        name: tensor.detach().to(torch.float32 if to == "disco" and name.startswith(head_prefix) else dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in state.items()
    }
    with torch.device("meta"):
        target = target_class(config)
    target.load_state_dict(state, strict=True, assign=True)
    target.save_pretrained(folder)


def _make_plain(config: Any) -> None:
    """Remove our own entries from a config, and mark its logits as numbers, and not as scores of classes."""
    del config.disco
    ignored = [key for key in config.keys_to_ignore_at_inference if key not in OWN_OUTPUTS]
    del config.keys_to_ignore_at_inference
    if ignored != getattr(config, "keys_to_ignore_at_inference", []):
        config.keys_to_ignore_at_inference = ignored
    config.problem_type = "regression"


# Verification


def _reload(folder: Path, to: str, dtype: torch.dtype) -> Any:
    if to == "disco":
        return DiscoRewardModel.from_pretrained(folder, dtype=dtype).eval()
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if faults := {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}:
        raise ProofError(f"the stock class does not take the files as they are: {faults}")
    return model.eval()


# Locations and log scales, of shape `(2N,)` each, of N texts that were scored alone and then in one batch
_Scores = tuple[Tensor, Tensor | None]
# The largest difference of locations, and of log scales where both sides have them
_Differences = tuple[float, float | None]


def _score(model: Any, sequences: list[list[int]]) -> _Scores:
    places, locations, log_scales = [], [], []
    for start, tokens_per_batch in ((0, 1), (len(sequences), sum(map(len, sequences)) * len(sequences))):
        for indices, output in run_in_batches(model, sequences, tokens_per_batch):
            # The order of the batches depends on whether the model shares prefixes.
            places += [start + index for index in indices]
            location, scale = output.logits[:, 0], getattr(output, "scale", None)
            if output.logits.shape[-1] == 2:
                reward = from_two_logits(output.logits, getattr(model.config, TWO_LOGIT_ENTRY))
                location, scale = reward.location, reward.scale
            locations.append(location.float())
            if scale is not None:
                log_scales.append(scale.reshape(-1).float().log())
    order = torch.tensor(places).argsort()
    return torch.cat(locations)[order], torch.cat(log_scales)[order] if log_scales else None


def _differences(scores: _Scores, expected: _Scores, relative: bool = True) -> _Differences:
    difference = (scores[0] - expected[0]).abs()
    if relative:
        difference /= expected[0].abs().clamp_min(1)
    log_scale = None
    if scores[1] is not None and expected[1] is not None:
        log_scale = (scores[1] - expected[1]).abs().max().item()
    return difference.max().item(), log_scale


def _compare(what: str, scores: _Scores, expected: _Scores) -> _Differences:
    location, log_scale = _differences(scores, expected)
    # `not ... <=` also fails for nan.
    for name, difference in (("locations", location), ("log scales", log_scale)):
        if difference is not None and not difference <= TOLERANCE:
            raise ProofError(
                f"{what} does not give the rewards of its source: {name} differ by up to {difference:.2g}, and "
                f"{TOLERANCE:.0e} is allowed; nothing was written"
            )
    return location, log_scale
