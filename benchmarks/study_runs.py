"""What the studies share: their command line, the runs of `disco-trl compare` that they are made of, and tables."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from transformers import AutoTokenizer

from disco_trl.cli.main import main as disco_trl
from disco_trl.data.files import open_rows
from disco_trl.evaluation.compare import Result, Variant
from disco_trl.evaluation.held_out import HeldOut

from .downloads import small_chat_lm


SETTINGS = (
    *("per_device_train_batch_size=16", "num_train_epochs=1", "learning_rate=4e-4", "lr_scheduler_type=cosine"),
    *("warmup_steps=0.1", "gradient_checkpointing=false", "train_sampling_strategy=sequential"),
)
"""Settings of the trainer in all studies. Blocks of comparisons are batches, and in random order as they are drawn."""
SEEDS = (0, 1, 2)


def study_parser(prog: str, description: str | None, studies: Iterable[str], seeds: str) -> argparse.ArgumentParser:
    """Creates the parser of a module of studies.

    Args:
        prog (`str`):
            How the module is run.
        description (`str` or `None`):
            What it studies.
        studies (`Iterable[str]`):
            Names of its studies.
        seeds (`str`):
            Seeds that the runs have by default, in words.

    Returns:
        [`~argparse.ArgumentParser`]: The parser.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="+", choices=[*studies], help="Studies to run.")
    parser.add_argument(
        "--model", help="Hub id or folder of the language model (default: a small chat LM from the package index)."
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="Dtype of the language model (default: %(default)s).",
    )
    parser.add_argument("--seeds", nargs="+", type=int, help=f"Seeds of the training runs (default: {seeds}).")
    parser.add_argument("--output", type=Path, required=True, help="Folder for runs, tables and charts.")
    return parser


def train_and_evaluate(
    args: argparse.Namespace,
    data: Path,
    output: Path,
    variants: Sequence[str],
    seeds: Sequence[int],
    settings: Sequence[str] = (),
    options: Sequence[str] = (),
) -> dict[str, list[Result]]:
    """Trains what is not trained yet, and loads it.

    Args:
        args (`argparse.Namespace`):
            Arguments of the command line.
        data (`Path`):
            Folder with `data-SEED` for each seed.
        output (`Path`):
            Folder of the runs.
        variants (`Sequence[str]`):
            Variants of `disco-trl compare`. Bradley–Terry and its controls are trained by our trainer.
        seeds (`Sequence[int]`):
            Seeds.
        settings (`Sequence[str]`, *optional*, defaults to `()`):
            Settings of the trainer beside [`SETTINGS`].
        options (`Sequence[str]`, *optional*, defaults to `()`):
            Further options of `disco-trl compare`.

    Returns:
        `dict[str, list[Result]]`: For each variant a result for each seed.
    """
    command = ["compare", args.model, str(data / "data-{seed}"), str(output), "--dtype", args.dtype]
    command += ["--variants", *variants, "--seeds", *map(str, seeds), "--bradley_terry", "disco", *options]
    disco_trl([*command, "--set", *SETTINGS, *settings, f"bf16={args.dtype == 'bfloat16'}"])
    return {
        name: [Result.load(variant, seed, output / f"{variant.folder}-{seed}") for seed in seeds]
        for name in variants
        for variant in [Variant.parse(name)]
    }


def held_out_of(args: argparse.Namespace, data: Path) -> HeldOut:
    """Reads the held-out split of a folder, for the model of the command line."""
    return HeldOut.read(open_rows(str(data), split="test"), AutoTokenizer.from_pretrained(args.model))


def write_tables(args: argparse.Namespace, tables: Mapping[str, Callable[[argparse.Namespace], str]]) -> None:
    """Runs the studies of the command line, and writes and prints their tables."""
    args.model = args.model or str(small_chat_lm())
    for name in args.studies:
        table = tables[name](args)
        (args.output / f"{name}.md").write_text(table + "\n", encoding="utf-8")
        print(f"\n## {name}\n\n{table}")
