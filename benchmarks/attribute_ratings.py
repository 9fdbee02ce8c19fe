"""People's ratings of three attributes of a text, as preference datasets.

The ratings are those of EmoBank (S. Buechel and U. Hahn, "EmoBank: Studying the impact of annotation perspective and
representation format on dimensional emotion analysis", EACL 2017, CC BY-SA 4.0): valence, arousal and dominance of a
sentence from 1 to 5, by five people or more as its reader, and by others from its writer's side. A folder holds
`train.jsonl.gz` and `test.jsonl.gz` with the columns `text`, and `ratings` and `writer_view`, which have a list of
ratings for each attribute, in the same order of people.

This module has no command line; `benchmarks.attributes` uses it.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from .downloads import read_gzipped


READERS = ("valence", "arousal", "dominance")
WRITERS = tuple(f"writer's {name}" for name in READERS)
CHOICE_WEIGHTS = {"valence": 1.0, "arousal": -0.5}
"""What a person prefers in the simulated comparisons: the text with the larger sum of their own ratings."""
SUBSET_SEED = 0
"""Seed of the subset of the training texts, which is the same for every order of it."""


@dataclass(frozen=True)
class Rated:
    """A text and its ratings.

    Attributes:
        text (`str`):
            The text.
        ratings (`dict[str, list[float | None]]`):
            Ratings by attribute, of the same people in the same order: readers first, then people who took the
            writer's side. A person has none of the attributes of the other side.
    """

    text: str
    ratings: dict[str, list[float | None]]

    def of_person(self, person: int, weights: dict[str, float]) -> float:
        """The weighted sum of a reader's ratings."""
        return sum(weight * (self.ratings[name][person] or 0.0) for name, weight in weights.items())

    @property
    def readers(self) -> int:
        """How many people rated it as its readers."""
        return sum(rating is not None for rating in self.ratings[READERS[0]])


def read_texts(folder: Path, split: str) -> list[Rated]:
    """Reads the texts of a split.

    Args:
        folder (`Path`):
            Folder of the data.
        split (`str`):
            `"train"` or `"test"`.

    Returns:
        `list[Rated]`: The texts, each once. Rows without a text (one, in the test split) are left out, and named.

    Raises:
        `FileNotFoundError`: If the file is missing.
    """
    found: dict[str, Rated] = {}
    for number, row in enumerate(read_gzipped(folder / f"{split}.jsonl.gz", "EmoBank")):
        if not isinstance(row["text"], str):
            print(f"{split}: row {number} has no text ({row['text']!r}) and is left out", file=sys.stderr)
            continue
        readers = len(row["ratings"][READERS[0]])
        writers = len(row["writer_view"][READERS[0]])
        ratings = {name: row["ratings"][name] + [None] * writers for name in READERS}
        ratings |= {
            of_writer: [None] * readers + row["writer_view"][name]
            for name, of_writer in zip(READERS, WRITERS, strict=True)
        }
        found.setdefault(row["text"], Rated(row["text"], ratings))
    return list(found.values())


def draw_pairs(texts: Sequence[Rated], pairs: int, seed: int) -> list[tuple[Rated, Rated]]:
    """Pairs of texts, each of which is in one pair.

    Args:
        texts (`Sequence[Rated]`):
            Texts of a split.
        pairs (`int`):
            Number of pairs.
        seed (`int`):
            Seed of who is paired with whom, and of the order. Which texts are drawn does not depend on it.

    Returns:
        `list[tuple[Rated, Rated]]`: The pairs.

    Raises:
        `ValueError`: If there are too few texts.
    """
    if 2 * pairs > len(texts):
        raise ValueError(f"--pairs {pairs} needs {2 * pairs} texts, and there are {len(texts)}; ask for fewer")
    drawn = np.random.default_rng(SUBSET_SEED).permutation(len(texts))[: 2 * pairs]
    order = np.random.default_rng(seed).permutation(drawn).reshape(-1, 2)
    return [(texts[first], texts[second]) for first, second in order.tolist()]


def rated_rows(pairs: Sequence[tuple[Rated, Rated]], attributes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows in which nobody compared the two texts, and people rated attributes of each.

    Args:
        pairs (`Sequence[tuple[Rated, Rated]]`):
            Pairs of texts.
        attributes (`Sequence[str]`):
            Attributes. A single one is what the reward is about, and has no name.

    Returns:
        `list[dict]`: Rows of a preference dataset.
    """

    def ratings_of(rated: Rated) -> Any:
        given = {name: rated.ratings[name] for name in attributes}
        if len(given) > 1:
            return given
        (of_one,) = given.values()
        return [rating for rating in of_one if rating is not None]

    return [
        {
            **{"chosen": first.text, "rejected": second.text, "chosen_votes": 0, "rejected_votes": 0},
            **{"chosen_rating": ratings_of(first), "rejected_rating": ratings_of(second)},
        }
        for first, second in pairs
    ]


def rows_of_means(pairs: Sequence[tuple[Rated, Rated]]) -> list[dict[str, Any]]:
    """The same rows with one number from each reader: the mean of their ratings of the three attributes."""
    return [
        {
            **{"chosen": first.text, "rejected": second.text, "chosen_votes": 0, "rejected_votes": 0},
            **{"chosen_rating": means_of(first), "rejected_rating": means_of(second)},
        }
        for first, second in pairs
    ]


def means_of(rated: Rated) -> list[float]:
    """Each reader's mean of their ratings of the three attributes."""
    columns = [rated.ratings[name][: rated.readers] for name in READERS]
    return [fmean(rating or 0.0 for rating in of_person) for of_person in zip(*columns, strict=True)]


def compared_rows(
    pairs: Sequence[tuple[Rated, Rated]], seed: int, attributes: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Rows in which one reader of each text says how good it is overall (`CHOICE_WEIGHTS`). The better is chosen.

    Args:
        pairs (`Sequence[tuple[Rated, Rated]]`):
            Pairs of texts. Those that the two people find equal are left out.
        seed (`int`):
            Seed of the people.
        attributes (`Sequence[str]`, *optional*):
            Attributes that are rated as well. By default none.

    Returns:
        `list[dict]`: Rows of a preference dataset.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for pair in pairs:
        scores = [rated.of_person(int(generator.integers(rated.readers)), CHOICE_WEIGHTS) for rated in pair]
        if scores[0] == scores[1]:
            continue
        chosen, rejected = pair if scores[0] > scores[1] else pair[::-1]
        row: dict[str, Any] = {"chosen": chosen.text, "rejected": rejected.text}
        rows.append(row)
        if attributes:
            row |= {
                "chosen_rating": {name: chosen.ratings[name] for name in attributes},
                "rejected_rating": {name: rejected.ratings[name] for name in attributes},
            }
    return rows
