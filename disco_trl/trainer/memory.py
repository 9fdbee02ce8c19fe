"""What a training step holds in memory, found by running it on tensors that have everything but data.

Model, adapter and optimizer are the ones that train: transformers', PEFT's and torch's own code goes through the
forward pass, the backward pass and the update under torch's `FakeTensorMode`, which computes shapes and dtypes and
allocates nothing, and :class:`LiveMemory` keeps count of what is alive. So whatever an architecture saves for its
backward pass, what activation checkpointing forgets and computes again, and the copies that autocast makes of weights
are counted and not modelled. What happens inside a kernel stays unseen. Two things stand in for code that needs real
data: a layer of bitsandbytes in 4 bits, and on CUDA the attention kernel of prefix sharing.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D
from trl.trainer.utils import disable_dropout_in_model

from ..data.forest import pack
from ..models import prefix_sharing
from ..models.adapters import save_reward_head
from ..models.loading import stock_class
from ..models.modeling import disco_class
from ..models.settings import resolve_settings


METHODS = ("full", "lora", "qlora")
DTYPES = ("mixed", "bfloat16", "float32")
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "sgd", "adafactor")
# Of bitsandbytes: weights that share a scale, and scales that share a scale of their own.
BLOCK, NESTED_BLOCK = 64, 256


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a `ValueError` unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


@dataclass(frozen=True)
class Settings:
    """
    What a training run is asked to do, on each device.

    Attributes:
        length: tokens of each side of a pair.
        prompt_share: part of a side that both sides share.
        prefix_sharing: as in `DiscoRewardConfig`; False, or a model that cannot, means padded batches.
        dtype: `"mixed"` (weights in float32, autocast to bfloat16: TRL's defaults), `"bfloat16"` (weights too, still
            under autocast) or `"float32"`.
        optim: one of :data:`OPTIMIZERS`.
        gradient_checkpointing: as in TRL, whose default it is.
        lora_r, lora_targets: rank of the adapters, and the modules that get one, as PEFT's `target_modules`.
        device: `"cuda"` or `"cpu"`. They differ in how the nodes of a shared prefix attend, and in how torch's
            unfused optimizers go through the weights.
    """

    length: int = 1024
    prompt_share: float = 0.0
    prefix_sharing: bool = True
    dtype: str = "mixed"
    optim: str = OPTIMIZERS[0]
    gradient_checkpointing: bool = True
    lora_r: int = 16
    lora_targets: str | tuple[str, ...] = "all-linear"
    device: str = "cuda"

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("optim", self.optim, OPTIMIZERS)

    @property
    def weight_dtype(self) -> torch.dtype:
        """That in which the weights are kept."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of the storages of some tensors, each storage once."""
    return sum({storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}.values())


