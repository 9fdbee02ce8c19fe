"""One run of `disco-trl compare`: trains a model, scores the held-out answers and writes the figures, or searches for
settings.

    python -m disco_trl.evaluation.compare_run FOLDER/run.json

With `--until_input_ends` behind it, it ends when its standard input does, which is how `disco-trl compare` takes its
runs along.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from ..data.files import choose_split, load_preferences, written_at_once
from ..data.judgements import has_judgements
from ..data.tokenization import tokenize_answers
from ..distributions.likelihood import Responses
from ..distributions.reward_distribution import RewardDistribution
from ..trainer.reward_config import DiscoRewardConfig
from ..trainer.reward_trainer import DiscoRewardTrainer
from .child import end_with_parent, peak_bytes
from .controls import BRADLEY_TERRY, CONTROLS, SIGN, ensemble, with_soft_labels
from .evaluate import as_json, evaluate
from .held_out import HeldOut
from .scored import Scored, score_held_out


FIGURES_FILE = "metrics.json"
REWARDS_FILE = "rewards.safetensors"
DRAWS = 300
UNTIL_INPUT_ENDS = "--until_input_ends"


@dataclass(frozen=True)
class Run:
    """Specification of a run, as written to `run.json`.

    Args:
        base (`str`):
            One of [`~disco_trl.evaluation.controls.CONTROLS`] or the name of a family.
        bradley_terry (`str`):
            Trainer of Bradley–Terry, `"trl"` or `"disco"`. Controls are trained by ours.
        settings (`dict`):
            Fields of the trainer's config.
        seed (`int`):
            Seed of the order of the data and of all randomness in training.
        model (`str`):
            Path or Hub id of the model to start from.
        data (`str`):
            File, folder or Hub id of the data.
        config (`str` or `None`):
            Name of the configuration of a dataset on the Hub.
        train_split (`str`):
            Name of the training split.
        test_split (`str`):
            Name of the held-out split.
        max_train (`int` or `None`):
            Maximum number of training rows, taken from a shuffle by the seed.
        max_length (`int` or `None`):
            Maximum number of tokens of an answer. Longer ones are left out of both splits.
        lora_r (`int`):
            Rank of LoRA adapters on all linear layers. 0 trains the whole model.
        dtype (`str`):
            Dtype in which the model is loaded.
        keep_model (`bool`):
            Whether to save the trained model.
        search (`int`):
            If greater than 0, this number of settings is tried on 90 % of the training rows, and the best is written
            instead of an evaluation.
        output (`str`):
            Folder of the run.
        labels (`str` or `list[float]`, *optional*, defaults to `"sign"`):
            What Bradley–Terry makes of strengths of preference; see
            [`~disco_trl.evaluation.controls.with_soft_labels`].
        members (`int`, *optional*, defaults to `1`):
            Number of models of an ensemble. They are trained on the same rows.
        member (`int`, *optional*):
            Number of one model of the ensemble, which is a run of its own. If `None`, the run is the whole ensemble,
            or there is none.
    """

    base: str
    bradley_terry: str
    settings: dict[str, Any]
    seed: int
    model: str
    data: str
    config: str | None
    train_split: str
    test_split: str
    max_train: int | None
    max_length: int | None
    lora_r: int
    dtype: str
    keep_model: bool
    search: int
    output: str
    labels: str | list[float] = SIGN
    members: int = 1
    member: int | None = None

    @property
    def of_members(self) -> list[Run]:
        """The runs of the ensemble's members, empty if the run trains a model itself."""
        if self.members == 1 or self.member is not None or self.search:
            return []
        return [
            replace(self, member=member, output=str(Path(self.output) / f"member-{member}"))
            for member in range(self.members)
        ]

    @property
    def training_seed(self) -> int:
        """Seed of the trainer. No two members of any ensembles of one size have the same."""
        return self.seed if self.member is None else self.seed * self.members + self.member


def read_data(run: Run, processing_class: PreTrainedTokenizerBase) -> tuple[Dataset, HeldOut]:
    """Reads the training rows and the held-out data of a run.

    Args:
        run ([`Run`]):
            Specification of the run.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, for `max_length` and the held-out data.

    Returns:
        `tuple[Dataset, HeldOut]`: Training rows and held-out data.
    """
    splits = load_preferences(run.data, run.config)
    train = choose_split(splits, run.train_split, "--dataset_train_split")
    test = choose_split(splits, run.test_split, "--dataset_test_split")
    if run.max_length is not None:
        longest = run.max_length
        train = train.filter(lambda row: max(map(len, tokenize_answers(row, processing_class))) <= longest)
    # After the filter, so that runs with a limit on length train on as many rows as the others.
    if run.max_train is not None:
        train = train.shuffle(seed=run.seed).select(range(min(run.max_train, len(train))))
    return train, HeldOut.read(test, processing_class, max_length=run.max_length)


