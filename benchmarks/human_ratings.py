"""People's ratings of texts as a preference dataset.

Run as:

    python -m benchmarks.human_ratings --source tweets --votes 3000 --output data/tweets
    python -m benchmarks.human_ratings --said grades --rated 0.1 --votes 2400 --output data/graded-tweets

This writes `train.jsonl` and `test.jsonl`, with one JSON object per line. What people say is drawn from their ratings:
who wins, how much better the winner is (`--said grades`), or the ratings themselves.

The ratings are those of Hutto & Gilbert (2014), "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
Social Media Text" (MIT licence), as PyPI has them: 4,200 tweets and 10,605 sentences of film reviews, each with the
raw ratings, from -4 to 4, of 15 to 99 people. Votes usually come from an unknown distribution; here it is known.
"""

import argparse
import ast
import hashlib
import io
import json
import re
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from disco_trl.data.columns import STRENGTH

from .downloads import Release, fetch


RATINGS = Release(
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
RATINGS_MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SOURCES = {"tweets": "hutto_ICWSM_2014/tweets", "movies": "hutto_ICWSM_2014/movieReviewSnippets"}

GRADES = {1: "slightly better", 2: "clearly better", 3: "much better"}
FROM_POINTS = (1, 2, 4)
"""Smallest difference of two ratings, in points, that is said as each of the [`GRADES`]. Without any difference the
texts are equally good, which is the strength 0."""
RATINGS_OF_A_TEXT = (3, 5)
"""Fewest and most people who rate a text in [`rate_some`]."""


@dataclass(frozen=True)
class RatedText:
    """A text with people's ratings.

    Attributes:
        text (`str`):
            The text.
        ratings (`np.ndarray` of shape `(raters,)`):
            One whole number from -4 to 4 for each person.
    """

    text: str
    ratings: np.ndarray


def parse_ratings(archive: bytes, stem: str) -> list[RatedText]:
    """Reads rated texts from the archive of ratings.

    The texts are in `<stem>_GroundTruth.txt` (id, mean, text), their ratings in `<stem>_anonDataRatings.txt` (id,
    mean, standard deviation, list of ratings). Rows with the same text are merged.

    Args:
        archive (`bytes`):
            Gzipped tar archive.
        stem (`str`):
            Start of the names of both files.

    Returns:
        `list[RatedText]`: Texts with their ratings.

    Raises:
        `ValueError`: If a file is missing, or ratings have no text.
    """

    def rows(member: str, columns: int) -> list[list[str]]:
        # Members are read and never extracted: a path in an archive may point anywhere.
        file = tar.extractfile(member)
        if file is None:
            raise ValueError(f"{member} is not a file in the archive of ratings")
        # Not `splitlines()`, which also splits at control characters that a text may contain.
        lines = file.read().decode("utf-8-sig").split("\n")
        return [line.rstrip("\r").split("\t", columns - 1) for line in lines if line.strip()]

    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        texts = {row_id: text.strip() for row_id, _, text in rows(f"{stem}_GroundTruth.txt", 3)}
        ratings_by_text: dict[str, list[int]] = {}
        for row_id, _, _, ratings in rows(f"{stem}_anonDataRatings.txt", 4):
            if row_id not in texts:
                raise ValueError(f"{stem}_anonDataRatings.txt: row {row_id!r} has ratings but no text")
            ratings_by_text.setdefault(texts[row_id], []).extend(ast.literal_eval(ratings))
    return [RatedText(text, np.array(ratings)) for text, ratings in ratings_by_text.items()]


def load_ratings(source: str = "tweets") -> list[RatedText]:
    """Loads the rated texts of a source.

    Args:
        source (`str`, *optional*, defaults to `"tweets"`):
            `"tweets"` or `"movies"`.

    Returns:
        `list[RatedText]`: Texts with their ratings.

    Raises:
        `ConnectionError` or `ValueError`: If the archive cannot be downloaded or verified, see [`fetch`].
    """
    with tarfile.open(fetch(RATINGS), mode="r:gz") as sdist:
        file = sdist.extractfile(RATINGS_MEMBER)
        assert file is not None  # guaranteed by the checksum
        return parse_ratings(file.read(), SOURCES[source])


def split_by_text(
    rated: list[RatedText], test_fraction: float = 0.2, seed: int = 0
) -> tuple[list[RatedText], list[RatedText]]:
    """Splits texts into training and test texts.

    The split of a text depends on a hash of the text alone, neither on the order of the rows nor on the other texts.
    Texts that differ only in case, punctuation or spaces are in the same split.

    Args:
        rated (`list[RatedText]`):
            Texts to split.
        test_fraction (`float`, *optional*, defaults to `0.2`):
            Expected share of test texts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the hash.

    Returns:
        `tuple[list[RatedText], list[RatedText]]`: Training and test texts.
    """
    train: list[RatedText] = []
    test: list[RatedText] = []
    for row in rated:
        words = re.sub(r"\W+", " ", row.text.casefold()).strip()
        digest = hashlib.sha256(f"{seed}:{words}".encode()).digest()
        is_test = int.from_bytes(digest[:8]) < test_fraction * 2**64
        (test if is_test else train).append(row)
    return train, test


def draw_votes(rated: list[RatedText], votes: int, seed: int) -> np.ndarray:
    """Draws single votes.

    Each vote draws two different texts uniformly and one rating of each, uniformly; the text with the higher rating
    wins. Equal ratings are dropped and not counted. With the same seed, fewer votes are a prefix of more.

    Args:
        rated (`list[RatedText]`):
            Texts to vote on.
        votes (`int`):
            Number of votes.
        seed (`int`):
            Seed of the draws.

    Returns:
        `np.ndarray` of shape `(votes, 2)`: Indices into `rated` of the winner and the loser.
    """
    if len({row.ratings.min() for row in rated} | {row.ratings.max() for row in rated}) < 2:
        raise ValueError("every rating is the same, so no vote has a winner")
    generator = np.random.default_rng(seed)
    counts = np.array([len(row.ratings) for row in rated])
    starts = np.cumsum(counts) - counts
    ratings = np.concatenate([row.ratings for row in rated])
    drawn: list[np.ndarray] = []
    while sum(map(len, drawn)) < votes:
        block = 4096  # fixed, so that the first votes of a seed do not depend on how many are asked for
        first = generator.integers(len(rated), size=block)
        second = (first + generator.integers(1, len(rated), size=block)) % len(rated)
        pairs = np.stack([first, second], axis=1)
        rating = ratings[starts[pairs] + generator.integers(counts[pairs])]
        pairs = np.where(rating[:, :1] > rating[:, 1:], pairs, pairs[:, ::-1])
        drawn.append(pairs[rating[:, 0] != rating[:, 1]])
    return np.concatenate(drawn)[:votes]


def win_probability(rated: list[RatedText], pairs: np.ndarray) -> np.ndarray:
    """Probability that a vote on a pair of texts goes to the first, under the protocol of [`draw_votes`].

    It is computed from the ratings that votes are drawn from and is therefore the noise ceiling: no model can predict
    the votes better.

    Args:
        rated (`list[RatedText]`):
            Texts to vote on.
        pairs (`np.ndarray` of shape `(pairs, 2)`):
            Indices into `rated`.

    Returns:
        `np.ndarray` of shape `(pairs,)`: The probabilities.
    """
    values = np.arange(-4, 5)
    shares = np.stack([(row.ratings[:, None] == values).mean(axis=0) for row in rated])
    first, second = shares[pairs[:, 0]], shares[pairs[:, 1]]
    is_higher = np.tril(np.ones((len(values), len(values))), k=-1)
    wins = ((first @ is_higher) * second).sum(axis=1)
    losses = ((second @ is_higher) * first).sum(axis=1)
    return wins / (wins + losses)


def as_preferences(rated: list[RatedText], votes: np.ndarray) -> list[dict[str, Any]]:
    """Converts votes of shape `(votes, 2)` to rows of a preference dataset, with the columns `chosen`, `rejected`."""
    return [{"chosen": rated[winner].text, "rejected": rated[loser].text} for winner, loser in votes]


def draw_judged_pairs(
    rated: list[RatedText],
    pairs: int,
    kind: str,
    seed: int,
    judgements: int = 10,
    block: tuple[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Draws pairs of texts with judgements, as rows of a preference dataset.

    Each row draws two different texts uniformly. For `"choices"` and `"votes"` one rating of each is drawn uniformly,
    repeatedly, until one vote, or `judgements` votes, have a winner, as in [`draw_votes`]. For `"grades"` one rating
    of each is drawn, and their difference is said as a strength of preference ([`strength_of`]), ties included. The
    chosen text is the one with the higher rating; the sides of a tie are in the order of the draw, which is random.
    For `"ratings"`, `judgements` ratings of each text are drawn without replacement (all, if it has fewer), and the
    texts are not compared.

    Args:
        rated (`list[RatedText]`):
            Texts to draw from.
        pairs (`int`):
            Number of rows.
        kind (`str`):
            `"choices"`, `"votes"`, `"grades"` or `"ratings"`.
        seed (`int`):
            Seed of all draws.
        judgements (`int`, *optional*, defaults to `10`):
            Number of votes on a pair, or of ratings of a text.
        block (`tuple[int, int]`, *optional*, defaults to `None`):
            Numbers of texts and pairs in a block. The texts of a block are drawn first, then the pairs among them.
            Every text occurs in one block before any occurs again. Trained on in this order, a batch of many pairs
            contains few texts.

    Returns:
        `list[dict]`: The rows.
    """
    generator = np.random.default_rng(seed)
    texts_of_block, pairs_of_block = block or (len(rated), pairs)
    rows: list[dict[str, Any]] = []
    waiting = np.array([], dtype=int)
    while len(rows) < pairs:
        if len(waiting) < texts_of_block:
            waiting = generator.permutation(len(rated))
        texts, waiting = waiting[:texts_of_block], waiting[texts_of_block:]
        end = min(len(rows) + pairs_of_block, pairs)
        while len(rows) < end:
            first, second = (rated[index] for index in generator.choice(texts, 2, replace=False))
            if kind == "ratings":
                drawn = [generator.permutation(text.ratings)[:judgements].tolist() for text in (first, second)]
                said: dict[str, Any] = {"chosen_votes": 0, "rejected_votes": 0}
                said |= {"chosen_rating": drawn[0], "rejected_rating": drawn[1]}
            elif kind == "grades":
                a, b = (generator.choice(text.ratings) for text in (first, second))
                first, second = (first, second) if a >= b else (second, first)
                said = {STRENGTH: strength_of(abs(a - b))}
            else:
                if len({*first.ratings, *second.ratings}) < 2:
                    continue  # No vote on this pair would ever have a winner.
                wins = losses = 0
                while wins + losses < (1 if kind == "choices" else judgements):
                    a, b = (generator.choice(text.ratings) for text in (first, second))
                    wins, losses = wins + int(a > b), losses + int(a < b)
                said = {"chosen_votes": wins, "rejected_votes": losses}
                if kind == "choices":
                    first, second, said = (first, second, {}) if wins else (second, first, {})
            rows.append({"chosen": first.text, "rejected": second.text, **said})
    return rows


def strength_of(points: float) -> int:
    """How much better a text is said to be that is rated this much higher: 0, or one of the [`GRADES`]."""
    return int(np.searchsorted(FROM_POINTS, points, side="right"))


def rate_some(rows: list[dict[str, Any]], rated: list[RatedText], share: float, seed: int = 0) -> list[dict[str, Any]]:
    """The same comparisons, with ratings of some of their texts beside them.

    The share is one of what people read: a comparison takes two texts, and a rating takes one. A text that is rated is
    rated by 3 to 5 people, drawn without replacement, and its ratings stand in one row only, so that they count once
    however often the text is compared. The other rows have `None` in their place.

    Args:
        rows (`list[dict]`):
            Comparisons with the columns `chosen` and `rejected`.
        rated (`list[RatedText]`):
            Their texts.
        share (`float`):
            Largest share of the reading that ratings take, from 0 to below 1.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        `list[dict]`: The rows with the columns `chosen_rating` and `rejected_rating`.

    Raises:
        `ValueError`: If the rows have too few texts for that many ratings.
    """
    if not 0 <= share < 1:
        raise ValueError(f"a share of {share} of the reading for ratings is not from 0 to below 1")
    generator = np.random.default_rng(seed)
    ratings_of = {row.text: row.ratings for row in rated}
    fewest, most = RATINGS_OF_A_TEXT
    left = int(share / (1 - share) * 2 * len(rows))
    sides = ("chosen", "rejected")
    result = [{**row, **{f"{side}_rating": None for side in sides}} for row in rows]
    seen: set[str] = set()
    for place in generator.permutation(2 * len(rows)):
        if left < fewest:
            return result
        row, side = result[place // 2], sides[place % 2]
        text = row[side]
        if text not in seen:
            seen.add(text)
            raters = min(generator.integers(fewest, most + 1), left)
            row[f"{side}_rating"] = generator.permutation(ratings_of[text])[:raters].tolist()
            left -= len(row[f"{side}_rating"])
    if left < fewest:
        return result
    raise ValueError(
        f"the {len(rows):,} comparisons have {len(seen):,} texts, too few to spend {share:.0%} of the reading on "
        f"{fewest} to {most} ratings a text; rate a smaller share"
    )


def randomize_strengths(rows: list[dict[str, Any]], share: float, seed: int = 0) -> list[dict[str, Any]]:
    """The same graded comparisons with the strength of a random share of them drawn uniformly from the [`GRADES`], as
    if by people who do not care how much better a text is. Who wins, and ties, stay as they are.
    """
    generator = np.random.default_rng(seed)
    is_random = generator.permutation(len(rows)) < share * len(rows)
    drawn = generator.choice([*GRADES], len(rows)).tolist()
    return [
        {**row, STRENGTH: strength} if change and row[STRENGTH] else row
        for row, change, strength in zip(rows, is_random, drawn, strict=True)
    ]


def grade_some(rows: list[dict[str, Any]], share: float, seed: int = 0) -> list[dict[str, Any]]:
    """The same comparisons of which a random share only is graded. Of the others the column `tie` tells whether they
    are a tie.
    """
    generator = np.random.default_rng(seed)
    is_graded = generator.permutation(len(rows)) < share * len(rows)
    return [
        {**row, "tie": None} if graded else {**row, STRENGTH: None, "tie": row[STRENGTH] == 0}
        for row, graded in zip(rows, is_graded, strict=True)
    ]


def reverse_some(rated: list[RatedText], share: float, seed: int = 0) -> list[RatedText]:
    """The same texts with a random share of each text's ratings negated: a divided audience."""
    generator = np.random.default_rng(seed)
    divided = []
    for row in rated:
        is_reversed = generator.permutation(len(row.ratings)) < share * len(row.ratings)
        divided.append(RatedText(row.text, np.where(is_reversed, -row.ratings, row.ratings)))
    return divided


def flip_some(rows: list[dict[str, Any]], share: float, seed: int = 0) -> list[dict[str, Any]]:
    """The same forced choices with winner and loser exchanged in a random share of them."""
    generator = np.random.default_rng(seed)
    other = {"chosen": "rejected", "rejected": "chosen"}
    is_flipped = generator.permutation(len(rows)) < share * len(rows)
    return [
        {other.get(name, name): value for name, value in row.items()} if flip else row
        for row, flip in zip(rows, is_flipped, strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    """Writes `train.jsonl` and `test.jsonl` as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.human_ratings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--source", choices=SOURCES, default="tweets", help="Texts to draw from (default: %(default)s)."
    )
    parser.add_argument(
        "--said",
        choices=("choices", "votes", "grades", "ratings"),
        default="choices",
        help="Judgements of a training pair: a forced choice, 10 votes, how much better one text is than the other, "
        "or 10 ratings of each text (default: %(default)s).",
    )
    parser.add_argument(
        "--votes",
        type=int,
        default=3000,
        help="Number of pairs to draw among the training texts (default: %(default)s).",
    )
    parser.add_argument(
        "--block",
        type=int,
        nargs=2,
        metavar=("TEXTS", "PAIRS"),
        help="Draw the pairs in blocks: PAIRS pairs among TEXTS texts at a time.",
    )
    parser.add_argument(
        "--rated",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="Share of the reading that is spent on 3 to 5 ratings of single texts, beside the comparisons; a "
        "comparison reads two texts (default: %(default)s).",
    )
    parser.add_argument(
        "--graded",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="Share of the comparisons of `--said grades` that is graded; the others tell who won, or that it is a "
        "tie (default: %(default)s).",
    )
    parser.add_argument(
        "--random_strengths",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="Share of the comparisons of `--said grades` whose strength is random (default: %(default)s).",
    )
    parser.add_argument(
        "--development",
        action="store_true",
        help="Split the training texts once more and leave the test texts alone, to choose settings.",
    )
    parser.add_argument(
        "--flipped",
        type=float,
        default=0.0,
        help="Share of the training choices whose winner and loser are exchanged (default: %(default)s).",
    )
    parser.add_argument(
        "--reversed",
        type=float,
        default=0.0,
        help="Share of each text's ratings whose sign is reversed (default: %(default)s).",
    )
    parser.add_argument(
        "--test_votes",
        type=int,
        default=30_000,
        help="Number of votes to draw among the test texts, with seed 0 (default: %(default)s).",
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the training votes (default: %(default)s).")
    parser.add_argument("--output", type=Path, required=True, help="Folder for train.jsonl and test.jsonl.")
    args = parser.parse_args(argv)
    if args.flipped and args.said != "choices":
        parser.error("--flipped exchanges the sides of forced choices; leave it out, or pass --said choices")
    if (args.graded < 1 or args.random_strengths) and args.said != "grades":
        parser.error("--graded and --random_strengths are about strengths; leave them out, or pass --said grades")
    if args.rated and args.said == "ratings":
        parser.error("--rated goes beside comparisons, and --said ratings has none; leave one of the two out")

    rated = load_ratings(args.source)
    train, test = split_by_text(reverse_some(rated, args.reversed) if args.reversed else rated)
    if args.development:
        train, test = split_by_text(train, seed=1)
    if args.said == "choices" and not args.block:
        rows: list[dict[str, Any]] = as_preferences(train, draw_votes(train, args.votes, args.seed))
    else:
        rows = draw_judged_pairs(train, args.votes, args.said, args.seed, block=args.block)
    rows = flip_some(rows, args.flipped, args.seed)
    if args.random_strengths:
        rows = randomize_strengths(rows, args.random_strengths, args.seed)
    if args.graded < 1:
        rows = grade_some(rows, args.graded, args.seed)
    if args.rated:
        rows = rate_some(rows, train, args.rated, args.seed)
    votes = draw_votes(test, args.test_votes, seed=0)
    held_out = [
        {**row, "chosen_rating": test[winner].ratings.tolist(), "rejected_rating": test[loser].ratings.tolist()}
        for row, (winner, loser) in zip(as_preferences(test, votes), votes, strict=True)
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    for name, written, texts in (("train", rows, train), ("test", held_out, test)):
        path = args.output / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
        print(f"{path}: {len(written):,} pairs among {len(texts):,} texts")


if __name__ == "__main__":
    try:
        main()
    except (ConnectionError, ValueError) as error:
        sys.exit(str(error))
