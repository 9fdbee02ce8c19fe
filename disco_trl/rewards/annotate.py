"""A location, a scale and a reward for every answer of a dataset.

[`Annotator`] scores a list of rows, `map_dataset` a `datasets` object (this is `DiscoReward.map`), and
`annotate_file`, behind `disco-trl score`, any number of rows, so that a killed run goes on where it was.

`annotate_file` works in parts of a few hundred rows. The scores of each part, numbers alone, are a file of their own
in `OUT.parts`, which appears when it is complete. At the end the data are read once more and written with their scores
beside them. Several processes (`accelerate launch -m disco_trl score DATA ...`) share the parts.

Neither the process that scores a part nor the run in which it does changes its batches, or what is drawn for the
transform `"sample"`: the result is the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, IterableDataset, Value
from transformers.utils import logging

from ..data.columns import TEMPLATE_COLUMNS, TEXT_PAIR, Layout, find_layout
from ..data.contents import check_contents
from ..data.files import (
    NO_SPACE,
    ROWS_AT_ONCE,
    RowWriter,
    as_json,
    check_output,
    chunks,
    locked,
    parquet_features,
    refuse_clash,
    written_at_once,
)
from ..data.records import FORCED_CHOICE, Record, read_answers
from ..data.tokenization import tokenize_record
from ..data.values import BadRow, Row
from ..distributions.families import Family
from ..distributions.transforms import Sample, Transform
from ..models.distributed import process_state
from ..models.inference import check_sequences, score_by_attribute
from ..models.reward_view import RewardView


def find_answers(row: Row) -> Layout:
    """
    Infer the dataset type, one of those in TRL's documentation, from the columns of a row.

    Args:
        row (`dict`):
            First row of the data.

    Returns:
        [`~disco_trl.data.columns.Layout`]: Where the answers are.

    Raises:
        `ValueError`: If there are none, or they are not whole; with the fix.
    """
    layout = find_layout(row, singles=True)
    names = row.keys()
    if names >= {*layout.columns}:
        return layout
    there = ", ".join(map(repr, names))
    if "candidates" in names or ("completions" in names and "labels" not in names):
        fix = "to rank several answers to each prompt use `disco-trl best-of-n`"
    elif "completions" in names:
        fix = "join the steps of each row into one column 'completion'"
    elif "prompt" in names:
        fix = "a prompt alone has no answer to score: add its answer as 'completion'"
    else:
        fix = (
            "rename the columns to 'chosen' and 'rejected' (with 'prompt'), 'prompt' and 'completion', 'messages', "
            "'text', or 'chosen_ids' and 'rejected_ids'"
        )
    raise ValueError(f"row 0: no column holds answers (there are {there}); {fix}")


def read_checked(row: Row, layout: Layout, number: int) -> Record:
    """
    Read the answers of a row, which may be a single one. What people said about them does not matter to a score.

    Args:
        row (`dict`):
            Row of the data.
        layout ([`~disco_trl.data.columns.Layout`]):
            Where the answers are.
        number (`int`):
            Number of the row, for the error.

    Returns:
        [`~disco_trl.data.records.Record`]: The answers.

    Raises:
        `ValueError`: If the row has no sound answers; it names row, column and fix.
    """
    # Columns for the chat template may be empty, since TRL does not read them here. A prompt may not, even where a
    # file leaves it out of some rows: the answer alone would get another reward.
    row = {name: value for name, value in row.items() if name not in TEMPLATE_COLUMNS or value is not None}
    if layout.has_prompt:
        row = {"prompt": None, **row}
    record = read_answers(row, layout, FORCED_CHOICE)
    try:
        check_contents(list(zip(record.columns, record.answers, strict=True)), row, record.kind, layout.takes_prompt)
    except BadRow as error:
        raise ValueError(f"row {number}, {error}") from error
    return record


class Rewarder(Protocol):
    """What an [`Annotator`] needs of a `DiscoReward`."""

    model: Any
    processing_class: Any
    family: Family
    transform: Transform
    tokens_per_batch: int
    view: RewardView

    @property
    def has_location_error(self) -> bool:
        """Whether its rewards have a `location_error`."""


class Annotator:
    """
    Scores the answers of rows.

    Args:
        reward ([`Rewarder`]):
            Model with its tokenizer and token budget.
        transform ([`~disco_trl.distributions.transforms.Transform`], *optional*):
            What the reward is, by default that of `reward`.
        prefix (`str`, *optional*, defaults to `""`):
            Put before the names of the new columns.
        all_attributes (`bool`, *optional*, defaults to `False`):
            Whether to add the location and the scale for each attribute that the model knows.

    Raises:
        `ValueError`: If the transform does not exist for the model's family, or needs all answers to a prompt at once,
            or if the model knows no attributes and all are asked for.
    """

    def __init__(
        self, reward: Rewarder, transform: Transform | None = None, prefix: str = "", all_attributes: bool = False
    ):
        self.reward = reward
        self.transform = transform or reward.transform
        self.prefix = prefix
        self.attributes = tuple(reward.model.attributes) if all_attributes else ()
        if all_attributes and not self.attributes:
            raise ValueError("all_attributes: the model knows no attributes beside its overall reward; leave it out")
        self.transform.check_family(reward.family.name)
        if self.transform.needs_groups:
            raise ValueError(
                f"transform {self.transform.name!r} compares all the answers to one prompt, and rows are scored a few "
                "at a time, wherever in the data the other answers stand; put the answers to a prompt into one row "
                "and use `disco-trl best-of-n`, or choose another transform"
            )

    def column_names(self, layout: Layout) -> list[str]:
        """
        Names of the columns that are added.

        Args:
            layout ([`~disco_trl.data.columns.Layout`]):
                Where the answers are.

        Returns:
            `list[str]`: `location`, `scale`, `location_error` where the model has one, `reward_TRANSFORM`, and
            `location_NAME` and `scale_NAME` of each attribute, if they are asked for. For pairs each comes twice, with
            `_chosen` and `_rejected` after it, and `prob_chosen` is P(chosen ≻ rejected).

        Raises:
            `ValueError`: If an attribute has a name that makes two columns of one name.
        """
        error = ["location_error"] if self.reward.has_location_error else []
        names = ["location", "scale", *error, f"reward_{self.transform.name}"]
        names += [f"{kind}_{name}" for name in self.attributes for kind in ("location", "scale")]
        if len({*names}) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(
                f"two columns would be named {twice!r}, one of them after an attribute; leave out all_attributes"
            )
        if layout.is_pair:
            names = [f"{name}_{side}" for name in names for side in TEXT_PAIR] + ["prob_chosen"]
        return [self.prefix + name for name in names]

    def __call__(self, rows: list[Row], layout: Layout, first: int = 0) -> dict[str, list[float]]:
        """
        Score B rows.

        Args:
            rows (`list[dict]`):
                The rows.
            layout ([`~disco_trl.data.columns.Layout`]):
                Where their answers are.
            first (`int`, *optional*, defaults to `0`):
                Position of the first of them in the data, for messages, and for the draws of `"sample"`.

        Returns:
            `dict[str, list[float]]`: For each of `column_names` its B values.

        Raises:
            `ValueError`: If something is wrong with a row.
            `FloatingPointError`: If a reward is not finite. Both name the row.
        """
        sequences: list[list[int]] = []
        for number, row in enumerate(rows, start=first):
            record = read_checked(row, layout, number)
            try:
                sequences += map(list, tokenize_record(record, self.reward.processing_class))
            except ValueError as refusal:
                places = " or ".join(map(repr, layout.columns))
                raise ValueError(f"row {number}, column {places}: {refusal}; drop the row, or fix it") from refusal
        sides = len(layout.columns)
        if [] in sequences:
            number, side = divmod(sequences.index([]), sides)
            raise ValueError(
                f"row {first + number}, column {layout.columns[side]!r}: no tokens; drop the row, or "
                "check the chat template"
            )
        for position, sequence in enumerate(sequences):
            try:
                check_sequences(self.reward.model, [sequence])
            except ValueError as refusal:
                number, side = divmod(position, sides)
                reason = str(refusal).removeprefix("sequence 0 ")
                raise ValueError(f"row {first + number}, column {layout.columns[side]!r}: it {reason}") from refusal
        found = score_by_attribute(self.reward.model, sequences, self.reward.tokens_per_batch)
        distribution = self.reward.view.read(self.reward.model, found)
        bad = torch.nonzero(~(distribution.location.isfinite() & distribution.scale.isfinite())).flatten().tolist()
        if bad:
            raise FloatingPointError(
                f"row {first + bad[0] // sides}, column {layout.columns[bad[0] % sides]!r}: the reward is not finite "
                f"({len(bad)} such answers among {len(sequences)}); load the model with --dtype bfloat16 or float32"
            )
        transform = self.transform
        if isinstance(transform, Sample):
            # A stream of its own for each part, or a part's draws would depend on what was scored before it.
            transform = dataclasses.replace(transform, seed=(transform.seed + 1_000_003 * first) % 2**63)
        error = [] if distribution.location_error is None else [distribution.location_error]
        values = [distribution.location, distribution.scale, *error, transform(distribution)]
        for name in self.attributes:
            values += [found.of_attribute(name).location, found.of_attribute(name).scale]
        columns = [value[side::sides] for value in values for side in range(sides)]
        if layout.is_pair:
            columns.append(distribution[0::2].prob_greater(distribution[1::2]))
        return dict(zip(self.column_names(layout), (column.tolist() for column in columns), strict=True))

    def settings(self) -> dict[str, Any]:
        """All that the scores depend on besides the rows. Model and tokenizer are described by a digest."""
        tokenizer = self.reward.processing_class
        described = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tokenizer.special_tokens_map]
        return {
            "model": _digest_of_weights(self.reward.model),
            "tokenizer": hashlib.blake2b(json.dumps(described, default=str).encode(), digest_size=16).hexdigest(),
            "family": self.reward.family.name,
            "transform": {"name": self.transform.name, **dataclasses.asdict(self.transform)},
            "view": dataclasses.asdict(self.reward.view),
            "prefix": self.prefix,
            "attributes": list(self.attributes),
        }


def _digest_of_weights(model: torch.nn.Module) -> str:
    """A digest of weights and their types, which does not depend on where they were loaded from or are now."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.is_meta:
            continue  # offloaded to disk
        for piece in tensor.detach().contiguous().flatten().view(torch.uint8).split(2**26):
            digest.update(piece.cpu().numpy())
    return digest.hexdigest()


