"""
Which checkpoint of a run can be trusted, after the run was killed or its disk was full.

A checkpoint is a folder of files that are written one after another. A checkpoint that was cut off in between is torn:
a file is missing or ends early. transformers resumes from the folder with the highest number, whatever is in it. Here
the newest whole one is found, and a warning names what is wrong with those after it.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from .predictions import MEMORY_FILE, PredictionMemory


logger = get_logger(__name__)


def why_torn(checkpoint: Path) -> str | None:
    """
    Say what is wrong with the files of a checkpoint.

    Sizes and headers are read, and weights are not, so that this takes no time for a large model.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint.

    Returns:
        `str` or `None`: The fault, or `None` if the checkpoint is whole.
    """
    try:
        # The last file that transformers writes
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{TRAINER_STATE_NAME}, which is written last, is missing or not whole"
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix == ".safetensors" and not _is_whole_safetensors(path):
            return f"{path.name} is not whole"
        # What torch writes is a zip archive, with its table of contents at the end.
        if path.suffix in (".pt", ".pth", ".bin") and path.is_file() and not zipfile.is_zipfile(path):
            return f"{path.name} is not whole"
    for index in checkpoint.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            return f"{index.name} is not whole"
        missing = sorted(shard for shard in shards if not (checkpoint / shard).is_file())
        if missing:
            return f"{missing[0]}, which {index.name} names, is missing"
    return None


def _is_whole_safetensors(path: Path) -> bool:
    try:
        # Opening compares the header with the size of the file and reads no tensor.
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def last_whole_checkpoint(folder: Path) -> Path | None:
    """
    Find the newest whole checkpoint of a run. Newer ones that are torn are left where they are, with a warning.

    Args:
        folder (`Path`):
            Output folder of the run.

    Returns:
        `Path` or `None`: The checkpoint, or `None` if there is none at all.

    Raises:
        `ValueError`: If there are checkpoints and all of them are torn.
    """
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    checkpoints = sorted((path for path, step in steps.items() if step), key=lambda path: -int(steps[path][1]))  # type: ignore[index]
    for checkpoint in checkpoints:
        problem = why_torn(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning(f"{checkpoint} is torn and not resumed from: {problem}. Remove it when you have seen it.")
    if checkpoints:
        raise ValueError(
            f"every checkpoint in {folder} is torn; remove them, and begin anew without resume_from_checkpoint"
        )
    return None


class WholeCheckpoints(Trainer):
    """
    A trainer that resumes from whole checkpoints, and keeps its predictions in them.

    It is inherited beside one of TRL's trainers and before it, so that `super()` here reaches that one's methods.
    """

    _memory: PredictionMemory | None

    def train(  # type: ignore[override]  # the rest goes through `kwargs`
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """
        Trains as in transformers, and resumes from whole checkpoints only.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Checkpoint to resume from. `True` stands for the newest whole one: a checkpoint that was cut off while
                it was written, because the process was killed or the disk full, is skipped with a warning.
            **kwargs:
                Further arguments of [`~transformers.Trainer.train`].

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: As in transformers.

        Raises:
            `ValueError`: If the checkpoint to resume from is torn, or if all of them are; or if the training data gave
                no batch.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_whole_checkpoint(self._output_dir) or "") or True
        elif resume_from_checkpoint:
            problem = why_torn(Path(resume_from_checkpoint))
            if problem is not None:
                raise ValueError(
                    f"{resume_from_checkpoint} is no checkpoint to resume from: {problem}. Name another, or pass "
                    "resume_from_checkpoint=True for the newest whole one"
                )
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.state.global_step == 0 and self.state.max_steps > 0:
            # transformers says so among its infos, and the caller would save a model with a random head.
            raise ValueError(
                f"no optimizer step was made of {self.state.max_steps}: the train dataset gave no batch; check that "
                "it has rows for each process, and enough for a batch with dataloader_drop_last=True"
            )
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Before transformers writes the state, which marks a checkpoint as whole, and removes older checkpoints
        if self._memory is not None and not self.args.save_only_model:
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            self._memory.save(folder / MEMORY_FILE)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._memory is not None and checkpoint is not None and Path(checkpoint, MEMORY_FILE).is_file():
            self._memory.load(Path(checkpoint, MEMORY_FILE))

    @property
    def _output_dir(self) -> Path:
        return Path(str(self.args.output_dir))
