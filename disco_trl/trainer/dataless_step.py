"""
Memory of a training step, found by running the step on tensors without data.

transformers, PEFT and torch run their own code for the forward pass, the backward pass and the update. They run it
under torch's `FakeTensorMode`, which computes shapes and data types and allocates nothing, and [`LiveMemory`] records
which tensors are alive. So the count includes, with no formula for it, what an architecture saves for its backward
pass, what activation checkpointing discards and recomputes, and the copies of weights that autocast makes. It does not
include what a kernel allocates internally.

What flows: config → [`~disco_trl.trainer.dataless_model.build`] → [`DatalessTrainer`] → a forward and backward pass →
[`StepMemory`], and an update → bytes of the optimizer. `disco_trl.trainer.estimate` adds them up.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from ..data.forest import pack
from .dataless_model import FourBitLinear, Settings, attention_of, build, take_off_meta


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """
    Number of bytes that tensors occupy.

    Each storage counts once and in full: tied weights share a storage, and a view keeps all of its storage alive.

    Args:
        tensors (`Iterable[torch.Tensor]`):
            Tensors of any shapes and data types.

    Returns:
        `int`: Bytes of their storages.
    """
    # `_cdata` is the address of a storage, and the only identity that two tensors of one storage have in common.
    return sum({storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}.values())


class LiveMemory(TorchDispatchMode):
    """
    Context that records the memory of all tensors that are created in it.

    It intercepts every operation, those of the backward pass included, and records when a storage first appears in an
    output and when it is freed.

    Args:
        outside (`Iterable[torch.Tensor]`, *optional*, defaults to `()`):
            Tensors that exist before and do not count. An operation may return them or views of them.
    """

    def __init__(self, outside: Iterable[Tensor] = ()):
        super().__init__()
        # Held, so that no new storage gets the address of one of theirs.
        self._outside = list(outside)
        self._alive: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in self._outside}
        # Bytes of every storage so far. A storage is known by its place in this list, as addresses are reused.
        self._sizes: list[int] = []
        self._gradients: set[int] = set()
        # Storages and the bytes by which they change the total, in order. They are kept, and not only a running total,
        # because a storage turns out to be a gradient only after it was created.
        self._changes: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and record its outputs."""
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

        # torch keeps the Python object of a storage for as long as the storage lives, even if no Python code refers to
        # it. So the callback comes when the memory is freed, also if it was autograd that held it last.
        self._alive[key] = number, weakref.ref(storage, forget)
        self._sizes.append(size)
        self._changes.append((number, size))

    def count_as_gradient(self, gradient: Tensor) -> None:
        """
        Mark a tensor as the gradient of a weight, from its creation on.

        Args:
            gradient (`torch.Tensor`):
                Accumulated gradient of a weight, created in this context.
        """
        self._gradients.add(self._alive[gradient.untyped_storage()._cdata][0])

    def peak(self, with_gradients: bool = True) -> int:
        """
        Largest number of bytes that were alive at one time.

        Args:
            with_gradients (`bool`, *optional*, defaults to `True`):
                Whether to include the gradients of weights.

        Returns:
            `int`: Bytes.
        """
        without = set() if with_gradients else self._gradients
        changes = (change for number, change in self._changes if number not in without)
        return max(itertools.accumulate(changes, initial=0))


@dataclass(frozen=True)
class StepMemory:
    """
    Memory of a forward and backward pass, beyond weights and optimizer states.

    Args:
        activations (`int`):
            Largest number of bytes at one time, without the gradients of weights. Besides activations it includes
            temporary tensors, gradients of activations, and copies of weights in another data type.
        gradients (`int`):
            Bytes of the gradients of all weights.
        peak (`int`):
            Largest number of bytes at one time, with the gradients of weights. It is less than the sum of the other
            two if gradients are created while activations are freed.
    """

    activations: int
    gradients: int
    peak: int