def map_dataset(dataset: Dataset | IterableDataset, annotator: Annotator) -> Dataset | IterableDataset:
    """
    Add the scores of an annotator to a dataset, as `DiscoReward.map` does.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows of any type in TRL's documentation that has answers.
        annotator ([`Annotator`]):
            What to score with.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The dataset with the columns of
        [`Annotator.column_names`].

    Raises:
        `ValueError`: If the dataset is empty, has no answers or a column of the same name, or if a row is bad.
    """
    dataset = dataset.with_format(None)
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError("the dataset is empty; check its path, split and filters")
    layout = find_answers(first_row)
    names = annotator.column_names(layout)
    refuse_clash(list(first_row), names, "rename or remove it, or pass prefix=")

    def score_batch(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[float]]:
        rows = [dict(zip(batch.keys(), values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return annotator(rows, layout, indices[0])

    features = None
    if dataset.features is not None:
        features = Features({**dataset.features, **{name: Value("float32") for name in names}})
    arguments: dict[str, Any] = {"with_indices": True, "batched": True, "batch_size": ROWS_AT_ONCE}
    if isinstance(dataset, IterableDataset):
        return dataset.map(score_batch, features=features, **arguments)
    # Left alone, `datasets` would pickle the model to tell whether its cache has the result.
    described = json.dumps([dataset._fingerprint, annotator.settings()], default=str)
    fingerprint = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
    return dataset.map(score_batch, features=features, new_fingerprint=fingerprint, desc="Scoring", **arguments)


def annotate_file(
    dataset: Dataset | IterableDataset, out: Path, annotator: Annotator, rows_per_part: int = ROWS_AT_ONCE
) -> tuple[int, int]:
    """
    Score every row of a dataset into a file, going on where an earlier call was broken off.

    With several processes each of them has to call it; the main one writes the file.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows that come in the same order each time, in any format.
        out (`Path`):
            A `.parquet` or `.jsonl` file that does not exist. The finished parts are kept beside it, in `OUT.parts`,
            until it does.
        annotator ([`Annotator`]):
            What to score with.
        rows_per_part (`int`, *optional*, defaults to `256`):
            Rows that a kill can cost, which are also what is held in memory at once.

    Returns:
        `tuple[int, int]`: The number of rows, and how many of them had been scored before.

    Raises:
        `ValueError`: If something is wrong with a row (all are checked before the first is scored), if the file
            exists, or if what is in `OUT.parts` was made from other rows, by another model or with other options.
        `BlockingIOError`: If another process is writing the same file.
        `OSError`: If there is no space; the message says what is kept.
    """
    state = process_state()
    parts = out.with_name(f"{out.name}.parts")
    with locked(out) if state.is_main_process else nullcontext():
        try:
            return _annotate_file(dataset, out, parts, annotator, rows_per_part, state)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            finished = len(list(parts.glob("part-*.parquet")))
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno)}: {out} is not complete. The scores of {finished} parts of "
                f"{rows_per_part} rows are kept in {parts}: make space and run the same command again to go on from "
                "there, or delete that folder",
            ) from error