def make_trainer(
    run: Run, train: Dataset, processing_class: PreTrainedTokenizerBase, validation: Dataset | None = None
) -> RewardTrainer:
    """Creates the trainer of a run.

    TRL's trainer reads forced choices only. If the data contain other judgements, Bradley–Terry is trained by ours
    with the same likelihood, the logistic family with every scale at 1/√2, and so are the controls. Settings that
    TRL's config does not have are not applied to TRL's trainer.

    Args:
        run ([`Run`]):
            Specification of the run.
        train ([`~datasets.Dataset`]):
            Training rows.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        validation ([`~datasets.Dataset`], *optional*, defaults to `None`):
            Evaluation rows.

    Returns:
        [`~trl.RewardTrainer`]: The trainer, TRL's or ours.
    """
    settings: dict[str, Any] = {
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10,
        "use_cpu": not torch.accelerator.is_available(),
        "model_init_kwargs": {"dtype": run.dtype},
        **run.settings,
        "output_dir": run.output,
        "seed": run.training_seed,
    }
    peft_config = None
    if run.lora_r:
        peft_config = LoraConfig(
            task_type="SEQ_CLS", r=run.lora_r, lora_alpha=2 * run.lora_r, target_modules="all-linear"
        )
    common: dict[str, Any] = {
        "train_dataset": train,
        "eval_dataset": validation,
        "processing_class": processing_class,
        "peft_config": peft_config,
    }
    if run.base not in CONTROLS:
        return DiscoRewardTrainer(run.model, DiscoRewardConfig(reward_family=run.base, **settings), **common)
    by_ours = run.base != BRADLEY_TERRY or run.bradley_terry == "disco"
    if by_ours or run.search or has_judgements(train.column_names):
        # Bradley–Terry knows one reward. What is said about attributes it does not read.
        config = DiscoRewardConfig(
            reward_family="logistic", fixed_scale=2**-0.5, location_error=False, attributes=[], **settings
        )
        return DiscoRewardTrainer(run.model, config, **common)
    settings = {name: settings[name] for name in RewardConfig.__dataclass_fields__ if name in settings}
    return RewardTrainer(run.model, RewardConfig(**settings), **common)


def search(run: Run, train: Dataset, processing_class: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Searches for the settings with the lowest negative log-likelihood on a tenth of the training rows.

    The held-out data take no part, so that the figures of the runs that use the settings stay unbiased.

    Args:
        run ([`Run`]):
            Specification of the run, with the number of trials in `search`.
        train ([`~datasets.Dataset`]):
            Training rows.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.

    Returns:
        `dict`: `best`, the settings; `nll`, their negative log-likelihood in nats; and `trials`, all that were tried.
    """
    parts = train.train_test_split(test_size=0.1, seed=run.seed)
    trainer = make_trainer(run, parts["train"], processing_class, parts["test"])
    trials: list[dict[str, Any]] = []

    def objective(metrics: dict[str, float]) -> float:
        tried = {name: getattr(trainer.args, name) for name in ("learning_rate", "per_device_train_batch_size")}
        trials.append({**tried, "nll": metrics["eval_nll"]})
        return metrics["eval_nll"]

    # transformers' hook reports only the best trial, so that the objective records all. A seeded sampler makes a
    # repeated search try the same settings.
    from optuna.samplers import TPESampler

    best: Any = trainer.hyperparameter_search(
        compute_objective=objective, n_trials=run.search, backend="optuna", sampler=TPESampler(seed=run.seed)
    )
    return {"best": best.hyperparameters, "nll": best.objective, "trials": trials}


def train_and_evaluate(
    run: Run, train: Dataset, held_out: HeldOut, processing_class: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Trains and evaluates the model of a run. The rewards of the held-out answers and, with `keep_model`, the model
    are written to its folder.

    Args:
        run ([`Run`]):
            Specification of the run.
        train ([`~datasets.Dataset`]):
            Training rows.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            Held-out data.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.

    Returns:
        `dict`: Figures of the run, as written to `metrics.json`.
    """
    start = time.perf_counter()
    trainer = make_trainer(run, train, processing_class)
    trainer.train()
    minutes = (time.perf_counter() - start) / 60
    # accelerate wraps the forward of the model in mixed precision. The model is measured as it will be loaded, without
    # that wrapper and in its own dtype.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    scored = score_held_out(model, held_out.sequences)
    output = Path(run.output)
    if run.keep_model:
        trainer.save_model(str(output / "model"))
    save_rewards(scored.rewards, output)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "tie_width": scored.tie_width,
        "known": save_attributes(scored.attributes, output),
        "trainer": f"{type(trainer).__module__.partition('.')[0]}.{type(trainer).__name__}",
        "family": scored.rewards.family,
        "pairs": len(train),
        "minutes": minutes,
        "peak_gib": peak_bytes() / 2**30,
        "history": [[entry["epoch"], float(entry.get("nll", entry["loss"]))] for entry in logs],
        # A member is evaluated as a part of its ensemble only.
        **(as_json(evaluate(scored, held_out, DRAWS)) if run.member is None else {}),
    }


