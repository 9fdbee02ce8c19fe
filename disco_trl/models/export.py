"""Export: a reward model of any kind as files that other tools load as they are.

- `to="scalar"` writes the stock class with one label, the location. Any tool that loads a scalar reward model, however
  strict, loads it.
- `to="two-logit"` writes the stock class with two labels, the location and the raw scale, for engines (vLLM, SGLang,
  ONNX Runtime) whose clients compute the scale with [`~disco_trl.models.plain_logits.from_two_logits`].
- `to="attributes"` writes the stock class with two labels for each attribute, of a model that knows several; clients
  compute their joint distribution with [`~disco_trl.models.plain_logits.from_attribute_logits`].
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

**Two logits.** The constants by which a scale is computed are in `config.json` under `reward_distribution`. Without
disco-trl, location and scale in the units of training are

```python
constants = config["reward_distribution"]
raw = (logits[1] - constants["raw_scale_offset"]) / constants["max_log_scale"]
location, scale = logits[0], constants["unit_scale"] * exp(constants["max_log_scale"] * tanh(raw))
```

Both logits read the pooled last hidden state. A scale that reads a middle layer (`scale_layer`) cannot be exported in
this form. One that is the same for all answers can: its logit is 0 everywhere, and the formula gives the constant.

**Attributes.** The logits are the location and the raw scale of each attribute in turn. `id2label` names them, and
each entry of `constants["attributes"]` holds the name, the default weight and the formula of one. With
`constants["correlation"]` they give the joint distribution, and so the distribution of every weighted sum. The overall
reward of a model that was trained on overall judgements (`constants["has_rest"]`) is more than such a sum, and is not
included; `to="scalar"` and `to="two-logit"` write it.

A learned location error (`score.likelihood`) is not included. Probabilities from such a model use σ alone, and
are overconfident by that much.

The logits are needed without an activation. `problem_type` is `"regression"`, so that the pipelines of Transformers
and `classify` in vLLM apply neither softmax nor sigmoid (for any other endpoint of vLLM pass `use_activation=False`);
with SGLang use `/classify`, because `/v1/classify` applies a softmax. Texts have to be tokenized as in training, with
the end-of-text token. The classes and pipelines of Transformers are tested. What is said of vLLM and SGLang follows
their documentation, and neither was run.

**Verification.** The written files are loaded again in the usual way and compared with the source on sample texts,
before they get their name (see `disco_trl.models.export_proof`). What bfloat16 or float16 costs in use depends on the
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

from ..data.columns import OVERALL
from ..data.files import locked, written_at_once
from ..distributions.reward_distribution import get_family
from .export_proof import (
    SAMPLE_TEXTS,
    TOLERANCE,
    Differences,
    ProofError,
    compare,
    differences,
    sample_rewards,
    sample_sequences,
)
from .heads import DiscoHead
from .inference import load_trained
from .modeling import DiscoRewardModel
from .outputs import OWN_OUTPUTS
from .plain_logits import ENTRY, attribute_entry, two_logit_entry
from .reward_head import RewardHead
from .reward_view import RewardView
from .scale_head import ScaleHead


TARGETS = ("scalar", "two-logit", "attributes", "disco")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        constant_scales (`dict[str, float]`):
            For each attribute, or `"overall"`, the scale of all answers in reward units, where it is the same for all.
            Empty for a scalar model.
    """

    architecture: str
    dtype: str
    location_difference: float
    log_scale_difference: float | None
    location_rounding: float
    log_scale_rounding: float | None
    constant_scales: dict[str, float]

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
        for name, scale in self.constant_scales.items():
            of_attribute = "" if name == OVERALL else f" of {name!r}"
            lines.append(
                f"  the scale{of_attribute} is {scale:.6g} for all answers, and says nothing about a single one"
            )
        return "\n".join(lines)


