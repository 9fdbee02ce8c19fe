"""`benchmarks/attributes.py` and `benchmarks/attribute_ratings.py`: the data by hand, and the studies end to end."""

import gzip
import json
import re

import numpy as np
import pytest

from benchmarks import attributes
from benchmarks.attribute_ratings import (
    READERS,
    WRITERS,
    compared_rows,
    draw_pairs,
    means_of,
    rated_rows,
    read_texts,
    rows_of_means,
)


def write_ratings(folder, count=60):
    """Texts whose valence and arousal go together, by five readers each, and by four people of the writer's side."""
    generator = np.random.default_rng(0)
    for split, number in (("train", count), ("test", count)):
        rows = []
        for place in range(number):
            words = generator.choice(["good", "bad", "fine", "poor"], 4)
            level = sum(word in ("good", "fine") for word in words) - 2

            def people(raters, level=level):
                own = generator.normal(0, 0.7, raters)  # what a person adds to each attribute
                values = [np.rint(3 + level * at + own).clip(1, 5).astype(int).tolist() for at in (1, 0.5, -0.5)]
                return dict(zip(READERS, values, strict=True))

            text = f"{' '.join(words)} {split} {place}"
            rows.append({"text": text, "ratings": people(5), "writer_view": people(4)})
        with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def test_people_of_either_side_are_different_people(tmp_path):
    first = read_texts(write_ratings(tmp_path), "train")[0]
    assert first.ratings.keys() == {*READERS, *WRITERS}
    assert {len(ratings) for ratings in first.ratings.values()} == {9}
    assert all(first.ratings[name][5:] == [None] * 4 for name in READERS)
    assert all(first.ratings[name][:5] == [None] * 5 for name in WRITERS)
    by_person = zip(*(first.ratings[name][:5] for name in READERS), strict=True)
    assert means_of(first) == [pytest.approx(sum(ratings) / 3) for ratings in by_person]


def test_a_row_without_a_text_is_left_out_before_anything_is_trained(tmp_path, capsys):
    with gzip.open(write_ratings(tmp_path) / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows[3]["text"] = float("nan")  # as the data have one
    with gzip.open(tmp_path / "test.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert [rated.text for rated in read_texts(tmp_path, "test")] == [row["text"] for row in rows if row != rows[3]]
    assert "test: row 3 has no text (nan) and is left out" in capsys.readouterr().err


def test_the_same_texts_in_another_order(tmp_path):
    texts = read_texts(write_ratings(tmp_path), "train")
    drawn = [draw_pairs(texts, 20, seed) for seed in (0, 1)]
    of_seeds = [{rated.text for pair in pairs for rated in pair} for pairs in drawn]
    assert of_seeds[0] == of_seeds[1] and len(of_seeds[0]) == 40
    assert drawn[0] != drawn[1]
    with pytest.raises(ValueError, match="--pairs 31 needs 62 texts, and there are 60"):
        draw_pairs(texts, 31, 0)


def test_rows_say_what_people_said(tmp_path):
    texts = read_texts(write_ratings(tmp_path), "train")
    pairs = draw_pairs(texts, 20, 0)
    (first, second), several, one = pairs[0], rated_rows(pairs, READERS)[0], rated_rows(pairs, WRITERS[:1])[0]
    assert several["chosen"] == first.text and several["rejected"] == second.text
    assert several["chosen_rating"] == {name: first.ratings[name] for name in READERS}
    assert one["rejected_rating"] == second.ratings[WRITERS[0]][5:]
    assert rows_of_means(pairs)[0]["chosen_rating"] == means_of(first)

    compared = compared_rows(pairs, 0)
    assert 0 < len(compared) <= 20 and compared[0].keys() == {"chosen", "rejected"}
    by_text = {rated.text: rated for rated in texts}

    def scores(text: str) -> list[float]:
        ratings = by_text[text].ratings
        return [ratings["valence"][person] - 0.5 * ratings["arousal"][person] for person in range(5)]

    # Somebody who read the chosen text found it better than somebody else found the other.
    assert all(max(scores(row["chosen"])) > min(scores(row["rejected"])) for row in compared)
    with_ratings = compared_rows(pairs, 0, READERS)
    assert [row["chosen"] for row in with_ratings] == [row["chosen"] for row in compared]


@pytest.mark.slow
def test_the_studies_from_end_to_end(tiny_llama_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attributes, "COST_PAIRS", 16)
    monkeypatch.setattr(attributes, "COST_REPEATS", 1)
    # Starting a process takes longer than such a training.
    monkeypatch.setattr(attributes, "in_fresh_process", lambda function, *arguments: function(*arguments))
    (tmp_path / "data").mkdir()
    command = ["ratings", "added", "cost", "--attribute_ratings", str(write_ratings(tmp_path / "data"))]
    command += ["--model", tiny_llama_dir, "--pairs", "28", "--seeds", "0", "--output", str(tmp_path / "runs")]
    attributes.main(command)
    shown = capsys.readouterr().out
    for name in READERS:
        assert f"| {name} | one attribute | -" in shown
        assert re.search(rf"\| {name} \| three attributes \| -[\d.]+ .* \| [+-][\d.]+ \([+-]", shown)
    assert "| valence, arousal |" in shown
    assert "a model of their mean" in shown
    assert re.search(r"\| difference \(95 %\) \| [+-]0\.\d{4} \(", shown)
    assert "Weights that people used: valence 1, arousal -0.5. Weights that were learned: valence" in shown
    assert "| median ratio |" in shown

    attributes.main(command[:2] + command[3:])
    assert "training on" not in capsys.readouterr().out  # all runs are finished