def evaluate_ensemble(run: Run, held_out: HeldOut) -> dict[str, Any]:
    """Evaluates an ensemble whose members are finished. Its rewards of the held-out answers are written to its folder.

    Args:
        run ([`Run`]):
            Specification of the run.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            Held-out data.

    Returns:
        `dict`: Figures of the run, as written to `metrics.json`. The minutes are those of all members, the tie width
        is their mean, the peak of the memory is that of the largest, and the history is that of the first.
    """
    folders = [Path(member.output) for member in run.of_members]
    figures = [read_run(folder) for folder in folders]
    rewards = ensemble([load_rewards(folder, of["family"]) for folder, of in zip(folders, figures, strict=True)])
    save_rewards(rewards, Path(run.output))
    widths = [of_member["tie_width"] for of_member in figures]
    tie_width = None if None in widths else sum(widths) / len(widths)
    responses = Responses(tie_width=None if tie_width is None else torch.tensor(tie_width))
    together = {
        "tie_width": tie_width,
        "minutes": sum(of_member["minutes"] for of_member in figures),
        "peak_gib": max(of_member["peak_gib"] for of_member in figures),
    }
    return {**figures[0], **together, **as_json(evaluate(Scored(rewards, responses), held_out, DRAWS))}


def save_rewards(rewards: RewardDistribution, folder: Path, file: str = REWARDS_FILE) -> None:
    """Writes the rewards of the held-out answers to the folder of a run."""
    names = ("location", "scale", "shape", "location_error", "error_factor")
    tensors = {name: tensor for name in names if (tensor := getattr(rewards, name)) is not None}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)


def load_rewards(folder: Path, family: str, file: str = REWARDS_FILE) -> RewardDistribution:
    """Loads the rewards of the held-out answers, of shape `(N,)`, from the folder of a finished run."""
    return RewardDistribution(family=family, **load_file(folder / file))


def save_attributes(attributes: Mapping[str, Scored], folder: Path) -> dict[str, dict[str, Any]]:
    """Writes the rewards of the held-out answers for each attribute to the folder of a run.

    Args:
        attributes (`Mapping[str, Scored]`):
            What the model says about each attribute.
        folder (`Path`):
            Folder of the run.

    Returns:
        `dict[str, dict]`: The rest of what the model says, for `metrics.json`, by attribute: the name of the `file`,
        `tie_width`, `thresholds` and `rating_values`.
    """
    known = {}
    for number, (name, scored) in enumerate(attributes.items()):
        # The name of an attribute may be none for a file.
        file = f"rewards-{number}.safetensors"
        save_rewards(scored.rewards, folder, file)
        thresholds = scored.responses.thresholds
        known[name] = {
            "file": file,
            "tie_width": scored.tie_width,
            "thresholds": None if thresholds is None else thresholds.tolist(),
            "rating_values": [*scored.rating_values],
        }
    return known


def load_attributes(folder: Path, figures: dict[str, Any]) -> dict[str, Scored]:
    """Loads what the model of a finished run says about each attribute, as far as [`save_attributes`] keeps it.

    Args:
        folder (`Path`):
            Folder of the run.
        figures (`dict`):
            Content of its `metrics.json`.

    Returns:
        `dict[str, Scored]`: By attribute.
    """
    return {
        name: Scored(
            load_rewards(folder, figures["family"], known["file"]),
            Responses(
                **{
                    field: None if known[field] is None else torch.tensor(known[field])
                    for field in ("tie_width", "thresholds")
                }
            ),
            known["rating_values"],
        )
        for name, known in figures["known"].items()
    }


def read_figures(folder: Path) -> dict[str, Any]:
    """Content of the `metrics.json` of a finished run or search."""
    return json.loads((folder / FIGURES_FILE).read_text(encoding="utf-8"))


def read_run(folder: Path) -> dict[str, Any]:
    """Content of the `metrics.json` of a finished run, which is checked.

    Raises:
        `ValueError`: If an earlier version wrote it, which did not keep what a comparison needs.
    """
    figures = read_figures(folder)
    if missing := [name for name in ("tie_width", "known") if name not in figures]:
        raise ValueError(
            f"{folder / FIGURES_FILE} has no {missing[0]!r}, as an earlier version of disco-trl wrote it; remove the "
            "folder, and start the command again to repeat the run"
        )
    return figures


def main(path: str) -> None:
    """Executes a run.

    Args:
        path (`str`):
            Path of the `run.json` with the specification.
    """
    run = Run(**json.loads(Path(path).read_text(encoding="utf-8")))
    processing_class = AutoTokenizer.from_pretrained(run.model, trust_remote_code=False)
    train, held_out = read_data(run, processing_class)
    if run.base in CONTROLS:
        train = with_soft_labels(train, run.labels, by_vote=run.settings.get("weigh_by") == "vote")
    if run.search:
        figures = search(run, train, processing_class)
    elif run.of_members:
        figures = evaluate_ensemble(run, held_out)
    else:
        figures = train_and_evaluate(run, train, held_out, processing_class)
    output = Path(run.output)
    # Written last and at once, because a folder with this file counts as a finished run.
    with written_at_once(output / FIGURES_FILE) as unfinished:
        unfinished.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if UNTIL_INPUT_ENDS in sys.argv[2:]:
        end_with_parent()
    main(sys.argv[1])