def export(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    to: str,
    dtype: str = "float32",
    overwrite: bool = False,
    attribute: str | None = None,
    weights: Mapping[str, float] | None = None,
) -> ExportReport:
    """
    Write a reward model, its tokenizer and its chat template as files that other tools load.

    Args:
        model (`str` or `os.PathLike`):
            Directory or Hub id of a disco checkpoint, a scalar reward model or a PEFT adapter.
        output (`str` or `os.PathLike`):
            Directory to write. It appears only after verification has succeeded.
        to (`str`):
            `"scalar"`, `"two-logit"`, `"attributes"` or `"disco"`; see the documentation of this module.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype of the weights: `"float32"`, `"bfloat16"` or `"float16"`. The head of a disco checkpoint stays in
            float32.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a model in `output`.
        attribute (`str`, *optional*):
            Attribute whose reward is written, of a model that knows several. By default the overall reward, and with
            `to="disco"` all of them. With `to="attributes"` it cannot be given.
        weights (`Mapping[str, float]`, *optional*):
            Weights of attributes, of whose rewards the weighted sum is written, with `to="scalar"`.

    Returns:
        [`ExportReport`]: What was written, and how close it is to its source.

    Raises:
        `ValueError`: If the model cannot be exported to that form, with the reason, or if `output` is in use.
        [`~disco_trl.models.export_proof.ProofError`]: If the loaded files do not give the rewards of the source.
            Nothing is left in `output`.
    """
    if to not in TARGETS:
        raise ValueError(f"to={to!r} is unknown; choose one of {', '.join(map(repr, TARGETS))}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(map(repr, DTYPES))}")
    model, output = os.fspath(model), Path(output)
    _check_output(model, output, overwrite)

    if to == "attributes" and not attribute is weights is None:
        raise ValueError(f"to={to!r} writes all attributes; leave out attribute and weights, or choose another form")
    if weights is not None and to != "scalar":
        raise ValueError(
            f"to={to!r}: the scale of a weighted sum of attributes is no function that a head of its own computes; "
            "use 'scalar', or 'attributes' or 'disco' without weights, which hold all attributes"
        )
    tokenizer, source = _load(model, to, RewardView(attribute, weights))
    inner = source.get_base_model() if is_peft_model(source) else source
    scales = {name: head.scale for name, head in _heads_with_scale(inner, to).items()}
    constants = {name: scale.level for name, scale in scales.items() if scale.is_constant}
    sequences = sample_sequences(tokenizer, source)
    expected = sample_rewards(source, sequences, to)
    merging = Differences(0.0, None)
    if is_peft_model(source):
        _check_output(source.get_base_model().config._name_or_path, output, overwrite)
        source = source.merge_and_unload(safe_merge=True)
        merging = compare("the merged model", sample_rewards(source, sequences, to), expected)
    _round_weights(source, DTYPES[dtype], with_head=to != "disco")
    rounded = sample_rewards(source, sequences, to)
    with locked(output.resolve()), written_at_once(output.resolve(), folder=True) as folder:
        _write(source, folder, to, DTYPES[dtype])
        tokenizer.save_pretrained(folder)
        del source  # its memory is needed for what comes now
        written = _reload(folder, to, DTYPES[dtype])
        in_dtype = sample_rewards(written, sequences, to)
        rounding = differences(in_dtype, expected, relative=False)
        if not math.isfinite(rounding.location):
            raise ProofError(f"in {dtype} its rewards are not finite: the language model overflows; use bfloat16")
        in_float32 = in_dtype if dtype == "float32" else sample_rewards(written.float(), sequences, to)
        found = compare("the reloaded model", in_float32, rounded)
    return ExportReport(
        architecture=type(written).__name__,
        dtype=dtype,
        location_difference=max(found.location, merging.location),
        log_scale_difference=None if found.log_scale is None else max(found.log_scale, merging.log_scale or 0.0),
        location_rounding=rounding.location,
        log_scale_rounding=rounding.log_scale,
        constant_scales=constants,
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


def _load(path: str, to: str, view: RewardView) -> tuple[PreTrainedTokenizerBase, Any]:
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

    if to == "attributes" and not inner.attributes:
        raise ValueError(
            f"{path}: it knows no attributes, because nobody rated or compared any in its training data; use "
            "--to two-logit for its overall reward"
        )
    # A sum of normal rewards has a scale that is the root of a quadratic form of theirs.
    is_sum = inner.is_weighted_sum and view.attribute in (None, OVERALL) and view.weights is None
    if is_sum and (to == "two-logit" or (to == "disco" and view.attribute == OVERALL)):
        raise ValueError(
            f"{path}: its overall reward is a weighted sum of attributes, whose scale no head of its own computes; "
            f"name one of them ({', '.join(map(repr, inner.attributes))}), or use --to attributes, which holds all, "
            "or --to scalar"
        )
    if view.weights is not None:
        inner.keep_sum(view.weights)
    elif view.attribute is not None or to in ("scalar", "two-logit"):
        inner.keep_only(view.attribute or OVERALL)
    for name, head in _heads_with_scale(inner, to).items():
        _check_scale(path, head.scale, "its scale" if name == OVERALL else f"the scale of {name!r}", to)
    if to in ("two-logit", "attributes") and get_family(inner.config.disco["reward_family"]).shape_names:
        raise ValueError(
            f"{path}: a {inner.config.disco['reward_family']!r} reward has shape parameters beside location and "
            "scale, which the logits cannot hold; use --to scalar or --to disco"
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


def _heads_with_scale(model: Any, to: str) -> dict[str, RewardHead]:
    """The heads whose scale is written, by the names of their attributes."""
    heads: dict[str, RewardHead] = model.reward_head.by_attribute()
    if to in ("scalar", "two-logit"):
        return {OVERALL: heads[OVERALL]} if to == "two-logit" else {}
    if to == "attributes" or model.is_weighted_sum:
        del heads[OVERALL]
    return heads


def _check_scale(path: str, scale: ScaleHead, what: str, to: str) -> None:
    """Raise a `ValueError` if a scale cannot be written in that form."""
    if to != "disco" and scale.fixed_scale is not None:
        raise ValueError(
            f"{path}: {what} is fixed at {scale.fixed_scale:g} and no function of the hidden state, so a logit for it "
            "would say nothing; use --to scalar"
        )
    if to != "disco" and scale.layer is not None and not scale.is_constant:
        raise ValueError(
            f"{path}: {what} reads the mean hidden state of layer {scale.layer} (scale_layer), and the logit of a "
            "scale reads what that of its location does, the last hidden state; use --to scalar or --to disco"
        )
    # A scale that training has left or made constant is an honest result. One that no training has seen is none, and a
    # file that promises a scale would mislead.
    if scale.fixed_scale is None and scale.is_constant and not scale.rows_seen:
        raise ValueError(
            f"{path}: {what} is the same for all answers, because its weight is zero and no answers have trained it; "
            "use --to scalar"
        )


def _load_tokenizer(path: str, inner: Any) -> PreTrainedTokenizerBase:
    places = dict.fromkeys((path, inner.config._name_or_path))  # an adapter's directory may have none
    reasons = []
    for place in places:
        try:
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reasons.append(f"{place}: {error}")
    raise ValueError("the model has no tokenizer, without which it is of no use; save it there. " + " ".join(reasons))


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
    if to in ("two-logit", "attributes"):
        setattr(config, ENTRY, two_logit_entry(source) if to == "two-logit" else attribute_entry(source))
        heads = _heads_with_scale(source, to)
        labels = [
            label if to == "two-logit" else f"{label}_{name}" for name in heads for label in ("location", "raw_scale")
        ]
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        rows: list[Tensor] = [row for one in heads.values() for row in (one.weight, one.scale.weight)]
        state[f"{head_prefix}weight"] = torch.cat(rows)
        if head.bias is not None:
            # The bias is the overall reward's alone.
            bias = torch.zeros(len(rows), dtype=head.bias.dtype, device=head.bias.device)
            state[f"{head_prefix}bias"] = torch.cat([head.bias, bias[1:]]) if to == "two-logit" else bias
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


def _reload(folder: Path, to: str, dtype: torch.dtype) -> Any:
    if to == "disco":
        return DiscoRewardModel.from_pretrained(folder, dtype=dtype).eval()
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if faults := {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}:
        raise ProofError(f"the stock class does not take the files as they are: {faults}")
    return model.eval()
