"""`disco-trl score` on many rows: kills, several processes, memory.

Run under a launcher (`accelerate launch test_annotate_resuming.py LOG score ...`) this file scores, and logs which
process scored what; with `--halt` for LOG it waits after the first part. Some tests do so.
"""

import contextlib
import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, Value
from safetensors.torch import load_file, save_file
from test_annotate import read, write_jsonl
from tiny_models import load
from tiny_training import preferences
from transformers.utils import logging as hf_logging

from disco_trl import DiscoReward
from disco_trl.cli.main import main
from disco_trl.data.files import chunks
from disco_trl.distributions.transforms import get_transform
from disco_trl.rewards import annotate
from disco_trl.rewards.annotate import Annotator, annotate_file


def run(arguments, **options) -> subprocess.CompletedProcess:
    """The command in a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "disco_trl", "score", *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, **options)


def environment() -> dict[str, str]:
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


# Kills


class Killed(BaseException):
    """Nothing may catch it."""


def broken_off(dataset, out, annotator, monkeypatch, after: int) -> None:
    """Score until `after` parts are there."""
    whole = Annotator.__call__

    def limited(self, rows, answers, first=0):
        if len(list(out.parent.glob(f"{out.name}.parts/part-*.parquet"))) == after:
            raise Killed
        return whole(self, rows, answers, first)

    with monkeypatch.context() as patch:
        patch.setattr(Annotator, "__call__", limited)
        with pytest.raises(Killed):
            annotate_file(dataset, out, annotator, rows_per_part=4)


def test_what_must_not_change_before_it_goes_on(reward_dir, tiny_tokenizer, tmp_path, monkeypatch):
    rows = preferences(rows=12).to_list()
    out = tmp_path / "scored.jsonl"
    reward = DiscoReward(reward_dir(), device="cpu")
    broken_off(Dataset.from_list(rows), out, Annotator(reward), monkeypatch, after=2)

    def refused(what, dataset_rows, annotator, rows_per_part=4):
        with pytest.raises(ValueError, match=rf"with other settings \(then {what} .* delete the folder"):
            annotate_file(Dataset.from_list(dataset_rows), out, annotator, rows_per_part)

    refused("data", [*rows[:-1], {**rows[-1], "chosen": "Something else."}], Annotator(reward))
    refused("data", [*reversed(rows)], Annotator(reward))
    refused("rows", rows[:-1], Annotator(reward))
    refused("transform", rows, Annotator(reward, get_transform("lower_bound")))
    refused("prefix", rows, Annotator(reward, prefix="my_"))
    refused("rows_per_part", rows, Annotator(reward), rows_per_part=5)
    refused("family", rows, Annotator(DiscoReward(reward_dir(reward_family="cauchy"), device="cpu")))

    edited = tmp_path / "edited"
    edited.mkdir()
    for file in Path(reward_dir()).iterdir():
        (edited / file.name).write_bytes(file.read_bytes())
    weights = load_file(edited / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, edited / "model.safetensors", metadata={"format": "pt"})
    refused("model", rows, Annotator(DiscoReward(str(edited), device="cpu")))
    tiny_tokenizer.chat_template += " "
    refused("tokenizer", rows, Annotator(DiscoReward(reward_dir(), tiny_tokenizer, device="cpu")))

    # The same model from another place is the same model.
    other_copy = Annotator(DiscoReward(load(reward_dir()), reward.processing_class))
    assert annotate_file(Dataset.from_list(rows), out, other_copy, 4) == (12, 8)


def test_the_same_result_however_often_it_is_broken_off(reward_dir, tmp_path, monkeypatch):
    dataset = preferences(rows=22)
    annotator = Annotator(DiscoReward(reward_dir(), device="cpu"), get_transform("sample", seed=5))
    whole, pieced = tmp_path / "whole.parquet", tmp_path / "pieced.parquet"
    assert annotate_file(dataset, whole, annotator, rows_per_part=4) == (22, 0)
    for after in (0, 1, 2, 5):
        broken_off(dataset, pieced, annotator, monkeypatch, after)
        assert not pieced.exists()
    # Half a part, and half of the file, are what a kill leaves.
    (tmp_path / "pieced.parquet.parts" / "part-000005.unfinished").write_bytes(b"PAR1")
    (tmp_path / "pieced.parquet.unfinished").write_bytes(b"PAR1")
    assert annotate_file(dataset, pieced, annotator, rows_per_part=4) == (22, 20)
    assert pieced.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pieced.parquet", "whole.parquet"]


@pytest.mark.slow
def test_kill_9(reward_dir, tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", preferences("conversational", rows=200))
    out, parts = tmp_path / "scored.parquet", tmp_path / "scored.parquet.parts"
    arguments = [reward_dir(), data, out, "--rows_per_part", "2", "--device", "cpu"]
    command = [sys.executable, "-m", "disco_trl", "score", *map(str, arguments)]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, env=environment(), stderr=log) as process:
        while len(list(parts.glob("part-*.parquet"))) < 5:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.01)
                break
        process.kill()
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not out.exists()
    before = {path.name: path.stat() for path in parts.glob("part-*.parquet")}
    assert 5 <= len(before) < 100

    # A hard link keeps each finished part in sight after the command has tidied up.
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in before:
        os.link(parts / name, kept / name)
    finished = run(arguments)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert f"{out}: 200 rows, {2 * len(before)} of them scored before" in finished.stdout
    for name, stat in before.items():
        now = (kept / name).stat()
        assert (now.st_ino, now.st_mtime_ns, now.st_size) == (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    assert not parts.exists()

    main(["score", reward_dir(), data, str(tmp_path / "whole.parquet"), *arguments[3:]])
    assert read(out) == read(tmp_path / "whole.parquet")


def test_killed_while_it_tidied_up(reward_dir, tmp_path, capsys):
    data = write_jsonl(tmp_path / "a.jsonl", preferences(rows=4))
    out, parts = tmp_path / "scored.jsonl", tmp_path / "scored.jsonl.parts"
    arguments = ["score", reward_dir(), data, str(out), "--device", "cpu"]
    main(arguments)
    complete = out.read_text()
    parts.mkdir()
    (parts / "settings.json").write_text("{}")
    (parts / "part-000000.parquet").write_text("")
    main(arguments)
    assert "was complete" in capsys.readouterr().out
    assert out.read_text() == complete
    assert not parts.exists()


# A full disk. A limit to the size of files gives the same error at the same calls.


@contextlib.contextmanager
def largest_file(size: int):
    """A limit in bytes. What a test and pytest itself print may go to a file, too, and must not come within it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    hf_logging.disable_progress_bar()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        hf_logging.enable_progress_bar()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_full_disk_keeps_the_scores_and_no_half_a_file(suffix, reward_dir, tmp_path):
    # The scores of 4 rows take 2 KB, and the rows themselves 40.
    rows = [{**row, "note": os.urandom(5000).hex()} for row in preferences(rows=20).to_list()]
    dataset = Dataset.from_list(rows)
    annotator = Annotator(DiscoReward(reward_dir(), device="cpu"))
    out = tmp_path / f"scored{suffix}"
    said = (
        rf"{out.name} is not complete. The scores of 5 parts of 4 rows are kept in .*{out.name}\.parts: make space "
        "and run the same command again to go on from there"
    )
    with largest_file(50_000), pytest.raises(OSError, match=said) as raised:
        annotate_file(dataset, out, annotator, rows_per_part=4)
    assert raised.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == [f"{out.name}.parts"]
    assert len([*tmp_path.glob("*.parts/*")]) == 5 + 1
    assert annotate_file(dataset, out, annotator, rows_per_part=4) == (20, 20)
    assert [row["note"] for row in read(out)] == [row["note"] for row in rows]
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_disk_that_was_full_from_the_start(reward_dir, tmp_path):
    annotator = Annotator(DiscoReward(reward_dir(), device="cpu"))
    with largest_file(100), pytest.raises(OSError, match="is not complete"):
        annotate_file(preferences(rows=4), tmp_path / "scored.jsonl", annotator)
    assert [*tmp_path.iterdir()] == []


