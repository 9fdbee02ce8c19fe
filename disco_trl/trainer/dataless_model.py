"""
The model whose memory `disco-trl estimate` estimates, on tensors without data.

Model and adapter are the real ones: transformers builds the model on the meta device and PEFT puts its adapters into
it, as they do for training. Two stand-ins replace code that reads the values of tensors, which here do not exist:
[`FourBitLinear`] for a 4-bit layer of bitsandbytes, and [`attention_of`] for the attention kernel that prefix sharing
uses on CUDA. `disco_trl.trainer.dataless_step` runs training steps of the model.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D
from trl.trainer.utils import disable_dropout_in_model

from ..models import prefix_sharing
from ..models.adapters import save_reward_head
from ..models.loading import stock_class
from ..models.modeling import disco_class
from ..models.settings import resolve_settings
from ..models.varlen_attention import VarlenKernel


METHODS = ("full", "lora", "qlora")
DTYPES = ("mixed", "bfloat16", "float32")
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "sgd", "adafactor")
# bitsandbytes' block sizes for nf4 with double quantization: `BLOCK` weights share a scale, and `NESTED_BLOCK` of
# these scales, themselves quantized to 8 bits, share a float32 scale.
BLOCK, NESTED_BLOCK = 64, 256


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """
    Check an option that takes one of several values.

    Args:
        name (`str`):
            Name of the option, for the message.
        value (`str`):
            Value that was given.
        choices (`Sequence[str]`):
            Values that there are.

    Raises:
        `ValueError`: If the value is none of the choices.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


