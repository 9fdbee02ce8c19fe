"""`benchmarks/argument_votes.py`: reading the votes, and blocks of pairs."""

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import argument_votes
from disco_trl.data.columns import find_layout
from disco_trl.data.records import read_record


def write_votes(folder: Path, texts: int = 17) -> Path:
    """Two sides of a debate with all pairs of their arguments."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, shift in (("train", 0), ("test", 1000)):
        names = {side: [f"{shift + place}{side}" for place in range(texts)] for side in "yn"}
        rows = [
            {
                "debate": f"Debate {split}",
                "stance": side,
                "side": f"{split}-{side}",
                "a": a,
                "b": b,
                "votes": generator.choice(["a", "b", "tie"], 5).tolist(),
            }
            for side, ids in names.items()
            for a, b in itertools.combinations(ids, 2)
        ]
        # The same words under another number
        argument = [{"id": name, "text": f"argument {name}"} for ids in names.values() for name in ids]
        argument.append({"id": "again", "text": argument[0]["text"]})
        rows.append({**rows[0], "a": argument[0]["id"], "b": "again"})
        for name, lines in ((split, rows), (f"{split}_texts", argument)):
            with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
    return folder


def test_votes_are_strengths_of_one(tmp_path):
    rows = argument_votes.read_votes(write_votes(tmp_path), "train")
    assert len(rows) == 2 * 17 * 16 / 2  # without the pair of equal texts
    first = rows[0]
    assert (first["prompt"], first["chosen"], first["rejected"]) == (
        "Debate train\ny\n\n",
        "argument 0y",
        "argument 1y",
    )
    with gzip.open(tmp_path / "train.jsonl.gz", "rt") as file:
        votes = json.loads(file.readline())["votes"]
    said = read_record(first, find_layout(first)).comparisons[0]
    assert (said.wins, said.losses, said.ties) == tuple(votes.count(vote) for vote in ("a", "b", "tie"))
    assert said.people == 5 and said.tie_allowed


def test_blocks_have_few_arguments_of_one_side(tmp_path):
    rows = argument_votes.read_votes(write_votes(tmp_path), "train")
    subset = argument_votes.in_blocks(rows, 64, seed=0)
    for start in range(0, 64, 16):
        block = subset[start : start + 16]
        assert len({row["side"] for row in block}) == 1
        assert len({row[side] for row in block for side in ("chosen", "rejected")}) <= 8
    key = [(row["chosen"], row["rejected"]) for row in subset]
    assert len({*key}) == 64
    other = [(row["chosen"], row["rejected"]) for row in argument_votes.in_blocks(rows, 64, seed=5)]
    assert other != key and {*other} == {*key}  # another order of the same subset


def test_what_cannot_be_read_or_drawn(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train_texts\.jsonl\.gz is missing"):
        argument_votes.read_votes(tmp_path, "train")
    rows = argument_votes.read_votes(write_votes(tmp_path), "train")
    with pytest.raises(ValueError, match="--pairs 20 is no multiple of 16"):
        argument_votes.in_blocks(rows, 20)
    with pytest.raises(ValueError, match=r"blocks for \d+ pairs only"):
        argument_votes.in_blocks(rows, 1600)


def test_files(tmp_path):
    folder = write_votes(tmp_path / "votes")
    argument_votes.main([str(folder), "--pairs", "32", "--output", str(tmp_path / "data")])
    lines = {
        name: [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    }
    assert len(lines["train"]) == 32 and len(lines["test"]) == 272
    assert lines["train"][0].keys() == {"prompt", "chosen", "rejected", "preference_strength"}
