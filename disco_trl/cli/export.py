"""Write a reward model in a form that other tools take as it is. Adapters are merged.

The rewards of what was written are compared with those of its source before it gets its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .arguments import as_weights


@dataclass(kw_only=True)
class Arguments:
    """The arguments of `disco-trl export`."""

    model_name_or_path: str = field(
        metadata={
            "help": "MODEL: a disco checkpoint, a PEFT adapter or a scalar reward model; a folder, or an id on the "
            "Hub."
        }
    )
    output_dir: str = field(metadata={"help": "OUTPUT_DIR: the folder to write."})
    to: str = field(
        metadata={
            "help": "What to write. scalar: a plain reward model, the location alone; two-logit: a plain classifier "
            "with the location and the raw scale, for engines such as vLLM; attributes: a plain classifier with the "
            "location and the raw scale of each attribute; disco: a full disco checkpoint."
        }
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the weights: float32 (the default), bfloat16 or float16."},
    )
    attribute: str | None = field(
        default=None,
        metadata={
            "help": "Attribute whose reward is written, of a model that knows several (default: the overall reward; "
            "with `--to disco` all of them)."
        },
    )
    weights: str | None = field(
        default=None,
        metadata={
            "help": "Weights of attributes as JSON, of whose rewards the weighted sum is written, with `--to scalar`: "
            '\'{"helpfulness": 1, "verbosity": -0.5}\'.'
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a model that is in OUTPUT_DIR."})


def run(args: Arguments) -> None:
    """Export a model."""
    from ..models.export import export

    weights = as_weights("--weights", args.weights)
    report = export(
        args.model_name_or_path, args.output_dir, args.to, args.dtype, args.overwrite, args.attribute, weights
    )
    print(f"{args.output_dir}: {report}")