@dataclass(frozen=True)
class Settings:
    """
    Settings of a training run that its memory depends on, on each device.

    Args:
        length (`int`, *optional*, defaults to `1024`):
            Number of tokens on each side of a pair.
        prompt_share (`float`, *optional*, defaults to `0.0`):
            Share of a side's tokens that both sides begin with, from 0 to 1.
        prefix_sharing (`bool`, *optional*, defaults to `True`):
            Whether shared prefixes are computed once, as in [`DiscoRewardConfig`]. Batches are padded if this is
            `False` or the architecture does not support it.
        dtype (`str`, *optional*, defaults to `"mixed"`):
            `"mixed"` keeps the weights in float32 and computes in bfloat16 under autocast, which is TRL's default.
            `"bfloat16"` keeps the weights in bfloat16 as well, still under autocast. `"float32"` uses float32
            throughout.
        optim (`str`, *optional*, defaults to `"adamw_torch_fused"`):
            Optimizer, one of `OPTIMIZERS`, named as in [`~transformers.TrainingArguments`].
        activation_checkpointing (`bool`, *optional*, defaults to `True`):
            Whether activations are discarded in the forward pass and recomputed in the backward pass. TRL's default.
        lora_r (`int`, *optional*, defaults to `16`):
            Rank of the adapters.
        lora_targets (`str` or `tuple[str, ...]`, *optional*, defaults to `"all-linear"`):
            Modules that get an adapter, as in PEFT's `target_modules`.
        device (`str`, *optional*, defaults to `"cuda"`):
            `"cuda"` or `"cpu"`. The two differ in the attention of shared prefixes, and in the temporary memory of
            torch's unfused optimizers.
    """

    length: int = 1024
    prompt_share: float = 0.0
    prefix_sharing: bool = True
    dtype: str = "mixed"
    optim: str = OPTIMIZERS[0]
    activation_checkpointing: bool = True
    lora_r: int = 16
    lora_targets: str | tuple[str, ...] = "all-linear"
    device: str = "cuda"

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("optim", self.optim, OPTIMIZERS)

    @property
    def weight_dtype(self) -> torch.dtype:
        """`torch.dtype`: Data type in which the weights are stored."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


# Stand-ins for code that reads the values of tensors


class FourBitLinear(nn.Linear):
    """
    Linear layer that takes the memory of bitsandbytes' `Linear4bit` (nf4, double quantization).

    Its weight and scales have the sizes of the quantized ones, and its forward and backward passes create the tensors
    that `bitsandbytes.nn.Linear4bit`, and PEFT's adapter around it, create. bitsandbytes itself cannot be used, as its
    kernels read the weights.

    Args:
        layer (`nn.Linear` or [`~transformers.pytorch_utils.Conv1D`]):
            Layer to stand in for. GPT-2 has `Conv1D` layers, whose weight is transposed.
        compute_dtype (`torch.dtype`):
            Data type of the matrix products (`bnb_4bit_compute_dtype`).
    """

    absmax: Tensor

    def __init__(self, layer: Any, compute_dtype: torch.dtype):
        # Not `nn.Linear.__init__`, which would make a weight of the unquantized size.
        nn.Module.__init__(self)
        shape = layer.weight.shape
        self.out_features, self.in_features = shape if isinstance(layer, nn.Linear) else shape[::-1]
        self.compute_dtype, self.stored_dtype = compute_dtype, layer.weight.dtype
        count = shape.numel()
        blocks = -(-count // BLOCK)
        with torch.device(layer.weight.device):
            # Two weights in a byte, as bitsandbytes packs them
            self.weight = nn.Parameter(torch.empty(-(-count // 2), 1, dtype=torch.uint8), requires_grad=False)
            self.bias = layer.bias
            self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8))
            self.register_buffer("nested_absmax", torch.empty(-(-blocks // NESTED_BLOCK)))
            self.register_buffer("offset", torch.empty(()))
            self.register_buffer("code", torch.empty(16))

    def forward(self, input: Tensor) -> Tensor:
        """
        Create the tensors of a forward pass.

        Args:
            input (`torch.Tensor` of shape `(..., in_features)`):
                Hidden states.

        Returns:
            `torch.Tensor` of shape `(..., out_features)`: Output in the data type of `input`.
        """
        output = _FourBitProduct.apply(input.to(self.compute_dtype), self)
        if self.bias is not None:
            output = output + self.bias.to(self.compute_dtype)
        # PEFT's LoRA layer clones the output of a 4-bit layer, because autograd may fail on a view of it.
        return output.to(input.dtype).clone()


class _FourBitProduct(torch.autograd.Function):
    """
    Matrix product with a 4-bit weight.

    The weight is dequantized in each pass and released again. Only the packed weight, which exists anyway, is kept for
    the backward pass: the input is not needed, as the weight has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: FourBitLinear) -> Tensor:
        ctx.layer = layer
        # Dequantizing starts with the scales, which take 4 bytes for each block of weights.
        scales = input.new_empty(len(layer.absmax), dtype=torch.float32)
        weight = input.new_empty(layer.out_features, layer.in_features)
        del scales
        return F.linear(input, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        layer = ctx.layer
        # bitsandbytes dequantizes to the data type that the weight had before quantization, and casts the result.
        weight = gradient.new_empty(layer.out_features, layer.in_features, dtype=layer.stored_dtype)
        return gradient @ weight.to(gradient.dtype), None


class _VarlenAttention(torch.autograd.Function):
    """
    Memory of torch's flash attention for sequences of various lengths.

    Queries, keys and values have shape `(T, heads, D)`, each with its own T; keys and values may have fewer heads. The
    kernel saves its inputs, its output and the log-sum-exp of each query and head, in float32. It never creates the
    matrix of attention weights.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        log_sum = query.new_empty(query.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _is_for_kernel(query: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    return query.dtype == torch.bfloat16 and options.get("softcap") is None and options.get("s_aux") is None


def _varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool
) -> Tensor:
    """torch's function as it is since 2.12, whatever is installed here."""
    return _VarlenAttention.apply(query, key, value)


@contextlib.contextmanager
def attention_of(device: str) -> Iterator[None]:
    """
    Context in which shared prefixes attend as they do on a kind of device.

    Tensors without data are CPU tensors, whatever the device of the training run, and prefix sharing would choose the
    CPU's attention for them. The context replaces the functions that choose.

    Args:
        device (`str`):
            `"cuda"` or `"cpu"`.
    """
    # On a CPU, short bfloat16 attention is computed in float32 (`FLOAT32_KEYS`); on CUDA it never is.
    replaced = {
        "is_for_kernel": _is_for_kernel,
        "lacking": lambda window: None,
        "installed_kernel": lambda: VarlenKernel(_varlen_attn),
        "FLOAT32_KEYS": 0,
    }
    own = {name: getattr(prefix_sharing, name) for name in replaced}
    try:
        for name, value in (replaced if device == "cuda" else own).items():
            setattr(prefix_sharing, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(prefix_sharing, name, value)


# The model


def build(config: Any, path: str, method: str, settings: Settings) -> tuple[Any, str | None]:
    """
    Build the reward model that a training run starts from, on the meta device.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of a language model or reward model. It is not modified.
        path (`str`):
            Where the configuration comes from, for error messages.
        method (`str`):
            `"full"`, `"lora"` or `"qlora"`.
        settings ([`Settings`]):
            Settings of the training run.

    Returns:
        `tuple[Any, str | None]`: The model, which is a [`~peft.PeftModel`] unless `method` is `"full"`, and the reason
        why it cannot share prefixes, `None` if it can.

    Raises:
        `ValueError`: If the architecture cannot be made a reward model, or is an encoder-decoder.
    """
    if config.is_encoder_decoder:
        # Its classifier picks positions by the ids, and tensors without data have none.
        raise ValueError(f"{path}: {config.model_type!r} is an encoder-decoder, whose training cannot be estimated")
    config = copy.deepcopy(config)
    stock = stock_class(config, path, False, {})
    config.num_labels = 1
    config.disco = resolve_settings(getattr(config, "disco", None))
    # An estimate leaves the random state of the process as it was.
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model: Any = disco_class(stock, config)(config)
        refusal = prefix_sharing.prepare(model) if settings.prefix_sharing else "it is off"
        # The reward head stays in float32, and so do the layers for which transformers requires it.
        kept = model._keep_in_fp32_modules_strict or ()
        for name, parameter in model.named_parameters():
            if not any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in kept):
                parameter.data = parameter.data.to(settings.weight_dtype)
        # The modules that a base model's checkpoint lacks: they are trained whole and not quantized. `from_pretrained`
        # finds them by the keys of the weights, which are not read here.
        fresh = re.compile(rf"({'|'.join(model.unquantized_modules)})(\..*)?")
        model.newly_initialized = tuple(
            name
            for name, module in model.named_modules()
            if fresh.fullmatch(name) and any(True for _ in module.parameters(recurse=False))
        )
        if method == "qlora":
            linear = [
                (name, module)
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear | Conv1D) and not fresh.fullmatch(name)
            ]
            for name, module in linear:
                model.set_submodule(name, FourBitLinear(module, settings.weight_dtype))
        if method != "full":
            targets = settings.lora_targets
            peft_config = LoraConfig(
                r=settings.lora_r, target_modules=targets if isinstance(targets, str) else [*targets]
            )
            save_reward_head(peft_config, model)
            # `low_cpu_mem_usage` has PEFT create the adapters on the meta device as well.
            model = get_peft_model(model, peft_config, low_cpu_mem_usage=True)
            if method == "qlora":
                # TRL casts every trained parameter of a 4-bit model to bfloat16, and the trainer then restores the
                # head, so that only the adapters are in bfloat16.
                heads = {head for _, head in model.get_base_model().named_reward_heads()}
                whole = {id(parameter) for head in heads for parameter in head.parameters()}
                for parameter in model.parameters():
                    if parameter.requires_grad and id(parameter) not in whole:
                        parameter.data = parameter.data.to(torch.bfloat16)
    # TRL's default (`disable_dropout`). Dropout would also save a mask for each of its layers.
    disable_dropout_in_model(model)
    return model, refusal


def take_off_meta(model: nn.Module) -> None:
    """
    Replace a model's tensors on the meta device by tensors of the CPU, in place.

    Call it under `FakeTensorMode`, so that the new tensors have no data either. A step cannot run on the meta device
    itself, which autocast does not support. `nn.Module.to_empty` is no alternative: it separates tied weights, which
    would then count twice.

    Args:
        model (`nn.Module`):
            Model on the meta device.
    """
    made: dict[int, Tensor] = {}

    def off_meta(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype)
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = off_meta(tensor)  # type: ignore[assignment]
