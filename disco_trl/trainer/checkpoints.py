"""
Which checkpoint of a run can be trusted, after the run was killed or its disk was full; and checkpoints on the Hub.

A checkpoint is a folder of files that are written one after another. One that was cut off in between is torn: a file
is missing, or ends early. transformers resumes from the folder with the highest number, whatever is in it; here the
newest whole one is found, and what is wrong with those after it is said.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from accelerate.logging import get_logger
from transformers.trainer import TRAINER_STATE_NAME


logger = get_logger(__name__)


def why_torn(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None. Sizes and headers are read, the weights are not."""
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
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)


def last_whole_checkpoint(folder: Path) -> Path | None:
    """
    The newest checkpoint in a folder that is whole, or None if there is no checkpoint at all. Torn ones after it are
    warned of, and left where they are.

    Raises:
        ValueError: there are checkpoints and all of them are torn.
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
