"""The two trainings of the quickstart, each in a process of its own.

On a CPU both run at the same time, with half of the cores each: a model this small keeps one core busy, and gains
little from a second one. The slower one gets all cores when the other has finished. On an accelerator, or with one
core, they run one after the other.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import TrainerCallback

from disco_trl import RewardDistribution
from disco_trl.evaluation.child import peak_bytes
from disco_trl.evaluation.compare_run import load_rewards, save_rewards
from disco_trl.models.inference import score


@dataclass
class _Shared:
    """What the processes share.

    Attributes:
        steps_done (`Synchronized`):
            Number of optimizer steps that all trainings together have taken.
        running (`Synchronized`):
            Number of trainings that have not finished.
        cores (`int`):
            Number of cores.
    """

    steps_done: Any
    running: Any
    cores: int

    def take_free_cores(self) -> None:
        """Divides the cores among the trainings that run. An accelerator needs none."""
        if not torch.accelerator.is_available():
            torch.set_num_threads(max(1, self.cores // max(1, self.running.value)))


_shared: _Shared


def _share(shared: _Shared) -> None:
    global _shared
    _shared = shared


@dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
        trainer, config (`type`):
            Classes of the trainer and of its config.
        folder (`Path`):
            Where the model goes, the rewards of the held-out texts, and `training.log`.
        settings (`dict[str, Any]`):
            Arguments of the config.
        train_dataset (`Dataset`):
            Pairs to learn from.
        base_model (`str`):
            Path or Hub id of the language model.
        sequences (`list[list[int]]`):
            Token ids of the held-out texts.
    """

    trainer: type
    config: type
    folder: Path
    settings: dict[str, Any]
    train_dataset: Dataset
    base_model: str
    sequences: list[list[int]]


@dataclass(frozen=True)
class Trained:
    """What came out of it.

    Attributes:
        folder (`Path`):
            Where the rewards of the held-out texts are.
        family (`str`):
            Their family.
        training_seconds (`float`):
            How long the training took.
        peak_bytes (`int`):
            Largest memory of the process.
        device (`str`):
            Where it ran.
        threads (`int`):
            Number of threads that torch began with.
    """

    folder: Path
    family: str
    training_seconds: float
    peak_bytes: int
    device: str
    threads: int

    @property
    def rewards(self) -> RewardDistribution:
        """Rewards of the held-out texts."""
        return load_rewards(self.folder, self.family)


class _CountSteps(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _shared.take_free_cores()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with _shared.steps_done.get_lock():
            _shared.steps_done.value += 1


def _send_output_to(path: Path) -> None:
    """Sends all that this process prints from now on to a file."""
    with path.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # If the training fails, the log is read before this process ends.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def train_and_score(job: Job) -> Trained:
    """Trains a model, saves it, and scores the held-out texts.

    Args:
        job ([`Job`]):
            What to train.

    Returns:
        [`Trained`]: What came out of it.
    """
    _send_output_to(job.folder / "training.log")
    start = time.perf_counter()
    _shared.take_free_cores()
    threads = torch.get_num_threads()
    trainer = job.trainer(
        model=job.base_model,
        args=job.config(str(job.folder), disable_tqdm=True, **job.settings),
        train_dataset=job.train_dataset,
        peft_config=LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[_CountSteps()],
    )
    trainer.train()
    trainer.save_model()
    seconds = time.perf_counter() - start
    # accelerate wraps the forward in bfloat16 autocast. The model is measured as it is loaded, in float32.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    _shared.take_free_cores()
    rewards = score(model, job.sequences, description="Scoring")
    save_rewards(rewards, job.folder)
    with _shared.running.get_lock():
        _shared.running.value -= 1
    return Trained(job.folder, rewards.family, seconds, peak_bytes(), str(trainer.accelerator.device), threads)


def run(jobs: dict[str, Job], steps: int) -> dict[str, Trained]:
    """Runs all trainings, with one bar of progress.

    Args:
        jobs (`dict[str, Job]`):
            What to train, by name.
        steps (`int`):
            Number of optimizer steps of all of them together.

    Returns:
        `dict[str, Trained]`: What came out, by name.

    Raises:
        `RuntimeError`: If a training fails. The message has the end of its log.
    """
    for job in jobs.values():
        job.folder.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    at_once = 1 if torch.accelerator.is_available() else min(len(jobs), cores)
    context = multiprocessing.get_context("spawn")
    shared = _Shared(context.Value("q", 0), context.Value("q", at_once), cores)
    pool = ProcessPoolExecutor(at_once, context, _share, (shared,), max_tasks_per_child=1)
    with pool, tqdm(total=steps, desc="Training both", unit="step") as bar:
        futures = {name: pool.submit(train_and_score, job) for name, job in jobs.items()}
        pending: Sequence[Future] = [*futures.values()]
        while pending:
            pending = [*wait(pending, timeout=1).not_done]
            bar.update(shared.steps_done.value - bar.n)
        found = {}
        for name, future in futures.items():
            try:
                found[name] = future.result()
            except Exception as error:
                log = jobs[name].folder / "training.log"
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
                end = "\n".join(lines[-20:]) or "(it is empty)"
                raise RuntimeError(f"the training of {name} failed ({error}); the end of {log}:\n{end}") from error
    return found
