"""Where the time of one training step goes, for TRL's trainers and ours on the same pairs.

Run as:

    python -m benchmarks.profile_step reward --dataset path/to/pairs.jsonl.gz --max-length 512
    python -m benchmarks.profile_step dpo --dataset path/to/pairs.jsonl.gz --max-length 512 --lora

On a GPU, `torch.profiler` looks at one step after two to warm up: kernel launches, copies, synchronizations of the
host with the device, the time that kernels take and the time in which none runs. On a CPU the same step is counted
instead: operators, as each is a launch on a GPU, and calls that would make the host wait for the device, by the line
that makes them (`.item()`, `.tolist()`, indexing with booleans, and the like).

Attention over shared prefixes is one kernel on a GPU, `torch.nn.attention.varlen.varlen_attn`, and many on a CPU.
There, a stand-in takes the kernel's place in the count, so that operators are those of a GPU.
"""

import argparse
import collections
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOTrainer

from disco_trl.models import prefix_sharing
from disco_trl.models.varlen_attention import VarlenKernel

from . import speed_dpo, speed_train
from .downloads import small_chat_lm
from .speed_counts import load_pairs
from .speed_report import markdown


NAMES = ("trl", "default")
"""Variants of [`speed_train.VARIANTS`] and [`speed_dpo.VARIANTS`] that are compared."""
WARM_UP = 2
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
WAITING = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "nonzero",
    "masked_select",
)
"""Methods of a tensor whose result depends on its values, so that the host has to wait for the device."""
HERE = Path(__file__).parent


# Counting


@dataclass
class Counts:
    """What happens in a step.

    Attributes:
        operators (`Counter`):
            Operators by name, views and allocations left out.
        in_layers (`int`):
            Those in the forward passes of decoder layers.
        layers (`int`):
            Forward passes of decoder layers.
        lines (`Counter`):
            Operators outside decoder layers and backward passes, by source line.
        waits (`Counter`):
            Calls that make the host wait, by source line.
    """

    operators: collections.Counter[str] = field(default_factory=collections.Counter)
    in_layers: int = 0
    layers: int = 0
    lines: collections.Counter[str] = field(default_factory=collections.Counter)
    waits: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def a_layer(self) -> float:
        """Operators in the forward pass of a decoder layer."""
        return self.in_layers / self.layers if self.layers else float("nan")


class CountOperators(TorchDispatchMode):
    """Counts operators as they reach a backend, which on a GPU are launches."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts
        self.layers_inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operator and run it."""
        returned = func._schema.returns
        is_view = bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
        name = func.overloadpacket.__name__
        if not is_view and name not in ALLOCATIONS:
            self.counts.operators[name] += 1
            if self.layers_inside:
                self.counts.in_layers += 1
            elif not torch._C._current_autograd_node():
                self.counts.lines[source_line()] += 1
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def inside_layers(self, model: torch.nn.Module) -> Iterator[None]:
        """Knows when a decoder layer runs forward."""

        def enter(*_: Any) -> None:
            self.layers_inside += 1
            self.counts.layers += 1

        def leave(*_: Any) -> None:
            self.layers_inside -= 1

        handles = []
        for module in model.modules():
            if type(module).__name__.endswith("DecoderLayer"):
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class CountWaits(TorchFunctionMode):
    """Counts calls for which the host would wait for a device."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the call, if it is one, and make it."""
        name = getattr(func, "__name__", "")
        indexed = name in ("__getitem__", "__setitem__") and _has_booleans(args[1])
        repeats = name == "repeat_interleave" and any(isinstance(arg, Tensor) for arg in args[1:])
        if indexed or (repeats and "output_size" not in (kwargs or {})) or name in WAITING:
            self.counts.waits[f"{source_line()}  {name}"] += 1
        return func(*args, **(kwargs or {}))


