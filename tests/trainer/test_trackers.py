"""The trackers of `report_to` receive what the trainer logged. The tests read it back from the trackers' own files."""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_training import disco_trainer, preferences


pytestmark = pytest.mark.slow
METRICS = {f"{mode}/{name}" for mode in ("train", "eval") for name in ("loss", "nll", "prob_chosen", "scale_mean")}


@pytest.fixture
def train(tiny_llama_dir, tiny_tokenizer, tmp_path):
    """Function that trains with a tracker and returns what was logged at each step, under the trackers' names."""

    def run(tracker: str, **options) -> dict[int, dict[str, float]]:
        trainer = disco_trainer(
            tmp_path / "run",
            model=tiny_llama_dir,
            processing_class=tiny_tokenizer,
            train_dataset=preferences(),
            eval_dataset=preferences(rows=8, seed=1),
            eval_strategy="steps",
            eval_steps=2,
            report_to=tracker,
            **options,
        )
        trainer.train()
        logged: dict[int, dict[str, float]] = {}
        for entry in trainer.state.log_history:
            at = logged.setdefault(entry["step"], {})
            for name, value in entry.items():
                # Totals of the run belong to no step.
                if name not in ("step", "total_flos") and not name.startswith("train_"):
                    at["eval/" + name[5:] if name.startswith("eval_") else "train/" + name] = value
        return logged

    return run


def assert_received(received: dict[int, dict[str, float]], logged: dict[int, dict[str, float]]) -> None:
    """Check that every number was received at its step, up to float32 rounding, which some trackers apply."""
    assert set().union(*received.values()) >= METRICS
    for step, numbers in logged.items():
        for name, value in numbers.items():
            assert received[step][name] == pytest.approx(value, rel=1e-6, nan_ok=math.isnan(value)), (step, name)


def test_tensorboard(train, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    logged = train("tensorboard")

    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    received: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            received.setdefault(event.step, {})[name] = event.value
    assert_received(received, logged)


def wandb_records(path: Path) -> Iterator[bytes]:
    """Records in the file of an offline run: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    data = path.read_bytes()
    at, parts = 7, b""
    while at < len(data):
        left = 2**15 - at % 2**15
        if left < 7:  # no room for another header
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def test_wandb_offline(train, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    logged = train("wandb")
    wandb.finish()

    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    received: dict[int, dict[str, float]] = {}
    for data in wandb_records(file):
        items = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in Record.FromString(data).history.item
        }
        if "train/global_step" in items:
            received.setdefault(items["train/global_step"], {}).update(items)
    assert_received(received, logged)


def test_trackio(train):
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    logged = train("trackio", project="disco-trl-tests", run_name="tiny")

    received: dict[int, dict[str, float]] = {}
    for entry in SQLiteStorage.get_logs("disco-trl-tests", "tiny"):
        if "train/global_step" in entry:
            received.setdefault(int(entry["train/global_step"]), {}).update(entry)
    assert_received(received, logged)
