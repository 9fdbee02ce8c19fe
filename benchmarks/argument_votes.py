"""People's votes on which of two arguments is more convincing, as a preference dataset.

Run as:

    python -m benchmarks.argument_votes FOLDER --pairs 2400 --output data/arguments

The votes are those of UKPConvArg1 (I. Habernal and I. Gurevych, "Which argument is more convincing?", ACL 2016, CC BY
4.0): two arguments of one side of a debate, and up to five people's votes, ties included. `FOLDER` holds
`train.jsonl.gz` and `test.jsonl.gz` with the columns `debate`, `stance`, `side`, `a`, `b` and `votes` (`"a"`, `"b"` or
`"tie"`), and `train_texts.jsonl.gz` and `test_texts.jsonl.gz` with `id` and `text`. No debate is in both splits.

`train.jsonl` and `test.jsonl` are written with a vote as a strength of preference of 1, −1 or 0, so that a row says
what each of its people said.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from disco_trl.data.columns import STRENGTH

from .downloads import read_gzipped


STRENGTHS = {"a": 1, "b": -1, "tie": 0}
BLOCK = (8, 16)
"""Arguments of a block, and pairs among them. Trained on in this order, a batch of 16 pairs has few texts."""
SUBSET_SEED = 0
"""Seed of the subset of the training pairs, which is the same for every order of it."""


def read_votes(folder: Path, split: str) -> list[dict[str, Any]]:
    """Reads the pairs of a split.

    Args:
        folder (`Path`):
            Folder of the data.
        split (`str`):
            `"train"` or `"test"`.

    Returns:
        `list[dict]`: Rows with the columns `side`, `prompt`, `chosen`, `rejected` and `preference_strength`, of which
        the chosen argument is the one that the data name first. Pairs of two equal texts are left out.

    Raises:
        `FileNotFoundError`: If a file is missing.
    """

    def lines(name: str) -> list[dict[str, Any]]:
        return read_gzipped(folder / f"{name}.jsonl.gz", "UKPConvArg1")

    texts = {row["id"]: row["text"] for row in lines(f"{split}_texts")}
    return [
        {
            "side": row["side"],
            "prompt": f"{row['debate']}\n{row['stance']}\n\n",
            "chosen": texts[row["a"]],
            "rejected": texts[row["b"]],
            STRENGTH: [STRENGTHS[vote] for vote in row["votes"]],
        }
        for row in lines(split)
        if texts[row["a"]] != texts[row["b"]]
    ]


def in_blocks(rows: list[dict[str, Any]], pairs: int, seed: int = 0) -> list[dict[str, Any]]:
    """A subset of pairs in blocks of 16 pairs among 8 arguments of one side.

    The subset does not depend on the seed, which orders its blocks. No pair occurs twice, and every argument is in a
    block before any is in another one, but for those that are left over when a side is divided by 8.

    Args:
        rows (`list[dict]`):
            Rows of [`read_votes`].
        pairs (`int`):
            Number of pairs, a multiple of 16.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.

    Returns:
        `list[dict]`: The pairs.

    Raises:
        `ValueError`: If the number is no multiple of 16, or there are too few pairs.
    """
    texts_of_block, pairs_of_block = BLOCK
    if pairs % pairs_of_block:
        raise ValueError(f"--pairs {pairs} is no multiple of {pairs_of_block}, the pairs of a block")
    generator = np.random.default_rng(SUBSET_SEED)
    left: dict[str, dict[tuple[str, str], dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        left[row["side"]][row["chosen"], row["rejected"]] = row
    texts = {side: sorted({text for pair in of_side for text in pair}) for side, of_side in left.items()}
    blocks: list[list[dict[str, Any]]] = []
    wanted = pairs // pairs_of_block
    found = True
    while found and len(blocks) < wanted:
        found = False
        for side, of_side in left.items():
            order = generator.permutation(texts[side])
            for start in range(0, len(order) - texts_of_block + 1, texts_of_block):
                among = {*order[start : start + texts_of_block].tolist()}
                inside = [pair for pair in of_side if among.issuperset(pair)]
                if len(inside) >= pairs_of_block:
                    drawn = generator.choice(len(inside), pairs_of_block, replace=False)
                    blocks.append([of_side.pop(inside[place]) for place in drawn])
                    found = True
    if len(blocks) < wanted:
        most = len(blocks) * pairs_of_block
        raise ValueError(f"--pairs {pairs}: the data have blocks for {most} pairs only; ask for fewer")
    blocks = blocks[:wanted]
    return [row for place in np.random.default_rng(seed).permutation(wanted) for row in blocks[place]]


def main(argv: list[str] | None = None) -> None:
    """Writes `train.jsonl` and `test.jsonl` as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.argument_votes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="Folder of the votes and the texts.")
    parser.add_argument("--pairs", type=int, default=2400, help="Number of training pairs (default: %(default)s).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the order of the pairs (default: %(default)s).")
    parser.add_argument("--output", type=Path, required=True, help="Folder for train.jsonl and test.jsonl.")
    args = parser.parse_args(argv)
    rows = {
        "train": in_blocks(read_votes(args.folder, "train"), args.pairs, args.seed),
        "test": read_votes(args.folder, "test"),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for name, of_split in rows.items():
        path = args.output / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for row in of_split:
                written = {column: value for column, value in row.items() if column != "side"}
                file.write(json.dumps(written, ensure_ascii=False) + "\n")
        print(f"{path}: {len(of_split):,} pairs")


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