def _has_booleans(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


def source_line() -> str:
    """The innermost line outside torch and this module, as `package/module.py:line`."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent != HERE and "torch" not in path.parts:
            break
        frame = frame.f_back
    return f"{'/'.join(path.parts[-3:])}:{frame.f_lineno}"


@torch.library.custom_op("disco_benchmark::varlen_attn", mutates_args=())
def _stand_in(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.clone()


@_stand_in.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query)


def _backward_of_stand_in(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    of_query, of_key = _backward_operator(gradient, context.saved_tensors[0])
    return of_query, of_key, of_key


@torch.library.custom_op("disco_benchmark::varlen_attn_backward", mutates_args=())
def _backward_operator(gradient: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return gradient.clone(), torch.zeros_like(key)


def _keep_key(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


_stand_in.register_autograd(_backward_of_stand_in, setup_context=_keep_key)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """A single operator with the signature of the kernel of a GPU. Its numbers mean nothing."""
    return _stand_in(query, key, value)


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Has shared prefixes attend by the kernel of a GPU, as far as operators are concerned."""
    kernel = VarlenKernel(varlen_attn)
    with (
        mock.patch.object(prefix_sharing, "is_for_kernel", lambda *args: True),
        mock.patch.object(prefix_sharing, "installed_kernel", lambda: kernel),
        mock.patch.object(prefix_sharing, "lacking", lambda window: None),
    ):
        yield


def count_step(trainer: Any, batches: list[list[int]]) -> Counts:
    """Trains steps to warm up and counts the last.

    Args:
        trainer:
            Trainer of as many steps as there are batches, TRL's or ours.
        batches (`list[list[int]]`):
            Rows of its dataset, which form an epoch.

    Returns:
        [`Counts`]: What happens in `training_step`, which collating, the optimizer and logging are not part of.
    """
    counts = Counts()
    steps = 0
    step = trainer.training_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps < len(batches):
            return step(*args, **kwargs)
        operators = CountOperators(counts)
        with as_on_a_gpu(), CountWaits(counts), operators.inside_layers(trainer.model), operators:
            return step(*args, **kwargs)

    trainer.training_step = counted
    (speed_dpo if isinstance(trainer, DPOTrainer) else speed_train).replay(trainer, batches)
    trainer.train()
    return counts


# On a GPU


@dataclass
class Timeline:
    """What `torch.profiler` sees of a step.

    Attributes:
        launches, copies, synchronizations (`int`):
            Calls of the CUDA runtime.
        milliseconds (`float`):
            Duration of the step.
        busy (`float`):
            Milliseconds in which a kernel runs.
    """

    launches: int
    copies: int
    synchronizations: int
    milliseconds: float
    busy: float


def profile_step(trainer: Any, batches: list[list[int]], trace: Path) -> Timeline:
    """Trains steps to warm up and profiles the last on a GPU.

    Args:
        trainer:
            Trainer of as many steps as there are batches.
        batches (`list[list[int]]`):
            Rows of its dataset, which form an epoch.
        trace (`Path`):
            File for the trace, which chrome://tracing and Perfetto show.

    Returns:
        [`Timeline`]: What has been seen.
    """
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA],
        schedule=torch.profiler.schedule(wait=0, warmup=len(batches) - 1, active=1),
    )

    class Steps(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            profiler.step()

    trainer.add_callback(Steps())
    (speed_dpo if isinstance(trainer, DPOTrainer) else speed_train).replay(trainer, batches)
    with profiler:
        trainer.train()
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"]
    return timeline_of(events)


def timeline_of(events: list[dict[str, Any]]) -> Timeline:
    """Sums up the events of a trace.

    Args:
        events (`list[dict]`):
            Complete events, with `name`, `cat`, and `ts` and `dur` in microseconds.

    Returns:
        [`Timeline`]: The sums.
    """
    of_runtime = [event["name"] for event in events if event.get("cat") == "cuda_runtime"]
    on_device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    busy, end = 0.0, 0.0
    for start, duration in sorted((event["ts"], event["dur"]) for event in on_device):
        busy += max(start + duration - max(start, end), 0)
        end = max(end, start + duration)
    every = [event for event in events if event.get("cat") in ("cpu_op", "cuda_runtime", "kernel")]
    first, last = min(event["ts"] for event in every), max(event["ts"] + event["dur"] for event in every)
    return Timeline(
        sum("Launch" in name for name in of_runtime),
        sum(event.get("cat") == "gpu_memcpy" for event in events),
        sum("Synchronize" in name for name in of_runtime),
        (last - first) / 1000,
        busy / 1000,
    )


# Reports


def count_table(found: dict[str, Counts], labels: dict[str, str]) -> str:
    """Tables of counts: operators of each variant, those that differ most, and the lines that wait."""
    rows = [
        {
            "": labels[name],
            "operators": f"{sum(counts.operators.values()):,}",
            "in the forward pass of a layer": f"{counts.a_layer:.1f}",
            "waits": str(sum(counts.waits.values())),
        }
        for name, counts in found.items()
    ]
    theirs, ours = (found[name].operators for name in NAMES)
    different = sorted({*theirs, *ours}, key=lambda name: -abs(ours[name] - theirs[name]))[:12]
    operators = [
        {"operator": name, labels["trl"]: str(theirs[name]), labels["default"]: str(ours[name])} for name in different
    ]
    lines = [
        {
            "line": line,
            labels["trl"]: str(found["trl"].waits[line]),
            labels["default"]: str(found["default"].waits[line]),
        }
        for line in sorted({*found["trl"].waits, *found["default"].waits})
    ]
    return "\n\n".join(markdown(part) for part in (rows, operators, lines) if part)


def timeline_table(found: dict[str, Timeline], labels: dict[str, str]) -> str:
    """Table of timelines."""
    return markdown(
        [
            {
                "": labels[name],
                "launches": f"{timeline.launches:,}",
                "copies": f"{timeline.copies:,}",
                "synchronizations": f"{timeline.synchronizations:,}",
                "step, ms": f"{timeline.milliseconds:.1f}",
                "kernels run, ms": f"{timeline.busy:.1f}",
                "nothing runs": f"{1 - timeline.busy / timeline.milliseconds:.0%}",
            }
            for name, timeline in found.items()
        ]
    )


def make_trainers(args: argparse.Namespace, steps: int) -> tuple[Callable[[str], Any], dict[str, str]]:
    """How to make the trainers, on the first pairs of the data, and their labels."""
    if args.trainer == "reward":
        pairs = load_pairs(args.dataset, args.split, AutoTokenizer.from_pretrained(args.model), args.max_length)
        pairs = pairs[: args.pairs]
        labels = {name: speed_train.VARIANTS[name].label for name in NAMES}
        return (lambda name: speed_train.make_trainer(name, pairs, args, max_steps=steps)), labels
    rows, _ = speed_dpo.load_rows(args)
    labels = {name: speed_dpo.VARIANTS[name].label for name in NAMES}
    return (lambda name: speed_dpo.make_trainer(name, rows, args, max_steps=steps)), labels


def main(argv: list[str] | None = None) -> None:
    """Profiles what the command line selects."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trainer", choices=("reward", "dpo"), help="Trainer of reward models, or DPO.")
    parser.add_argument("--model", help="Hub id or path (default: a small chat LM from the package index).")
    parser.add_argument("--dataset", required=True, help="Hub id, folder or file of preference pairs.")
    parser.add_argument("--split", default="train", help="Split of the dataset (default: %(default)s).")
    parser.add_argument("--max-length", type=int, help="Leave out pairs with a side of more tokens than this.")
    parser.add_argument("--batch-size", type=int, default=8, help="Pairs of the step (default: %(default)s).")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "mixed", "float32"), default="bfloat16", help="As in benchmarks.speed."
    )
    parser.add_argument("--lora", action="store_true", help="Train LoRA adapters of rank 16.")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="Use gradient checkpointing.")
    parser.add_argument("--out", type=Path, default=Path("runs/profile"), help="Folder (default: %(default)s).")
    parser.set_defaults(learning_rate=1e-5, seed=0, max_tokens_per_batch=None)
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    batches = torch.arange((1 + WARM_UP) * args.batch_size).view(-1, args.batch_size).tolist()
    args.pairs = (1 + WARM_UP) * args.batch_size
    args.model = args.model or str(small_chat_lm())
    speed_train.quieten()
    args.out.mkdir(parents=True, exist_ok=True)
    make, labels = make_trainers(args, len(batches))
    if on_gpu:
        seen = {name: profile_step(make(name), batches, args.out / f"{args.trainer}-{name}.json") for name in NAMES}
        table = timeline_table(seen, labels)
    else:
        table = count_table({name: count_step(make(name), batches) for name in NAMES}, labels)
    (args.out / f"{args.trainer}.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}")


if __name__ == "__main__":
    main()
