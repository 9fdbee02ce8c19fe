"""Arguments that several commands have.

The defaults of numbers are those of the functions that take them; a test holds them to that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal


if TYPE_CHECKING:
    from ..rewards.disco_reward import DiscoReward


def at_least_one(arguments: Any, *names: str) -> None:
    """
    Check numbers among the arguments of a command.

    Args:
        arguments (`Any`):
            The dataclass.
        *names (`str`):
            Its fields; one that is `None` passes.

    Raises:
        `ValueError`: If one is less than 1.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")


@dataclass(kw_only=True)
class DataArguments:
    """What to read."""

    dataset_name: str = field(
        metadata={
            "help": "DATA: a file (.jsonl, .json, .parquet, .csv), a folder with train.jsonl and test.jsonl, or an id "
            "on the Hub."
        }
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Name of the configuration of a dataset on the Hub."}
    )


@dataclass(kw_only=True)
class SplitArguments(DataArguments):
    """What to read, in commands that read one split."""

    dataset_split: str | None = field(
        default=None, metadata={"help": "Split to read; needed where there are several."}
    )


@dataclass(kw_only=True)
class LoadingArguments:
    """A reward model, and where it goes."""

    model_name_or_path: str = field(
        metadata={
            "help": "MODEL: a disco checkpoint, a PEFT adapter or a scalar reward model; a folder, or an id on the "
            "Hub."
        }
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Dtype of the language model; `auto`, the default, is the checkpoint's."}
    )
    device: str | None = field(
        default=None,
        metadata={"help": "Device, such as cpu or cuda:1. Without it, an accelerator is taken if there is one."},
    )


@dataclass(kw_only=True)
class ViewArguments:
    """Which reward, of a model that knows several attributes."""

    attribute: str | None = field(
        default=None, metadata={"help": "Attribute whose reward is taken (default: the overall reward)."}
    )
    weights: str | None = field(
        default=None,
        metadata={
            "help": "Weights of attributes, of whose rewards the weighted sum is taken, as JSON: "
            '\'{"helpfulness": 1, "verbosity": -0.5}\'.'
        },
    )
    minimum: str | None = field(
        default=None,
        metadata={
            "help": "Smallest rating that an answer should get, by attribute, as JSON: '{\"safety\": 4}'. An answer "
            "that fails gets at most --floor."
        },
    )
    min_probability: float = field(
        default=0.5, metadata={"help": "Share of people who have to give it the minimum (default: %(default)s)."}
    )
    floor: float | None = field(default=None, metadata={"help": "Largest reward of an answer that fails."})

    @property
    def view_options(self) -> dict[str, Any]:
        """Arguments of `DiscoReward` that say which reward is taken."""
        return {
            "attribute": self.attribute,
            "weights": as_weights("--weights", self.weights),
            "minimum": as_weights("--minimum", self.minimum),
            "min_probability": self.min_probability,
            "floor": self.floor,
        }


def as_weights(option: str, text: str | None) -> dict[str, float] | None:
    """
    Read a number for each attribute.

    Args:
        option (`str`):
            Option of the command line, for the error.
        text (`str`, *optional*):
            JSON.

    Returns:
        `dict[str, float]`, *optional*: The numbers, or `None` if there is no text.

    Raises:
        `ValueError`: If it is anything else.
    """
    if text is None:
        return None
    import json

    wrong = f"{option} {text!r} is not a number for each attribute, as JSON, such as " + '{"safety": 4}'
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(wrong) from error
    if not isinstance(found, dict) or not all(type(value) in (int, float) for value in found.values()):
        raise ValueError(wrong)
    return found


@dataclass(kw_only=True)
class ScoringArguments(ViewArguments, LoadingArguments):
    """A reward model, which of its rewards, and how many tokens go through it at once."""

    tokens_per_batch: int = field(
        default=8192,
        metadata={"help": "Tokens that go through the model at once, padding counted (default: %(default)s)."},
    )

    def __post_init__(self) -> None:
        at_least_one(self, "tokens_per_batch")

    def load_reward(self) -> DiscoReward:
        """
        Load the model with its tokenizer; scalar reward models are read as Bradley–Terry.

        Raises:
            `ValueError`: If the model has no trained reward head.
        """
        from ..rewards.disco_reward import DiscoReward

        return DiscoReward(
            self.model_name_or_path,
            dtype=self.dtype,
            device=self.device,
            tokens_per_batch=self.tokens_per_batch,
            **self.view_options,
        )


@dataclass(kw_only=True)
class TransformArguments:
    """What the reward is, given its distribution."""

    transform: str = field(
        default="mean",
        metadata={
            "help": "What the reward is: mean (the location, the default), lower_bound, quantile, "
            "certainty_equivalent, win_rate (which best-of-n alone can compute) or sample."
        },
    )
    k: float | None = field(default=None, metadata={"help": "For lower_bound, which is location - k * scale."})
    q: float | None = field(default=None, metadata={"help": "For quantile: its level, between 0 and 1."})
    beta: float | None = field(default=None, metadata={"help": "For certainty_equivalent: the risk tolerance."})
    seed: int | None = field(default=None, metadata={"help": "For sample: the seed of the draws."})
    total: bool = field(
        default=False, metadata={"help": "Count what the model does not know into the scale, for any transform."}
    )

    @property
    def transform_options(self) -> dict[str, Any]:
        """The options of the transform that were given."""
        options = {name: getattr(self, name) for name in ("k", "q", "beta", "seed", "total")}
        return {name: value for name, value in options.items() if value is not None and value is not False}


@dataclass(kw_only=True)
class ReportArguments:
    """What the report shows of the data."""

    examples: int = field(
        default=2,
        metadata={
            "help": "Examples of each kind whose texts the report shows; 0 if the texts are not to be passed on "
            "(default: %(default)s)."
        },
    )


@dataclass(kw_only=True)
class JsonArguments:
    """Where to write what a command prints, for programs."""

    json: str | None = field(
        default=None, metadata={"metavar": "FILE.json", "help": "File to write the figures into, besides printing."}
    )

    def write_json(self, figures: dict[str, Any]) -> None:
        """Write figures to the file, if there is to be one."""
        import json

        from ..data.files import written_at_once

        if self.json is not None:
            with written_at_once(Path(self.json)) as unfinished:
                text = json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False)
                unfinished.write_text(f"{text}\n", encoding="utf-8")


@dataclass(kw_only=True)
class OutputFileArguments:
    """Where to write rows."""

    output_file: str = field(metadata={"help": "OUTPUT_FILE: the file to write, .parquet or .jsonl."})
