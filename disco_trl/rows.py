"""Rows of files, read in order a chunk at a time and written in order, in memory that does not grow with their number.

`disco-trl score`, `filter` and `best-of-n` read and write through here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset

from .train import choose_split, load_preferences


Row = dict[str, Any]

ROWS_AT_ONCE = 256
"""Rows of a chunk if nobody says otherwise: enough to batch by length, few enough to hold."""


def open_rows(name: str, config: str | None = None, split: str | None = None) -> Dataset | IterableDataset:
    """
    The rows of what `disco_trl.train.load_preferences` reads. Local files are streamed; a Hub dataset, which is read
    more than once, is downloaded and then read from disk.

    Args:
        name: a file, a folder, or a Hub id.
        config: name of the dataset's configuration.
        split: which split; may be left out where there is only one.

    Raises:
        FileNotFoundError, ValueError: there is no such file or split; the message says which there are.
    """
    splits = load_preferences(name, config, streaming=Path(name).exists(), argument="DATA")
    if split is None:
        if len(splits) > 1:
            raise ValueError(f"{name} has the splits {', '.join(map(repr, splits))}; choose one with --split")
        split = next(iter(splits))
    return choose_split(splits, split, "--split").with_format(None)


def chunks(dataset: Dataset | IterableDataset, size: int = ROWS_AT_ONCE) -> Iterator[list[Row]]:
    """The rows in order, `size` at a time; the last chunk may be shorter."""
    for batch in dataset.iter(batch_size=size):
        yield [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def parquet_features(
    dataset: Dataset | IterableDataset, added: dict[str, Any], rows_at_once: int = ROWS_AT_ONCE
) -> Features:
    """
    The types of a Parquet file's columns: what the dataset says, or else (a CSV file does not say) what all rows have
    in common; and those of the columns that are added.

    Raises:
        ValueError: Parquet has no type for a column.
    """
    mend = "write to a .jsonl file instead"
    features = dataset.features
    if features is None:
        schema = pa.schema([])
        first = 0
        for rows in chunks(dataset, rows_at_once):
            try:
                found = Dataset.from_list(rows).features.arrow_schema.remove_metadata()
                schema = pa.unify_schemas([schema, found], promote_options="permissive")
            except pa.ArrowException as error:
                raise ValueError(
                    f"rows {first} to {first + len(rows) - 1}: {error}; Parquet needs one type for a column: {mend}"
                ) from error
            first += len(rows)
        features = Features.from_arrow_schema(schema)
    features = Features({**features, **added})
    try:
        # Better now than when all has been scored.
        pq.ParquetWriter(pa.BufferOutputStream(), features.arrow_schema).close()
    except pa.ArrowException as error:
        raise ValueError(f"{error} {mend}") from error
    return features


def refuse_clash(found: list[str], new: list[str], mend: str) -> None:
    """Raise a `ValueError` if a dataset has a column that is about to be added."""
    if clash := [name for name in new if name in found]:
        raise ValueError(f"column {' and '.join(map(repr, clash))}: the data has one of this name already; {mend}")


def check_output(path: Path) -> None:
    """Raise a `ValueError` unless rows can be written to that path, which must not exist yet."""
    if path.suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"--out {path}: its name must end in .parquet or .jsonl")
    if os.path.lexists(path):  # a link to nowhere too
        raise ValueError(f"--out {path} exists already; delete it, or choose another name")


def as_json(row: Row, row_number: int) -> str:
    """A line of JSON, or a `ValueError` that names the row."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"row {row_number}: {error}; write to a .parquet file, which has a type for it") from error


class RowWriter:
    """
    Writes rows to a `.parquet` or `.jsonl` file, which appears under its name when it is complete.

    Args:
        path: the file; its folder is made.
        features: types of the columns, which Parquet needs to know before the first row.

    Example:
        >>> with RowWriter(Path("scored.jsonl"), None) as writer:
        ...     writer.write([{"text": "Paris.", "location": 1.7}])
    """

    def __init__(self, path: Path, features: Features | None):
        self.path = path
        self.features = features
        self.rows = 0
        self._unfinished = path.with_name(f"{path.name}.unfinished")

    def __enter__(self) -> RowWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Of a run that was killed; or a link, through which another file would be overwritten.
        self._unfinished.unlink(missing_ok=True)
        if self.features is None:
            self._file: Any = self._unfinished.open("w", encoding="utf-8")
        else:
            self._file = pq.ParquetWriter(self._unfinished, self.features.arrow_schema)
        return self

    def write(self, rows: list[Row]) -> None:
        """Write rows after those written before."""
        if self.features is None:
            self._file.writelines(as_json(row, self.rows + index) + "\n" for index, row in enumerate(rows))
        elif rows:
            self._file.write_table(Dataset.from_list(rows, features=self.features).with_format("arrow")[:])
        self.rows += len(rows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._unfinished, self.path)
        else:
            self._unfinished.unlink()