def _annotate_file(
    dataset: Dataset | IterableDataset, out: Path, parts: Path, annotator: Annotator, rows_per_part: int, state: Any
) -> tuple[int, int]:
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError("the data is empty; check its path and split")
    layout = find_answers(first_row)
    features = None
    if state.is_main_process:
        check_output(out)  # a process that has ended since may have written it
        names = annotator.column_names(layout)
        refuse_clash(list(first_row), names, "pass --prefix, or rename it in the data")
        if out.suffix == ".parquet":
            features = parquet_features(dataset, dict.fromkeys(names, Value("float32")), rows_per_part)
        found = _survey(dataset, out, layout, rows_per_part)
        _begin(parts, {"rows_per_part": rows_per_part, **annotator.settings(), **found})
    state.wait_for_everyone()
    finished = set(parts.glob("part-*.parquet"))
    total = json.loads((parts / "settings.json").read_text())["rows"]
    state.wait_for_everyone()  # or a fast process would add to what a slow one finds finished

    unfinished = rows_before = 0
    with logging.tqdm(total=total, desc="scoring", unit="row", disable=not state.is_main_process) as bar:
        for index, rows in enumerate(chunks(dataset, rows_per_part)):
            part = parts / f"part-{index:06d}.parquet"
            if part in finished:
                rows_before += len(rows)
            else:
                # By their number among those left: else after a kill one process might have them all to itself.
                if unfinished % state.num_processes == state.process_index:
                    _write_part(part, annotator(rows, layout, index * rows_per_part))
                unfinished += 1
            bar.update(len(rows))
    state.wait_for_everyone()

    if state.is_main_process:
        with RowWriter(out, features, is_locked=True) as writer:
            for index, rows in enumerate(chunks(dataset, rows_per_part)):
                scores = pq.read_table(parts / f"part-{index:06d}.parquet").to_pylist()
                writer.write([row | numbers for row, numbers in zip(rows, scores, strict=True)])
        # By now the file is on the disk.
        remove_parts(parts)
    state.wait_for_everyone()
    return total, rows_before


