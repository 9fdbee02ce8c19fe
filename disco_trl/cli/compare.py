"""Train Bradley–Terry with TRL's trainer, and variants of ours, alike; tell which is better.

DATA has a split to train on and one to test on; {seed} in its name stands for the seed. A variant is bradley-terry, a
control of it (bradley-terry-epistemic, bradley-terry-ensemble:members=4, bradley-terry-soft) or a reward family
(--reward_family of `disco-trl train`), perhaps with settings of its own: normal, normal:prefix_sharing=false,
logistic:label_noise=0.05. OUTPUT_DIR gets a folder for each run, a table and a report. A comparison that was
interrupted goes on with the runs that are missing if the same command is run again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .arguments import ReportArguments


if TYPE_CHECKING:
    from ..evaluation.compare import Result, Variant
    from ..evaluation.compare_run import Run
    from ..evaluation.held_out import HeldOut
    from ..evaluation.report import Verdict


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """The arguments of `disco-trl compare`."""

    model_name_or_path: str = field(
        metadata={"help": "MODEL: language model or reward model to start from; a folder, or an id on the Hub."}
    )
    dataset_name: str = field(
        metadata={"help": "DATA: preferences; a folder with train.jsonl and test.jsonl, or the id of a dataset."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Name of the configuration of a dataset on the Hub."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on (default: %(default)s)."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to test on (default: %(default)s)."})
    output_dir: str = field(metadata={"help": "OUTPUT_DIR: folder of the runs and of the report."})
    variants: list[str] = field(
        default_factory=lambda: ["bradley-terry", "normal"],
        metadata={"metavar": "VARIANT", "help": "What to train (default: bradley-terry normal)."},
    )
    bradley_terry: Literal["trl", "disco"] = field(
        default="trl",
        metadata={
            "help": "Whose trainer Bradley–Terry is trained with: TRL's own (the default), or ours, which has the "
            "same likelihood and takes less time. Where the data say more than who won, only ours can train it."
        },
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"metavar": "SEED", "help": "Seeds of the runs (default: 0)."}
    )
    set: list[str] = field(
        default_factory=list,
        metadata={"metavar": "KEY=VALUE", "help": "Fields of DiscoRewardConfig, for all variants."},
    )
    search: int = field(
        default=0,
        metadata={
            "metavar": "TRIALS",
            "help": "First try this many learning rates and batch sizes for each variant, on a tenth of the training "
            "rows (default: none).",
        },
    )
    lora_r: int = field(
        default=16, metadata={"help": "Rank of LoRA adapters; 0 trains the whole model (default: %(default)s)."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "Dtype of the language model; `auto`, the default, is the checkpoint's."}
    )
    max_train: int | None = field(
        default=None, metadata={"help": "Train on this many rows at most, the first of a shuffle by the seed."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Leave out rows with an answer of more tokens than this."}
    )
    keep_models: bool = field(default=False, metadata={"help": "Save the models that were trained."})


def run(args: Arguments) -> None:
    """Do the runs that are missing, and compare."""
    from transformers import AutoTokenizer

    from ..evaluation.compare import Variant, find_settings, parse_settings, run_all
    from ..evaluation.compare_run import Run, read_data
    from ..evaluation.controls import check_judged, check_labels
    from ..evaluation.verdicts import as_table, attribute_tables, compare, compare_attributes, verdict_table
    from ..models.loading import check_found

    output = Path(args.output_dir)
    common = parse_settings(args.set, "--set")
    variants = [Variant.parse(text) for text in args.variants]
    runs = [
        (
            variant,
            seed,
            Run(
                base=variant.base,
                bradley_terry=args.bradley_terry,
                settings=variant.applied(common),
                seed=seed,
                model=args.model_name_or_path,
                data=args.dataset_name.replace("{seed}", str(seed)),  # Other braces are part of the name.
                config=args.dataset_config,
                train_split=args.dataset_train_split,
                test_split=args.dataset_test_split,
                max_train=args.max_train,
                max_length=args.max_length,
                lora_r=args.lora_r,
                dtype=args.dtype,
                keep_model=args.keep_models,
                search=0,
                output=str(output / f"{variant.folder}-{seed}"),
                **variant.of_control,
            ),
        )
        for seed in args.seeds
        for variant in variants
    ]
    # What is wrong with the model's path or the data is said before anything is trained.
    check_found(args.model_name_or_path)
    train, held_out = read_data(
        runs[0][2], AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=False)
    )
    for _, _, run in runs[: len(variants)]:
        check_labels(train, run.labels)
        check_judged(train, run.base)
    if args.search:
        runs = find_settings(runs, args.search)
    results, failures = run_all(runs)
    for name, words in failures.items():
        print(f"{name} failed:\n{words}\n", file=sys.stderr)
    if not results:
        raise ValueError("no run succeeded; the folders in --output_dir hold their logs")
    verdicts, of_attributes = compare(results, held_out), compare_attributes(results, held_out)
    parts = [as_table(results), *([verdict_table(verdicts)] if verdicts else []), *attribute_tables(results)]
    parts += [verdict_table(in_attribute, heading) for heading, in_attribute in of_attributes.items()]
    remarks = dict.fromkeys(
        f"{result.variant.name}: {remark}" for result in results for remark in result.figures["remarks"]
    )
    tables = "\n\n".join([*parts, *remarks])
    (output / "table.md").write_text(f"{tables}\n", encoding="utf-8")
    report = _report(args, runs, results, failures, verdicts, of_attributes, held_out)
    print(f"\n{tables}\n\n{report}")


def _report(
    args: Arguments,
    runs: list[tuple[Variant, int, Run]],
    results: list[Result],
    failures: dict[str, str],
    verdicts: dict[str, dict[str, Verdict]],
    of_attributes: dict[str, dict[str, dict[str, Verdict]]],
    held_out: HeldOut,
) -> Path:
    from ..evaluation.controls import CONTROLS
    from ..evaluation.evaluate import versions
    from ..evaluation.report import Model, write_report
    from ..evaluation.verdicts import mean_and_range, mean_over_seeds

    by_variant: dict[str, list[Result]] = {}
    for result in results:
        by_variant.setdefault(result.variant.name, []).append(result)
    # Ours first: the examples are of the first model.
    order = sorted(by_variant, key=lambda name: by_variant[name][0].variant.base in CONTROLS)
    settings = {variant.name: run.settings for variant, _, run in runs}
    models = [
        Model(
            name,
            mean_over_seeds(by_variant[name]),
            [tuple(point) for point in by_variant[name][0].figures["history"]],
            {
                "minutes": mean_and_range([run.figures["minutes"] for run in by_variant[name]], "{:.1f}"),
                "peak memory, GiB": mean_and_range([run.figures["peak_gib"] for run in by_variant[name]], "{:.1f}"),
                "trainer": by_variant[name][0].figures["trainer"],
                "settings": ", ".join(f"{key}={value}" for key, value in settings[name].items()) or "TRL's defaults",
            },
        )
        for name in order
    ]
    setup = {
        "Data": args.dataset_name,
        "Model": args.model_name_or_path,
        "LoRA rank": str(args.lora_r or "none, the whole model"),
        "Seeds": ", ".join(map(str, args.seeds)),
        "Versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }
    setup |= {f"{name} failed": words.splitlines()[-1] for name, words in failures.items()}
    title = f"{Path(args.model_name_or_path).name}: {len(results)} runs compared"
    ranges = {"brackets": "the range over seeds"} if len(args.seeds) > 1 else {}
    rewards = by_variant[order[0]][0].rewards
    return write_report(
        Path(args.output_dir),
        title,
        models,
        rewards,
        held_out,
        verdicts,
        setup,
        examples=args.examples,
        attribute_verdicts=of_attributes,
        **ranges,
    )
