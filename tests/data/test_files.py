"""`disco_trl.data.files.written_at_once`: output appears when it is complete, and never through a link."""

from pathlib import Path

import pytest

from disco_trl.data.files import RowWriter, written_at_once


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
