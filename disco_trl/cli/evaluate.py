"""Tell how good a reward model is on held-out preferences or on a benchmark, and how honest.

Accuracy, NLL, calibration and more, each with a 95 % interval, are printed. With OUTPUT_DIR, they are written as well:
metrics.json, scores.parquet, and report.html with pictures.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from ..evaluation.benchmarks import KINDS
from .arguments import DataArguments, ReportArguments, ScoringArguments, at_least_one


@dataclass(kw_only=True)
class Arguments(ReportArguments, DataArguments, ScoringArguments):
    """The arguments of `disco-trl evaluate`."""

    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; needed where there are several."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "OUTPUT_DIR: folder to write figures, scores and a report into."}
    )
    kind: str = field(
        default="auto",
        metadata={
            "choices": ["auto", *KINDS],
            "metavar": "KIND",
            "help": f"What the rows are: {', '.join(KINDS)}; or auto, the default, which looks at the first row.",
        },
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Leave out items with an answer of more tokens than this."}
    )
    card: bool = field(
        default=False, metadata={"help": "Also put the table and the pictures into the model's README.md."}
    )
    draws: int = field(
        default=1000, metadata={"help": "Bootstrap draws that the intervals are taken from (default: %(default)s)."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap draws (default: %(default)s)."})
    plain: bool = field(
        default=False,
        metadata={"help": "See a disco checkpoint as tools without disco-trl see it: the logit alone."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "draws")
        if self.card and self.output_dir is None:
            raise ValueError("--card needs the pictures of the report; give --output_dir")
        if self.plain and (self.attribute or self.weights or self.minimum):
            raise ValueError(
                "--plain is the logit of the checkpoint, which is the overall reward; leave out --attribute, "
                "--weights and --minimum, or evaluate the plain model that `disco-trl export` writes of another reward"
            )


def run(args: Arguments) -> None:
    """Evaluate a model."""
    from ..data.files import open_rows
    from ..evaluation.evaluate import (
        about_attribute,
        as_json,
        as_markdown,
        as_text,
        evaluate,
        save_scores,
        versions,
    )
    from ..evaluation.held_out import HeldOut
    from ..evaluation.report import Model, write_report
    from ..evaluation.scored import score_held_out
    from ..models.model_card import add_evaluation

    model, data = args.model_name_or_path, args.dataset_name
    rows = open_rows(data, args.dataset_config, args.dataset_test_split, split_argument="--dataset_test_split")
    reward = args.load_reward()
    held_out = HeldOut.read(rows, reward.processing_class, args.kind, args.max_length)
    if args.attribute is not None:
        held_out = held_out.about(args.attribute)
    start = time.perf_counter()
    scored = score_held_out(reward.model, held_out.sequences, args.tokens_per_batch, reward.view)
    seconds = time.perf_counter() - start
    if args.plain:
        scored = scored.plain()
    rewards = scored.rewards
    found = evaluate(scored, held_out, args.draws, args.seed)
    text = as_text(found, f"{model} on {data}")
    if args.output_dir is None:
        print(text)
        return

    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    save_scores(output / "scores.parquet", rewards, held_out)
    of_run = {
        "model": model,
        "data": data,
        "split": args.dataset_test_split,
        "weights": args.view_options["weights"],
        "family": rewards.family,
        "seconds": seconds,
        "versions": versions(),
    }
    figures = as_json(found)
    (output / "metrics.json").write_text(
        json.dumps(of_run | figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    setup = {"Model": model, "Data": data, "Family": rewards.family, "Scored in": f"{seconds:.1f} s"}
    setup |= {"Versions": ", ".join(f"{name} {number}" for name, number in versions().items())}
    report = write_report(
        output,
        f"{Path(model).name} on {Path(data).name}{about_attribute(found.attribute)}",
        [Model(Path(model).name, figures)],
        rewards,
        held_out,
        setup=setup,
        examples=args.examples,
    )
    if args.card:
        pictures = [output / f"{name}.png" for name in ("reliability", "risk-coverage") if found.metrics]
        add_evaluation(Path(model), as_markdown(found, data), pictures)
    print(f"{text}\n\n{report}")