def test_the_parts_go_when_the_file_is_on_the_disk(reward_dir, tmp_path, monkeypatch):
    synced, fsync, remove = [], os.fsync, annotate.remove_parts

    def recorded(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def remove_what_is_synced(parts):
        assert synced[-2:] == [out.stat().st_ino, tmp_path.stat().st_ino]
        assert {path.stat().st_ino for path in (*parts.iterdir(), parts)} <= {*synced}
        remove(parts)

    out = tmp_path / "scored.jsonl"
    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(annotate, "remove_parts", remove_what_is_synced)
    annotate_file(preferences(rows=12), out, Annotator(DiscoReward(reward_dir(), device="cpu")), rows_per_part=4)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


# Two commands, one output


@contextlib.contextmanager
def halted(arguments):
    """The command in a process of its own, which waits for the end of its input before it scores the second part."""
    command = [sys.executable, __file__, "--halt", "score", *map(str, arguments)]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "scoring\n", process.communicate()[1][-2000:]
            yield process
        finally:
            process.kill()


@pytest.fixture
def of_twelve_rows(reward_dir, tmp_path) -> list:
    """Arguments of `disco-trl score`, which writes `scored.jsonl`."""
    data = write_jsonl(tmp_path / "a.jsonl", preferences(rows=12))
    return [reward_dir(), data, tmp_path / "scored.jsonl", "--rows_per_part", "4", "--device", "cpu"]


@pytest.mark.slow
def test_a_second_command_on_one_output_is_refused(of_twelve_rows, tmp_path):
    arguments, out = of_twelve_rows, tmp_path / "scored.jsonl"
    with halted(arguments) as first:
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        second = run(arguments)
        assert second.returncode == 1
        assert f"scored.jsonl: another process is writing it (process {first.pid} on " in second.stderr
        assert "wait until it has ended, or choose another output" in second.stderr
        assert {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        printed, errors = first.communicate("")
    assert first.returncode == 0, errors[-2000:]
    assert "12 rows, 0 of them scored before" in printed
    assert len(read(out)) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "scored.jsonl"]


@pytest.mark.slow
def test_a_killed_command_holds_no_lock(of_twelve_rows, tmp_path):
    with halted(of_twelve_rows) as first:
        first.kill()
        first.wait()
    main(["score", *map(str, of_twelve_rows)])
    assert len(read(tmp_path / "scored.jsonl")) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "scored.jsonl"]


