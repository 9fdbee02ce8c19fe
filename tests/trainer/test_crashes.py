"""Runs that are killed, even while they write a file, or that fill the disk: a resumed run ends with the same weights.

The tests run this file as a script (`python test_crashes.py MODEL FOLDER KIND END`). It then trains and ends as `END`
says.
"""

import os
import resource
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_training import disco_trainer, furthest, preferences, weights
from transformers import TrainerCallback

from disco_trl.trainer.checkpoints import last_whole_checkpoint, why_torn


KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft_config": LoraConfig(r=4)},
    "stream": {"dispatch_batches": False},
    "by length": {"train_sampling_strategy": "group_by_length"},
}


def trainer_of(kind: str, model: str, folder: Path):
    data = preferences(rows=48)
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 3, "epistemic": True} | KINDS[kind]
    if "dispatch_batches" in options:
        options["accelerator_config"] = {"dispatch_batches": options.pop("dispatch_batches")}
        data = data.to_iterable_dataset()
    return disco_trainer(folder, model=model, train_dataset=data, **options)


class End(TrainerCallback):
    """Ends the process after a given step, or while it writes the second checkpoint, which is due at step 6."""

    def __init__(self, end: str):
        self.end = end

    def on_step_end(self, args, state, control, **kwargs):
        if self.end == f"step {state.global_step}":
            os.kill(os.getpid(), signal.SIGKILL)
        if state.global_step == 6 and self.end == "in the state":
            state.save_to_json = self.tear
        if state.global_step == 6 and self.end in ("in the weights", "in the optimizer", "full disk"):
            # Writing a file beyond the limit kills the process, or raises an error if the signal is ignored.
            is_fatal = self.end != "full disk"
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if is_fatal else signal.SIG_IGN)
            weights = Path(args.output_dir, "checkpoint-3", "model.safetensors").stat().st_size
            limit = weights + 1000 if self.end == "in the optimizer" else weights // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    @staticmethod
    def tear(path: str) -> None:
        Path(path).write_text('{"epoch": 1.0, "global_st')
        os.kill(os.getpid(), signal.SIGKILL)


def run(kind: str, model: str, folder: Path, end: str) -> subprocess.CompletedProcess:
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, __file__, model, str(folder), kind, end]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def straight(tiny_llama_dir, tmp_path_factory):
    """Weights of an uninterrupted run of each kind."""

    @cache
    def of_kind(kind: str) -> dict[str, torch.Tensor]:
        trainer = trainer_of(kind, tiny_llama_dir, tmp_path_factory.mktemp("straight"))
        trainer.train()
        return weights(trainer.model)

    return of_kind


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_to_the_same_bits(kind, straight, tiny_llama_dir, tmp_path):
    assert run(kind, tiny_llama_dir, tmp_path, "step 5").returncode == -signal.SIGKILL
    resumed = trainer_of(kind, tiny_llama_dir, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert furthest(weights(resumed.model), straight(kind)) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("in the weights", -signal.SIGXFSZ),
        ("in the optimizer", -signal.SIGXFSZ),
        ("in the state", -signal.SIGKILL),
        ("full disk", 1),
    ],
)
def test_a_checkpoint_that_was_cut_off_is_passed_over(end, status, straight, tiny_llama_dir, tmp_path, caplog):
    done = run("full", tiny_llama_dir, tmp_path, end)
    assert done.returncode == status, done.stderr[-2000:]
    assert "trainer_state.json, which is written last" in why_torn(tmp_path / "checkpoint-6")
    resumed = trainer_of("full", tiny_llama_dir, tmp_path)
    with pytest.raises(ValueError, match="checkpoint-6 is no checkpoint to resume from"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-6 is torn and not resumed from" in caplog.text
    assert furthest(weights(resumed.model), straight("full")) == 0


@pytest.fixture(scope="module")
def checkpoints(tiny_llama_dir, tmp_path_factory) -> Path:
    """A directory with three checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    trainer_of("full", tiny_llama_dir, folder).train()
    return folder


def test_the_newest_whole_one(checkpoints, tmp_path):
    assert last_whole_checkpoint(checkpoints) == checkpoints / "checkpoint-9"
    assert last_whole_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "predictions.safetensors"]
)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_ends_early(name, share, checkpoints, tmp_path):
    for path in (checkpoints / "checkpoint-3").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert why_torn(tmp_path) is None
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    assert why_torn(tmp_path) == f"{name} is not whole"


def test_a_shard_that_is_missing(checkpoints, tmp_path):
    (tmp_path / "trainer_state.json").write_bytes((checkpoints / "checkpoint-3" / "trainer_state.json").read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"score.weight": "model-00001-of-00001.safetensors"}}')
    assert why_torn(tmp_path).startswith("model-00001-of-00001.safetensors, which")
    index.write_text(index.read_text()[:-5])
    assert why_torn(tmp_path) == f"{index.name} is not whole"


def test_nothing_whole_is_left(tiny_llama_dir, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match=r"every checkpoint in .* is torn; remove them"):
        trainer_of("full", tiny_llama_dir, tmp_path).train(resume_from_checkpoint=True)


if __name__ == "__main__":
    import conftest  # noqa: F401  (sets the tests' environment variables)

    trainer = trainer_of(sys.argv[3], sys.argv[1], Path(sys.argv[2]))
    trainer.add_callback(End(sys.argv[4]))
    trainer.train()