class LiveMemory(TorchDispatchMode):
    """
    Keeps count of the tensors that come to be while it is open, for as long as their storages live.

    Args:
        outside: tensors that were there before and do not count.
    """

    def __init__(self, outside: Iterable[Tensor] = ()):
        super().__init__()
        self._outside = list(outside)
        self._alive: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in self._outside}
        self._sizes: list[int] = []  # of each storage that there ever was
        self._gradients: set[int] = set()
        self._changes: list[tuple[int, int]] = []  # what came and went, in order: number of the storage, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returns."""
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor):
                self._notice(tensor)
        return output

    def _notice(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size, number = storage._cdata, storage.nbytes(), len(self._sizes)
        if key in self._alive:
            return

        def forget(_: Any) -> None:
            del self._alive[key]
            self._changes.append((number, -size))

        self._alive[key] = number, weakref.ref(storage, forget)
        self._sizes.append(size)
        self._changes.append((number, size))

    def count_as_gradient(self, gradient: Tensor) -> None:
        """This is the gradient of a weight, and was from its beginning."""
        self._gradients.add(self._alive[gradient.untyped_storage()._cdata][0])

    def peak(self, with_gradients: bool = True) -> int:
        """The most bytes at one time; of all, or of what is not the gradient of a weight."""
        without = set() if with_gradients else self._gradients
        changes = (change for number, change in self._changes if number not in without)
        return max(itertools.accumulate(changes, initial=0))


# What stands in for code that needs data


class FourBitLinear(nn.Linear):
    """
    A linear layer whose weight takes the bytes of bitsandbytes' nf4 with double quantization, and which makes the
    tensors that `bitsandbytes.nn.Linear4bit`, and PEFT's adapter around it, make.

    Args:
        layer: the layer to stand for, an `nn.Linear` or GPT-2's `Conv1D`.
        compute_dtype: that of the products (`bnb_4bit_compute_dtype`).
    """

    absmax: Tensor

    def __init__(self, layer: Any, compute_dtype: torch.dtype):
        nn.Module.__init__(self)
        shape = layer.weight.shape
        self.out_features, self.in_features = shape if isinstance(layer, nn.Linear) else shape[::-1]
        self.compute_dtype, self.stored_dtype = compute_dtype, layer.weight.dtype
        count = shape.numel()
        blocks = -(-count // BLOCK)
        with torch.device(layer.weight.device):
            self.weight = nn.Parameter(torch.empty(-(-count // 2), 1, dtype=torch.uint8), requires_grad=False)
            self.bias = layer.bias
            self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8))
            self.register_buffer("nested_absmax", torch.empty(-(-blocks // NESTED_BLOCK)))
            self.register_buffer("offset", torch.empty(()))
            self.register_buffer("code", torch.empty(16))

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        output = _FourBitProduct.apply(input.to(self.compute_dtype), self)
        if self.bias is not None:
            output = output + self.bias.to(self.compute_dtype)
        # PEFT copies what comes out of a layer in 4 bits, lest it be a view.
        return output.to(input.dtype).clone()


class _FourBitProduct(torch.autograd.Function):
    """The weight is unpacked for each product and not kept; for the backward pass nothing else is saved."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: FourBitLinear) -> Tensor:
        ctx.layer = layer
        scales = input.new_empty(len(layer.absmax), dtype=torch.float32)
        weight = input.new_empty(layer.out_features, layer.in_features)
        del scales
        return F.linear(input, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        layer = ctx.layer
        weight = gradient.new_empty(layer.out_features, layer.in_features, dtype=layer.stored_dtype)
        return gradient @ weight.to(gradient.dtype), None


class _VarlenAttention(torch.autograd.Function):
    """Torch's flash attention for sequences of various lengths: it saves what it was given, its output, and a float32
    number for each query and head. `[T, heads, D]` each; keys and values may have fewer heads."""

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


def _has_varlen_kernel(query: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    return query.dtype == torch.bfloat16 and kwargs.get("softcap") is None and kwargs.get("s_aux") is None


def _varlen_attn() -> Any:
    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _VarlenAttention.apply(query, key, value)

    return attend


@contextlib.contextmanager
def _attention_of(device: str) -> Iterator[None]:
    """On tensors without data, which are the CPU's, attend along shared prefixes as that device does."""
    replaced = {"_has_varlen_kernel": _has_varlen_kernel, "_varlen_attn": _varlen_attn, "FLOAT32_KEYS": 0}
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
    The reward model that training would begin with, on the meta device.

    Args:
        config: of the language model or reward model. It is not changed.
        path: where it comes from, for messages.
        method: `"full"`, `"lora"` or `"qlora"`.

    Returns:
        The model, a `PeftModel` unless it is trained in full; and why it cannot share prefixes, `None` if it can.

    Raises:
        ValueError: the architecture cannot be a reward model.
    """
    config = copy.deepcopy(config)
    stock = stock_class(config, path, False, {})
    config.num_labels = 1
    config.disco = resolve_settings(getattr(config, "disco", None))
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model: Any = disco_class(stock, config)(config)
        refusal = prefix_sharing.prepare(model) if settings.prefix_sharing else "it is off"
        kept = model._keep_in_fp32_modules_strict or ()
        for name, parameter in model.named_parameters():
            if not any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in kept):
                parameter.data = parameter.data.to(settings.weight_dtype)
        # In a base model these are fresh, and quantization and adapters leave them whole.
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
            save_reward_head(peft_config, model.head_name, model.newly_initialized)
            model = get_peft_model(model, peft_config, low_cpu_mem_usage=True)
            if method == "qlora":
                heads = {head for _, head in model.get_base_model().named_reward_heads()}
                whole = {id(parameter) for head in heads for parameter in head.parameters()}
                for parameter in model.parameters():  # TRL casts what it trains; the trainer puts the head back
                    if parameter.requires_grad and id(parameter) not in whole:
                        parameter.data = parameter.data.to(torch.bfloat16)
    disable_dropout_in_model(model)
    return model, refusal


def _take_off_meta(model: nn.Module) -> None:
    """Give a model of the meta device tensors of the CPU; under `FakeTensorMode`, they have no data either."""
    made: dict[int, Tensor] = {}  # weights that are tied stay so

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


# Steps


@dataclass(frozen=True)
class StepMemory:
    """
    Bytes that come to be in a forward and backward pass, beyond weights and optimizer states.

    Attributes:
        activations: the most at one time of all that is no gradient of a weight.
        gradients: of the weights, when all are there.
        peak: the most of both at one time.
    """

    activations: int
    gradients: int
    peak: int


class DatalessTrainer:
    """
    A model, and what training it takes, on tensors without data.

    Args:
        config, path, method, settings: as for :func:`build`.

    Attributes:
        model: with weights under `FakeTensorMode`.
        refusal: why batches are padded, `None` if prefixes are shared.
        parameters, trained: how many, a weight in 4 bits counted as the weights it stands for.

    Raises:
        ValueError: as :func:`build`, or a step depends on the values of tensors.
    """

    def __init__(self, config: Any, path: str, method: str, settings: Settings):
        self.settings = settings
        self.model, self.refusal = build(config, path, method, settings)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            _take_off_meta(self.model)
        self.model.train()
        if settings.gradient_checkpointing:
            # (There is no random state to restore where there is no dropout and no data.)
            how = {"use_reentrant": False, "preserve_rng_state": False}
            inner = self.model.get_base_model() if is_peft_model(self.model) else self.model
            enable = getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)
            enable(how)
            if is_peft_model(self.model):
                with self._mode:
                    self.model.enable_input_require_grads()
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        packed = {id(m.weight): m for m in self.model.modules() if isinstance(m, FourBitLinear)}
        self.parameters = sum(
            packed[id(p)].in_features * packed[id(p)].out_features if id(p) in packed else p.numel()
            for p in self.model.parameters()
        )
        self.trained = sum(parameter.numel() for parameter in self._trained)
        self._live: LiveMemory | None = None
        for parameter in self._trained:
            parameter.register_post_accumulate_grad_hook(self._note_gradient)

    def _note_gradient(self, parameter: Tensor) -> None:
        if self._live is not None and parameter.grad is not None:
            self._live.count_as_gradient(parameter.grad)

    def _held(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    @property
    def weight_bytes(self) -> int:
        """Of weights and buffers."""
        return bytes_of(self._held())

    @property
    def float32_weight_bytes(self) -> int:
        """The same with float32 in the place of bfloat16."""
        half = [tensor for tensor in self._held() if tensor.dtype == torch.bfloat16]
        return self.weight_bytes + bytes_of(half)

    @property
    def is_full(self) -> bool:
        """Whether all weights are trained."""
        return not is_peft_model(self.model)

    def unit_bytes(self) -> tuple[int, int]:
        """Of the weights that ZeRO-3 and FSDP gather at a time: all outside of the layers, and the largest layer's."""
        names = {*(getattr(self.model, "_no_split_modules", None) or ())}
        layers = [module for module in self.model.modules() if type(module).__name__ in names]
        inside = [*itertools.chain.from_iterable(layer.parameters() for layer in layers)]
        within = {id(parameter) for parameter in inside}
        root = bytes_of(parameter for parameter in self.model.parameters() if id(parameter) not in within)
        return root, max((bytes_of(layer.parameters()) for layer in layers), default=0)

    def step(self, batch_size: int) -> StepMemory:
        """Run a batch of so many pairs forward and backward."""
        for parameter in self._trained:
            parameter.grad = None
        batch = self._batch(batch_size)
        self._live = live = LiveMemory(self._held())
        try:
            with self._mode, live, _attention_of(self.settings.device):
                with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.dtype != "float32"):
                    output = self.model(**batch)
                # The likelihood of a few numbers holds nothing to speak of.
                loss = output.logits.sum() + output.scale.sum()
                del output
                loss.backward()
        except DataDependentOutputException as error:
            name = type(self.model).__name__
            raise ValueError(
                f"a step of this {name} depends on the values of tensors ({error}): not estimated"
            ) from error
        finally:
            self._live = None
        gradients = bytes_of(p.grad for p in self._trained if p.grad is not None)
        return StepMemory(live.peak(with_gradients=False), gradients, live.peak())

    def _batch(self, batch_size: int) -> dict[str, Any]:
        """As the trainer's collator makes one of pairs of full length, no two of which have anything in common."""
        length = self.settings.length
        if self.refusal is not None:
            ids = torch.zeros(2 * batch_size, length, dtype=torch.long)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        prompt = min(round(self.settings.prompt_share * length), length - 1)
        sequences = [
            [pair] * prompt + [2 * pair + side] * (length - prompt) for side in (0, 1) for pair in range(batch_size)
        ]
        return pack(sequences, None)

    def optimizer_bytes(self, dtype: torch.dtype | None = None) -> tuple[int, int]:
        """
        Of the optimizer's states, and of what it holds for the time of an update.

        Args:
            dtype: of the weights as the optimizer sees them; None for their own.

        Raises:
            ImportError: the optimizer is bitsandbytes', and that is not installed.
        """
        args = TrainingArguments("unused", optim=self.settings.optim, use_cpu=True, report_to="none")
        optimizer_class, kwargs = _optimizer_class(args)
        if self.settings.device == "cuda" and self.settings.optim in ("adamw_torch", "sgd"):
            kwargs["foreach"] = True  # what torch does there by itself
        with self._mode:
            weights = [
                nn.Parameter(torch.empty(p.shape, dtype=p.dtype if dtype is None else dtype)) for p in self._trained
            ]
            for weight in weights:
                weight.grad = torch.empty_like(weight)
        # Outside, as bitsandbytes sorts numbers for its tables
        optimizer = optimizer_class(weights, **kwargs)
        with self._mode:
            if "8bit" in self.settings.optim:
                self._start_bitsandbytes(optimizer, weights)
            else:
                optimizer.step()
            states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
            live = LiveMemory([*weights, *(weight.grad for weight in weights if weight.grad is not None), *states])
            if "8bit" not in self.settings.optim:  # those are updated in place, by kernels that need data
                with live:
                    optimizer.step()
        return bytes_of(states), live.peak()

    def _start_bitsandbytes(self, optimizer: Any, weights: list[nn.Parameter]) -> None:
        """Have it make the states of each weight, in 32 bits for embeddings, as transformers sees to."""
        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        optimizer.is_paged = False  # where the pages are makes no difference to their number
        for index, (weight, own) in enumerate(zip(weights, self._trained, strict=True)):
            optimizer.args.optim_bits = 32 if id(own) in embeddings else 8
            optimizer.init_state(optimizer.param_groups[0], weight, 0, index)


def _optimizer_class(args: TrainingArguments) -> tuple[Any, dict[str, Any]]:
    try:
        return Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise ImportError(f"{args.optim} needs bitsandbytes: pip install 'disco-trl[quantization]'") from error