def test_an_output_that_has_appeared_meanwhile_is_not_written_over(reward_dir, tmp_path):
    out = tmp_path / "scored.jsonl"
    out.write_text("another's")
    annotator = Annotator(DiscoReward(reward_dir(), device="cpu"))
    with pytest.raises(ValueError, match="exists already"):
        annotate_file(preferences(rows=4), out, annotator)
    assert out.read_text() == "another's"


# Several processes


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_give_what_one_gives(reward_dir, tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", preferences("conversational", rows=50))
    arguments = ["--rows_per_part", "4", "--device", "cpu", "--transform", "sample"]
    # accelerate's name for "several processes on this machine"; `--device cpu` has them meet over gloo.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    two, log = tmp_path / "two.parquet", tmp_path / "log"
    result = subprocess.run(
        [*launcher, __file__, str(log), "score", reward_dir(), data, str(two), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("50 rows") == 1
    # Each part once, and the two processes by turns.
    lines = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
    assert sorted(lines, key=lambda line: line[1]) == [(part % 2, part * 4) for part in range(13)]
    log.unlink()
    main(["score", reward_dir(), data, str(tmp_path / "one.parquet"), *arguments])
    assert read(two) == read(tmp_path / "one.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "one.parquet", "two.parquet"]


# Memory


def test_memory_does_not_grow_with_the_rows(reward_dir, tmp_path):
    annotator = Annotator(DiscoReward(reward_dir(), device="cpu"))

    def peak(rows: int, out: Path) -> float:
        """MiB at most, in Python and in Arrow, above what there was before; a row is 100 KB, and a part 8 rows."""
        import pyarrow as pa

        arrow = [pa.total_allocated_bytes()]

        def make():
            for number in range(rows):
                arrow.append(pa.total_allocated_bytes())
                yield {"text": f"Film {number}.", "note": f"{number:07d} " * 12_500}

        features = Features({"text": Value("string"), "note": Value("string")})
        dataset = IterableDataset.from_generator(make, features=features)
        gc.collect()
        tracemalloc.start()
        annotate_file(dataset, out, annotator, rows_per_part=8)
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return (python + max(arrow) - arrow[0]) / 2**20

    # 100 rows are 10 MiB, 800 rows 76, and a part is 0.8.
    few, many = peak(100, tmp_path / "few.jsonl"), peak(800, tmp_path / "many.jsonl")
    assert many < few + 1
    assert many < 5


def test_chunks_read_no_further_than_they_must():
    taken = []

    def make():
        for number in range(10):
            taken.append(number)
            yield {"text": str(number)}

    read_chunks = chunks(IterableDataset.from_generator(make), 4)
    assert [row["text"] for row in next(read_chunks)] == ["0", "1", "2", "3"]
    assert len(taken) <= 5
    assert [len(rows) for rows in read_chunks] == [4, 2]


def log_what_is_scored(log: Path) -> None:
    """Have each process write a line for each part that it scores: its own number, and that of the first row."""
    whole = Annotator.__call__

    def logged(self, rows, answers, first=0):
        with log.open("a") as file:
            file.write(f"{PartialState().process_index} {first}\n")
        return whole(self, rows, answers, first)

    Annotator.__call__ = logged  # type: ignore[method-assign]


def wait_after_the_first_part() -> None:
    """Have this process say that it has scored a part, and wait for the end of its input."""
    whole = Annotator.__call__

    def waiting(self, rows, answers, first=0):
        if first:
            Annotator.__call__ = whole  # type: ignore[method-assign]
            print("scoring", flush=True)
            sys.stdin.read()
        return whole(self, rows, answers, first)

    Annotator.__call__ = waiting  # type: ignore[method-assign]


if __name__ == "__main__":
    if sys.argv[1] == "--halt":
        wait_after_the_first_part()
    else:
        log_what_is_scored(Path(sys.argv[1]))
    main(sys.argv[2:])
