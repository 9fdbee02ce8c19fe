"""A tiny random model of every supported architecture, and batches for them.

The sizes are small, but each architecture keeps its features (grouped heads, sliding windows, soft caps). Padding and
end of text are the same token, as in many chat models, so pooling has to find the last token that is *not* this one.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from disco_trl import DiscoRewardModel
from disco_trl.models.adapters import ADAPTER_SETTINGS_FILE


# Names in the state dict of a learned scale
MOMENTS = ("mean_hidden", "var_hidden", "mean_traits", "var_traits", "rows_seen")
# What calibration sets, and what is 0 without it
DIALS = ("log_level", "location_error")
SCALE_STATE = ("weight", *MOMENTS, *DIALS)
VOCAB = 64
PAD = EOS = 2

_COMMON = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 1}
_SIZES = {
    "hidden_size": 64,  # bitsandbytes quantizes in blocks of 64
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_OPT = {**_SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64}
_GEMMA = {**_GROUPED, "head_dim": 16, "sliding_window": 8}
_MODERNBERT = {**_SIZES, "cls_token_id": 1, "sep_token_id": EOS, "global_attn_every_n_layers": 2, "local_attention": 8}

# Name: (config class, class of the base model, sizes)
DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 16}),
    "mistral": ("MistralConfig", "MistralForCausalLM", _GROUPED),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GEMMA),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _GROUPED),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _SIZES),
    "opt": ("OPTConfig", "OPTForCausalLM", _OPT),
}
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForMaskedLM", _SIZES),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _SIZES),
    "deberta_v2": ("DebertaV2Config", "DebertaV2ForMaskedLM", _SIZES),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", _MODERNBERT),
    "eurobert": ("EuroBertConfig", "EuroBertForMaskedLM", _GROUPED),  # averages the logits of all tokens
}
ARCHITECTURES = {**DECODERS, **ENCODERS}


def tiny_config(architecture: str, **more: Any) -> Any:
    config_class, _, sizes = ARCHITECTURES[architecture]
    return getattr(transformers, config_class)(**_COMMON, **{**sizes, **more})


def base_model(architecture: str) -> Any:
    """A random base language model with a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, ARCHITECTURES[architecture][1])(tiny_config(architecture))


def load(path: str | Path, **kwargs: Any) -> Any:
    """Load a disco model in evaluation mode."""
    return DiscoRewardModel.from_pretrained(path, **kwargs).eval()


def load_stock(path: str | Path, **kwargs: Any) -> Any:
    """Load the model that users without disco-trl get from the same files."""
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, **kwargs).eval()


def head_of(model: Any) -> Any:
    return model.get_submodule(model.head_name)


def randomize_heads(model: Any) -> Any:
    """Give every copy of the disco head random weights, so that answers differ as if the model had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, head in model.named_reward_heads():
            for name, tensor in head.state_dict(keep_vars=True).items():
                if name.rpartition(".")[2] in DIALS:
                    continue
                std = 0.3 if "scale" in name else 0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
    return model.eval()


def batch(size: int, padding_side: str = "right") -> dict[str, Tensor]:
    """A batch of up to 4 texts of different lengths, each of which ends with an end-of-text token."""
    generator = torch.Generator().manual_seed(size)
    lengths = [9, 4, 7, 2][:size]
    input_ids = torch.full((size, max(lengths)), PAD)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        start = 0 if padding_side == "right" else max(lengths) - length
        input_ids[row, start : start + length] = torch.randint(3, VOCAB, (length,), generator=generator)
        input_ids[row, start + length - 1] = EOS
        attention_mask[row, start : start + length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def edited_copy(
    source: str,
    target: Path,
    *,
    config: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    tensors: dict[str, Tensor] | None = None,
) -> str:
    """Copy a checkpoint, update entries of config.json (`None` removes one), drop keys, and add tensors.

    `drop` holds prefixes of keys. In the directory of an adapter, the adapter's weights are edited.
    """
    shutil.copytree(source, target, dirs_exist_ok=True)
    if config is not None:
        entries = {**json.loads((target / "config.json").read_text()), **config}
        kept = {key: value for key, value in entries.items() if value is not None}
        (target / "config.json").write_text(json.dumps(kept))
    is_adapter = (target / "adapter_config.json").exists()
    weights = target / ("adapter_model.safetensors" if is_adapter else "model.safetensors")
    if drop or tensors:
        state = {key: value for key, value in load_file(weights).items() if not key.startswith(drop)}
        save_file({**state, **(tensors or {})}, weights, metadata={"format": "pt"})
    return str(target)


def lora(model: Any) -> Any:
    """A `PeftModel` around a disco model. All weights that it trains are random, as if they had been trained."""
    # New layers of an encoder are trained and saved in full. PEFT itself adds those named score and classifier.
    blocks = ("score", "classifier")
    modules_to_save = [name for name in model.newly_initialized if name.split(".")[0] not in blocks]
    config = LoraConfig(
        r=2, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=modules_to_save, init_lora_weights=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        peft_model = get_peft_model(model, config)
    randomize_heads(peft_model.get_base_model())
    return peft_model.eval()


def save_adapter(peft_model: Any, path: Path) -> str:
    """Save an adapter and its settings, as the trainer does."""
    peft_model.save_pretrained(path)
    (path / ADAPTER_SETTINGS_FILE).write_text(json.dumps(peft_model.get_base_model().config.disco))
    return str(path)