class DatalessTrainer:
    """
    Runs training steps of a model on tensors without data and reports their memory.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of a language model or reward model. It is not modified.
        path (`str`):
            Where the configuration comes from, for error messages.
        method (`str`):
            `"full"`, `"lora"` or `"qlora"`.
        settings ([`~disco_trl.trainer.dataless_model.Settings`]):
            Settings of the training run.

    Attributes:
        model ([`~disco_trl.DiscoRewardModel`] or [`~peft.PeftModel`]):
            Model whose weights are fake tensors of the CPU.
        refusal (`str`, *optional*):
            Why batches are padded. `None` if prefixes are shared.
        parameters (`int`):
            Number of parameters. A packed weight counts as the number of 4-bit weights in it.
        trained (`int`):
            Number of parameters that are trained.

    Raises:
        `ValueError`: If the architecture cannot be made a reward model.
    """

    def __init__(self, config: Any, path: str, method: str, settings: Settings):
        self.settings = settings
        self.model, self.refusal = build(config, path, method, settings)
        # Batches are real tensors of token ids: the layout of shared prefixes is computed from their values.
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            take_off_meta(self.model)
        self.model.train()
        if settings.activation_checkpointing:
            # Without dropout there is no random state to restore, and without data none could be read.
            how = {"use_reentrant": False, "preserve_rng_state": False}
            inner = self.model.get_base_model() if is_peft_model(self.model) else self.model
            # transformers 5.24 has both names, and version 6 only the first.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            enable = next(getattr(inner, name) for name in names if hasattr(inner, name))
            enable(how)
            # TRL does the same. The output of the frozen embeddings then gets a gradient, which takes memory.
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
        """`int`: Bytes of weights and buffers."""
        return bytes_of(self._held())

    @property
    def float32_weight_bytes(self) -> int:
        """`int`: Bytes of weights and buffers if those in bfloat16 were in float32."""
        half = [tensor for tensor in self._held() if tensor.dtype == torch.bfloat16]
        return self.weight_bytes + bytes_of(half)

    @property
    def is_full(self) -> bool:
        """`bool`: Whether all weights are trained."""
        return not is_peft_model(self.model)

    def unit_bytes(self) -> tuple[int, int]:
        """
        Bytes of the units in which ZeRO-3 and FSDP gather weights.

        Returns:
            `tuple[int, int]`: Bytes of all weights outside of the layers, such as embeddings and head, and of the
            weights of the largest layer.
        """
        # By default, accelerate wraps the modules that transformers lists here.
        names = {*(getattr(self.model, "_no_split_modules", None) or ())}
        layers = [module for module in self.model.modules() if type(module).__name__ in names]
        inside = [*itertools.chain.from_iterable(layer.parameters() for layer in layers)]
        within = {id(parameter) for parameter in inside}
        root = bytes_of(parameter for parameter in self.model.parameters() if id(parameter) not in within)
        return root, max((bytes_of(layer.parameters()) for layer in layers), default=0)

    def step(self, batch_size: int) -> StepMemory:
        """
        Run a forward and a backward pass.

        Args:
            batch_size (`int`):
                Number of pairs.

        Returns:
            [`StepMemory`]: Memory of the two passes.

        Raises:
            `ValueError`: If the model's forward or backward pass depends on the values of tensors.
        """
        for parameter in self._trained:
            parameter.grad = None
        batch = self._batch(batch_size)
        self._live = live = LiveMemory(self._held())
        try:
            with self._mode, live, attention_of(self.settings.device):
                with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.dtype != "float32"):
                    output = self.model(**batch)
                # A sum stands for the likelihood, which has a few numbers for each pair and takes next to no memory.
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
        """
        Make a batch as the trainer's collator does.

        All pairs have the full length. No two pairs begin with the same token, so that only the two sides of a pair
        share a prefix.
        """
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
        Memory of the optimizer.

        Args:
            dtype (`torch.dtype`, *optional*, defaults to `None`):
                Data type of the weights that the optimizer updates, if it is not that of the model: DeepSpeed and FSDP
                update float32 weights where the model computes in bfloat16.

        Returns:
            `tuple[int, int]`: Bytes of the optimizer's states, and the largest number of bytes at one time that an
            update needs beyond weights, gradients and states.

        Raises:
            `ImportError`: If the optimizer is one of bitsandbytes, and bitsandbytes is not installed.
        """
        args = TrainingArguments("unused", optim=self.settings.optim, use_cpu=True, report_to="none")
        optimizer_class, kwargs = _optimizer_class(args)
        if self.settings.device == "cuda" and self.settings.optim in ("adamw_torch", "sgd"):
            # torch chooses this for weights on CUDA. It updates all weights at once, with temporary tensors for all.
            kwargs["foreach"] = True
        with self._mode:
            weights = [
                nn.Parameter(torch.empty(p.shape, dtype=p.dtype if dtype is None else dtype)) for p in self._trained
            ]
            for weight in weights:
                weight.grad = torch.empty_like(weight)
        # Not under `FakeTensorMode`: bitsandbytes sorts the values of its quantization tables.
        optimizer = optimizer_class(weights, **kwargs)
        with self._mode:
            # The first step creates the states.
            if "8bit" in self.settings.optim:
                self._start_bitsandbytes(optimizer, weights)
            else:
                optimizer.step()
            states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
            live = LiveMemory([*weights, *(weight.grad for weight in weights if weight.grad is not None), *states])
            # bitsandbytes updates in place, in kernels that read the values, so an update needs nothing more.
            if "8bit" not in self.settings.optim:
                with live:
                    optimizer.step()
        return bytes_of(states), live.peak()

    def _start_bitsandbytes(self, optimizer: Any, weights: list[nn.Parameter]) -> None:
        """
        Create bitsandbytes' states without a step, whose kernels would need data.

        The states of embeddings are in 32 bits, as the Trainer of transformers requests. bitsandbytes itself leaves
        those of small weights in 32 bits.
        """
        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        # Paged states have the same size. Allocating them needs the CUDA driver.
        optimizer.is_paged = False
        for index, (weight, own) in enumerate(zip(weights, self._trained, strict=True)):
            optimizer.args.optim_bits = 32 if id(own) in embeddings else 8
            optimizer.init_state(optimizer.param_groups[0], weight, 0, index)


def _optimizer_class(args: TrainingArguments) -> tuple[Any, dict[str, Any]]:
    try:
        return Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise ImportError(f"{args.optim} needs bitsandbytes: pip install 'disco-trl[quantization]'") from error
