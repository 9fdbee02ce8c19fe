"""Tell how many parameters and how much memory the training of a reward model will need.

In full, with LoRA, and with QLoRA (nf4, double quantization). Only the model's config is read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from .arguments import JsonArguments, at_least_one


if TYPE_CHECKING:
    from ..trainer.estimate import Estimate

LABELS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
GIB = 2**30


@dataclass(kw_only=True)
class Arguments(JsonArguments):
    """The arguments of `disco-trl estimate`."""

    model_name_or_path: str = field(metadata={"help": "MODEL: a local folder, or an id on the Hub."})
    batch_size: int = field(default=8, metadata={"help": "Pairs on each device (default: %(default)s)."})
    length: int = field(default=1024, metadata={"help": "Tokens of a side of a pair (default: %(default)s)."})
    prompt_share: float = field(
        default=0.0,
        metadata={
            "help": "Part of a side that both sides share, which prefix sharing computes once (default: %(default)s)."
        },
    )
    prefix_sharing: bool = field(
        default=True, metadata={"help": "Whether prefixes are shared (the default) or batches padded, as TRL's are."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters (default: %(default)s)."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"metavar": "MODULE", "help": "Modules that get an adapter, by name (default: all-linear)."},
    )
    dtype: str = field(
        default="mixed",
        metadata={
            "help": "What is computed in. mixed (the default): weights in float32, computing in bfloat16, which is "
            "what TRL's defaults come to; bfloat16: weights too; float32: everything."
        },
    )
    optim: str = field(
        default="adamw_torch_fused",
        metadata={
            "help": "Optimizer, as in transformers: adamw_torch_fused (the default), adamw_torch, adamw_8bit, "
            "paged_adamw_8bit, sgd or adafactor."
        },
    )
    activation_checkpointing: bool = field(
        default=True, metadata={"help": "Whether activations are dropped and computed again, as by TRL's default."}
    )
    processes: int = field(default=1, metadata={"help": "Number of devices (default: %(default)s)."})
    sharding: str = field(
        default="none", metadata={"help": "What the devices share: none (the default), zero2, zero3 or fsdp."}
    )
    device: Literal["cuda", "cpu"] = field(default="cuda", metadata={"help": "Kind of device (default: %(default)s)."})
    methods: list[str] = field(
        default_factory=lambda: list(LABELS),
        metadata={"metavar": "METHOD", "help": "Ways of training: full, lora, qlora (default: all)."},
    )
    memory: float | None = field(
        default=None,
        metadata={
            "metavar": "GIB",
            "help": "Memory of a device; the table then tells what fits, and the largest batch.",
        },
    )

    def __post_init__(self) -> None:
        at_least_one(self, "batch_size", "length", "lora_r", "processes")
        if not 0 <= self.prompt_share <= 1:
            raise ValueError(f"--prompt_share {self.prompt_share} must be between 0 and 1")
        if self.memory is not None and not self.memory > 0:
            raise ValueError(f"--memory {self.memory} must be positive")


def table(estimates: dict[str, Estimate], memory: int | None) -> str:
    """A Markdown table, a row for each way of training; memory in GiB."""
    head = ["", "parameters", "trained", "weights", "gradients", "optimizer", "activations", "total, GiB"]
    if memory is not None:
        head += [f"fits {memory / GIB:g} GiB", "largest batch"]
    rows = [head]
    for method, found in estimates.items():
        parts = (found.weights, found.gradients, found.optimizer, found.activations, found.total)
        row = [LABELS[method], f"{found.parameters:,}", f"{found.trained:,}", *(f"{part / GIB:.2f}" for part in parts)]
        if memory is not None:
            row += ["yes" if found.fits else "no", str(found.largest_batch)]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width if place == 0 else "-" * (width - 1) + ":" for place, width in enumerate(widths)])
    return "\n".join(
        "| " + " | ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in line) + " |"
        for line in (enumerate(zip(row, widths, strict=True)) for row in rows)
    )


def run(args: Arguments) -> None:
    """Estimate, and print a table."""
    from transformers import AutoConfig

    from ..models.loading import check_found
    from ..trainer.dataless_model import Settings
    from ..trainer.estimate import estimate

    model = args.model_name_or_path
    targets = args.lora_target_modules
    settings = Settings(
        length=args.length,
        prompt_share=args.prompt_share,
        prefix_sharing=args.prefix_sharing,
        dtype=args.dtype,
        optim=args.optim,
        activation_checkpointing=args.activation_checkpointing,
        lora_r=args.lora_r,
        lora_targets="all-linear" if targets == ["all-linear"] else tuple(targets),
        device=args.device,
    )
    memory = None if args.memory is None else round(args.memory * GIB)
    check_found(model)
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    estimates = {
        method: estimate(config, model, method, settings, args.batch_size, args.processes, args.sharding, memory)
        for method in args.methods
    }
    args.write_json(
        {
            "settings": {name: value for name, value in vars(args).items() if name != "json"},
            "estimates": {name: asdict(found) for name, found in estimates.items()},
        }
    )
    refusal = next(iter(estimates.values())).prefix_sharing_refusal
    layout = "prefixes shared" if refusal is None else "padded"
    print(
        f"{model}, on each of {args.processes} {args.device}: {args.batch_size} pairs, {args.length} tokens a "
        f"side, {layout}, {args.dtype}, {args.optim}"
    )
    if refusal is not None and settings.prefix_sharing:
        print(f"Without prefix sharing: {refusal}.")
    print(f"\n{table(estimates, memory)}")
    if args.processes == 1:
        print("\nGradients come while activations go, so the total is less than the sum.")
    if args.device == "cuda":
        print("CUDA itself takes about half a GiB more, and the allocator's gaps some of the rest.")
