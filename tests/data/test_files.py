"""Output in `disco_trl.data.files`: it appears when complete, never through a link, and from one process at a time."""

import contextlib
import errno
import fcntl
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Features, Value

from disco_trl.data.files import RowWriter, locked, written_at_once


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(unfinished: Path, content: str) -> None:
    if unfinished.is_dir():
        unfinished = unfinished / "config.json"
    unfinished.write_text(content)


def read(path: Path) -> str:
    return (path / "config.json" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("folder", [False, True])
def test_output_appears_at_once_and_replaces_what_was_there(folder, tmp_path):
    path = tmp_path / "new" / "output"
    for content in ("one", "two"):
        with written_at_once(path, folder) as unfinished:
            write(unfinished, content)
            assert not path.exists() or read(path) == "one"
        assert read(path) == content
    assert names(tmp_path / "new") == ["output"]


@pytest.mark.parametrize("folder", [False, True])
def test_a_failure_leaves_what_was_there_and_nothing_else(folder, tmp_path):
    path = tmp_path / "output"
    with pytest.raises(KeyboardInterrupt), written_at_once(path, folder) as unfinished:
        write(unfinished, "half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    with written_at_once(path, folder) as unfinished:
        write(unfinished, "whole")
    with pytest.raises(KeyboardInterrupt), written_at_once(path, folder) as unfinished:
        write(unfinished, "half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["output"] and read(path) == "whole"


@pytest.mark.parametrize("name", ["output", "output.unfinished"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_link_is_replaced_and_not_followed(folder, name, tmp_path):
    precious = tmp_path / "precious"
    if folder:
        precious.mkdir()
    write(precious, "precious")
    (tmp_path / name).symlink_to(precious)
    with written_at_once(tmp_path / "output", folder) as unfinished:
        write(unfinished, "new")
    assert read(precious) == "precious" and read(tmp_path / "output") == "new"
    assert names(tmp_path) == ["output", "precious"] and not (tmp_path / "output").is_symlink()


def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / "output.unfinished").mkdir()
    (tmp_path / "output.unfinished" / "half").write_text("half")
    with written_at_once(tmp_path / "output") as unfinished:
        unfinished.write_text("whole")
    assert names(tmp_path) == ["output"]


def test_rows_that_cannot_be_written_leave_no_file(tmp_path):
    with (
        pytest.raises(ValueError, match=r"row 1: .*write to a \.parquet file"),
        RowWriter(tmp_path / "rows.jsonl", None) as writer,
    ):
        writer.write([{"text": "a"}, {"text": object()}])
    assert names(tmp_path) == []


# A full disk. A limit to the size of files gives the same error where a test cannot fill a disk: at the same calls,
# and with another number.


@contextlib.contextmanager
def small_files():
    """No file may grow beyond 20,000 bytes; only around the code under test, as pytest itself may print to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # Python ignores the signal
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def incompressible(rows: int) -> list[dict]:
    return [{"text": os.urandom(500).hex()} for _ in range(rows)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("rows", [15, 60])  # buffered until the file is closed, and not
def test_a_full_disk_leaves_nothing_and_is_named(name, rows, tmp_path):
    features = Features({"text": Value("string")}) if name.endswith("parquet") else None
    said = rf"{name} is not written, and nothing is left of it; make space"
    with small_files(), pytest.raises(OSError, match=said) as raised:
        with RowWriter(tmp_path / name, features) as writer:
            for _ in range(3):
                writer.write(incompressible(rows))
    assert raised.value.errno == errno.EFBIG
    assert names(tmp_path) == []


def test_a_full_disk_leaves_what_was_there(tmp_path):
    (tmp_path / "output").write_text("whole")
    with small_files(), pytest.raises(OSError, match="nothing is left"):
        with written_at_once(tmp_path / "output") as unfinished:
            unfinished.write_bytes(bytes(30_000))
    assert names(tmp_path) == ["output"] and read(tmp_path / "output") == "whole"


@pytest.mark.parametrize("folder", [False, True])
def test_what_appears_is_on_the_disk_before_and_its_name_soon_after(folder, tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        events.append(("synced", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def replaced(source, target):
        events.append(("replaced", Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    path = tmp_path / "new" / "newer" / "output"
    with written_at_once(path, folder) as unfinished:
        write(unfinished, "whole")
    contents = [path, path / "config.json"] if folder else [path]
    at = events.index(("replaced", path))
    assert {*events[:at]} == {("synced", part.stat().st_ino) for part in contents}
    # The names of the file and of the folders that were made for it
    assert {*events[at + 1 :]} == {("synced", part.stat().st_ino) for part in (path.parent, path.parents[1], tmp_path)}


# One process at a time

HOLD = """
import sys
from pathlib import Path
from disco_trl.data.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that writes `tmp_path / "output"` until its input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "output")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_writes(holder, tmp_path):
    said = rf"output: another process is writing it \(process {holder.pid} on .*\); wait .* or choose another output"
    for write_something in (lambda: locked(tmp_path / "output"), lambda: RowWriter(tmp_path / "output", None)):
        with pytest.raises(BlockingIOError, match=said), write_something():
            pytest.fail("was let in")
    with locked(tmp_path / "other"):
        pass
    holder.communicate("")
    with locked(tmp_path / "output"):
        assert names(tmp_path) == ["output.lock"]
    assert names(tmp_path) == []


def test_a_killed_process_leaves_no_lock(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert names(tmp_path) == ["output.lock"]
    with RowWriter(tmp_path / "output", None) as writer:
        writer.write([{"text": "a"}])
    assert names(tmp_path) == ["output"]


def test_a_lock_is_that_of_the_file_that_is_there(tmp_path, monkeypatch):
    """Whoever opened the file of the last holder, which is gone, has locked nothing."""
    real, removed = fcntl.flock, []

    def late(descriptor, operation):
        real(descriptor, operation)
        if not removed:
            removed.append(True)
            (tmp_path / "output.lock").unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path / "output"):
        assert (tmp_path / "output.lock").exists()
        with pytest.raises(BlockingIOError), locked(tmp_path / "output"):
            pytest.fail("was let in")
    assert names(tmp_path) == []


def test_a_lock_is_not_taken_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "output.lock").symlink_to(tmp_path / "precious")
    with locked(tmp_path / "output"):
        pass
    assert names(tmp_path) == ["precious"] and (tmp_path / "precious").read_text() == "precious"


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, operation):
        if operation != fcntl.LOCK_UN:
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    caplog.set_level(logging.WARNING, logger="disco_trl")
    with RowWriter(tmp_path / "rows.jsonl", None) as writer:
        writer.write([{"text": "a"}])
    assert names(tmp_path) == ["rows.jsonl"]
    assert "rows.jsonl cannot be locked (No locks available)" in caplog.text
