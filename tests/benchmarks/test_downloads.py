"""`benchmarks/downloads.py`. Nothing is downloaded: pip looks into a folder, in which the tests put small files."""

import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest

from benchmarks.downloads import Release, fetch


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes for its only index, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("DISCO_TRL_CACHE", str(tmp_path / "cache"))
    return folder


def make_release(index: Path) -> Release:
    wheel = index / "tiny_ratings-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_ratings.txt", "some data")
        archive.writestr(
            "tiny_ratings-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-ratings\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_ratings-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_ratings-1.0.dist-info/RECORD", "")
    return Release("tiny-ratings==1.0", wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest())


def test_a_fetched_file_is_kept_and_not_fetched_again(index, tmp_path):
    release = make_release(index)
    path = fetch(release)
    assert path == tmp_path / "cache" / release.filename
    assert zipfile.ZipFile(path).read("tiny_ratings.txt") == b"some data"
    shutil.rmtree(index)  # from now on, a download would fail
    assert fetch(release) == path
    assert [file.name for file in path.parent.iterdir()] == [release.filename]


def test_a_file_that_is_not_the_expected_one_is_refused_and_not_kept(index, tmp_path):
    release = make_release(index)
    wrong = Release(release.requirement, release.filename, "0" * 64)
    with pytest.raises(ValueError, match="not the one expected"):
        fetch(wrong)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_file_in_the_cache_is_removed(index):
    release = make_release(index)
    path = fetch(release)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"SHA-256 is .* removed, run again"):
        fetch(release)
    assert not path.exists()
    assert fetch(release).exists()


def test_an_index_out_of_reach_is_said_so_with_what_to_do(index, tmp_path):
    release = make_release(index)
    (index / release.filename).unlink()
    with pytest.raises(
        ConnectionError, match=r"could not download tiny-ratings==1.0(.|\n)*put the file there yourself"
    ):
        fetch(release)
    assert list((tmp_path / "cache").iterdir()) == []