def _survey(dataset: Dataset | IterableDataset, out: Path, layout: Layout, rows_at_once: int) -> dict[str, Any]:
    """Number and digest of the rows, all of which are checked before hours of scoring."""
    digest = hashlib.blake2b(digest_size=16)
    number = 0
    with logging.tqdm(desc="checking", unit="row") as bar:
        for rows in chunks(dataset, rows_at_once):
            for row in rows:
                read_checked(row, layout, number)
                line = as_json(row, number) if out.suffix == ".jsonl" else json.dumps(row, default=str)
                digest.update(line.encode("utf-8", "surrogatepass"))
                number += 1
            bar.update(len(rows))
    return {"rows": number, "data": digest.hexdigest()}


def _begin(parts: Path, settings: dict[str, Any]) -> None:
    """Make the folder of the parts, or check that those in it belong to these settings."""
    path = parts / "settings.json"
    if parts.is_symlink():
        raise ValueError(f"{parts} is a link, and its files would be written and deleted elsewhere; remove it")
    if not path.exists():
        parts.mkdir(parents=True, exist_ok=True)
        try:
            with written_at_once(path) as unfinished:
                unfinished.write_text(json.dumps(settings, indent=2))
        except OSError:
            with suppress(OSError):
                parts.rmdir()
            raise
        return
    before = json.loads(path.read_text())
    changed = [name for name in settings if settings[name] != before.get(name)]
    if changed:
        details = ", ".join(f"{name} {before.get(name)!r} and now {settings[name]!r}" for name in changed)
        raise ValueError(
            f"{parts} holds part of the scores from a run with other settings (then {details}); repeat that command "
            "to finish it, or delete the folder to begin anew"
        )


def _write_part(path: Path, scores: dict[str, list[float]]) -> None:
    table = pa.table({name: pa.array(values, pa.float32()) for name, values in scores.items()})
    with written_at_once(path) as unfinished:
        pq.write_table(table, unfinished)


def remove_parts(parts: Path) -> None:
    """Remove the parts, and their folder, of an output that is complete."""
    for path in (*parts.glob("part-*"), parts / "settings.json"):
        path.unlink()
    parts.rmdir()
