"""Files: datasets that are loaded, rows that are read a chunk at a time, and output that appears when it is complete.

Rows are read and written in order, in memory that does not grow with their number. `disco-trl score`, `filter` and
`best-of-n` read and write through here.
"""

from __future__ import annotations

import csv
import errno
import glob
import gzip
import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset
from transformers.utils import logging

from .values import Row


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

ROWS_AT_ONCE = 256
"""Rows of a chunk by default: enough to batch by length, few enough to hold."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Codes of the errors of a disk that is full, of a quota, and of a limit to the size of a file."""


def open_rows(
    name: str,
    config: str | None = None,
    split: str | None = None,
    argument: str = "--dataset_name",
    split_argument: str = "--dataset_split",
) -> Dataset | IterableDataset:
    """
    The rows of what `load_preferences` loads. Local files are streamed. A Hub dataset, which is read more than once,
    is downloaded and then read from disk.

    Args:
        name (`str`):
            File, folder or Hub id.
        config (`str`, *optional*):
            Name of the dataset's configuration.
        split (`str`, *optional*):
            Name of the split. It can be left out if there is only one.
        argument (`str`, *optional*, defaults to `"--dataset_name"`):
            What the command line calls `name`, for messages.
        split_argument (`str`, *optional*, defaults to `"--dataset_split"`):
            What the command line calls `split`, for messages.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The rows, without a format.

    Raises:
        `FileNotFoundError`, `ValueError`: If there is no such file or split; the message says which there are.
    """
    splits = load_preferences(name, config, streaming=Path(name).exists(), argument=argument)
    if split is None:
        if len(splits) > 1:
            raise ValueError(f"{name} has the splits {', '.join(map(repr, splits))}; choose one with {split_argument}")
        split = next(iter(splits))
    return choose_split(splits, split, split_argument).with_format(None)


def chunks(dataset: Dataset | IterableDataset, size: int = ROWS_AT_ONCE) -> Iterator[list[Row]]:
    """The rows in order, `size` at a time; the last chunk may be shorter."""
    for batch in dataset.iter(batch_size=size):
        yield [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def parquet_features(
    dataset: Dataset | IterableDataset, added: dict[str, Any], rows_at_once: int = ROWS_AT_ONCE
) -> Features:
    """
    Types of a Parquet file's columns: those of the dataset, or else (a CSV file has none) what all rows have in
    common; and those of the columns that are added.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows that will be written.
        added (`dict`):
            Types of the columns that are added, by name.
        rows_at_once (`int`, *optional*, defaults to `256`):
            Rows that are read at a time.

    Returns:
        [`~datasets.Features`]: The types.

    Raises:
        `ValueError`: If Parquet has no type for a column.
    """
    fix = "write to a .jsonl file instead"
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
                    f"rows {first} to {first + len(rows) - 1}: {error}; Parquet needs one type for a column: {fix}"
                ) from error
            first += len(rows)
        features = Features.from_arrow_schema(schema)
    features = Features({**features, **added})
    try:
        # Better now than when all has been scored.
        pq.ParquetWriter(pa.BufferOutputStream(), features.arrow_schema).close()
    except pa.ArrowException as error:
        raise ValueError(f"{error} {fix}") from error
    return features


def refuse_clash(found: list[str], new: list[str], fix: str) -> None:
    """Raise `ValueError` if a dataset has a column that is about to be added."""
    if clash := [name for name in new if name in found]:
        raise ValueError(f"column {' and '.join(map(repr, clash))}: the data has one of this name already; {fix}")


def check_output(path: Path) -> None:
    """Raise `ValueError` unless rows can be written to that path, which must not exist yet."""
    if path.suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"--output_file {path}: its name must end in .parquet or .jsonl")
    if os.path.lexists(path):  # a link to nowhere too
        raise ValueError(f"--output_file {path} exists already; delete it, or choose another name")


def as_json(row: Row, row_number: int) -> str:
    """A line of JSON, or a `ValueError` that names the row."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"row {row_number}: {error}; write to a .parquet file, which has a type for it") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """
    Keep an output for this process alone, so that no other one writes to the same files meanwhile.

    The lock is one of the operating system (`flock`) on the file `PATH.lock`. It ends with the process, however that
    ends; a file that a killed process has left is no lock. File systems without locks, such as some NFS mounts, are
    warned of, and on Windows nothing is locked.

    Args:
        path (`Path`):
            File or folder that is about to be written. Its parent folder is made.

    Raises:
        `BlockingIOError`: If another process holds it. The message names that process.
    """
    if fcntl is None:
        yield
        return
    path = Path(os.path.abspath(path))
    lock = path.with_name(f"{path.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(path, lock)
    try:
        yield
    finally:
        # In this order: who opens the file before it is gone finds it locked, or finds that it is another one.
        lock.unlink(missing_ok=True)
        with suppress(OSError):  # of a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile would go on holding it
        os.close(descriptor)


def _lock(path: Path, lock: Path) -> int:
    """Open and lock a file, and return its descriptor."""
    while True:
        if lock.is_symlink():
            lock.unlink()
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "unknown"
            os.close(descriptor)
            raise BlockingIOError(
                errno.EWOULDBLOCK,
                f"{path}: another process is writing it ({holder}); wait until it has ended, or choose another output",
            ) from None
        except OSError as error:
            logger.warning(
                f"{path} cannot be locked ({error.strerror}): this file system has no locks. Make sure that no other "
                "process writes the same output."
            )
            return descriptor
        # The last holder may have removed the file between the two calls.
        if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
            os.ftruncate(descriptor, 0)
            with suppress(OSError):  # of a full disk
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        os.close(descriptor)


@contextmanager
def written_at_once(path: Path, folder: bool = False) -> Iterator[Path]:
    """
    Write a file or a folder that appears under its name when it is complete, and not before.

    What is written has reached the disk by then, so whatever it replaces, or was made from, may be deleted. If the
    block raises, on a full disk for example, nothing is left. Links are not followed: one that stands under the name,
    or under the name that is written to, is replaced, and what it leads to stays as it is.

    Args:
        path (`Path`):
            File or folder to write. Its parent folder is made. A file or folder of this name is replaced.
        folder (`bool`, *optional*, defaults to `False`):
            Whether to write a folder.

    Yields:
        `Path`: An empty file or folder beside it, to be written to.

    Raises:
        `OSError`: If there is no space; the message names the file and the fix.

    Example:

    ```python
    >>> with written_at_once(Path("figures.json")) as unfinished:
    ...     unfinished.write_text("{}")
    ```
    """
    path = Path(os.path.abspath(path))  # a name to put something behind, also of "."
    unfinished, replaced = (path.with_name(f"{path.name}.{what}") for what in ("unfinished", "replaced"))
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in (unfinished, replaced):  # of a run that was killed
        _remove(left_over)
    # Both fail if somebody has put a link there since.
    if folder:
        unfinished.mkdir()
    else:
        unfinished.open("xb").close()
    try:
        yield unfinished
        for written in (*unfinished.rglob("*"), unfinished):
            _flush(written)
        if folder and os.path.lexists(path):  # a folder that is not empty cannot be replaced in one step
            path.rename(replaced)
        os.replace(unfinished, path)
        for parent in (path.parent, *(folder.parent for folder in made)):
            _flush(parent)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno)}: {path} is not written, and nothing is left of it; make space, or choose "
            "another disk, and repeat the command",
        ) from error
    finally:
        _remove(unfinished)
        if os.path.lexists(replaced) and not os.path.lexists(path):
            replaced.rename(path)
        _remove(replaced)


def _remove(path: Path) -> None:
    """Remove a file, a folder or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder."""
    if path.is_dir() and os.name != "posix":
        return  # Windows does not open folders
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RowWriter:
    """
    Writes rows to a `.parquet` or `.jsonl` file, which appears under its name when it is complete.

    Args:
        path (`Path`):
            File to write. Its folder is made.
        features ([`~datasets.Features`], *optional*):
            Types of the columns, which Parquet needs to know before the first row; None for `.jsonl`.
        is_locked (`bool`, *optional*, defaults to `False`):
            Whether the caller holds the lock on the file (see [`locked`]), which is otherwise taken here.

    Example:

    ```python
    >>> with RowWriter(Path("scored.jsonl"), None) as writer:
    ...     writer.write([{"text": "Paris.", "location": 1.7}])
    ```
    """

    def __init__(self, path: Path, features: Features | None, is_locked: bool = False):
        self.path = path
        self.features = features
        self.is_locked = is_locked
        self.rows = 0

    def __enter__(self) -> RowWriter:
        with ExitStack() as opened:
            if not self.is_locked:
                opened.enter_context(locked(self.path))
            unfinished = opened.enter_context(written_at_once(self.path))
            if self.features is None:
                self._file: Any = unfinished.open("w", encoding="utf-8")
            else:
                self._file = pq.ParquetWriter(unfinished, self.features.arrow_schema)
            opened.callback(self._file.close)
            self._opened = opened.pop_all()  # they are closed on leaving, or here if one cannot be opened
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
        self._opened.__exit__(kind, error, traceback)


_BUILDER_OF_SUFFIX = {
    ".json": "json",
    ".jsonl": "json",
    ".json.gz": "json",
    ".jsonl.gz": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".csv.gz": "csv",
}


def load_preferences(
    name: str, config: str | None = None, streaming: bool = False, argument: str = "--dataset_name"
) -> Any:
    """
    Load a Hub dataset, a local folder or a local file, with all its splits.

    Args:
        name (`str`):
            What follows `argument`. A path that ends in `.json`, `.jsonl` (either also gzipped), `.parquet` or
            `.csv` is read as such a file and gets the one split `train`. In a folder, `train.jsonl` and `test.jsonl`
            become the splits `train` and `test`; one may have columns that the other has not.
        config (`str`, *optional*):
            Name of the dataset's configuration.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows as they are needed.
        argument (`str`, *optional*, defaults to `"--dataset_name"`):
            The argument that named it, for the message.

    Returns:
        `datasets.DatasetDict` or `datasets.IterableDatasetDict`.

    Raises:
        `FileNotFoundError`: If a local path does not exist.
        `ValueError`: If a local file is of a kind that is not read.
    """
    from datasets import DatasetDict, IterableDatasetDict
    from datasets.data_files import get_data_patterns

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        return _load_dataset(f"{argument} {name}", *args, streaming=streaming, **kwargs)

    path = Path(name)
    is_url = "://" in name
    # Of two suffixes that fit (`.jsonl.gz` and, in principle, `.gz`) only the whole one is in the table.
    suffix = next((suffix for suffix in _BUILDER_OF_SUFFIX if name.lower().endswith(suffix)), None)
    if not is_url and not path.exists() and (suffix is not None or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"{argument} {name}: there is no such file or folder (looked in {Path.cwd()}).")
    if suffix is not None and not path.is_dir():
        if not is_url:
            _refuse_odd_file(path, suffix, argument)
        # A name like a[1].jsonl is no pattern: read as one it would match other files, or none.
        files = name if is_url else glob.escape(name)
        return load_dataset(_BUILDER_OF_SUFFIX[suffix], name=config, data_files=files)
    if path.is_file():
        raise ValueError(
            f"{argument} {name}: cannot tell what kind of file this is; its name should end in one of "
            f"{', '.join(_BUILDER_OF_SUFFIX)}."
        )
    if not path.is_dir() or config is not None or (path / "README.md").exists():
        return load_dataset(name, name=config)
    # All splits together would need the same columns; one at a time they do not.
    splits = {
        str(split): load_dataset(name, data_files=files)["train"]
        for split, files in get_data_patterns(str(path.resolve())).items()
    }
    return (IterableDatasetDict if streaming else DatasetDict)(splits)


def _load_dataset(what: str, *args: Any, **kwargs: Any) -> Any:
    """`datasets.load_dataset`, whose own errors say neither what was to be read nor, in one line, what is wrong."""
    import datasets

    try:
        return datasets.load_dataset(*args, **kwargs)
    except datasets.exceptions.DatasetGenerationError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"{what}: cannot be read: {type(cause).__name__}: {str(cause).strip()}") from error
    except RecursionError as error:
        raise ValueError(f"{what}: cannot be read: a value in it is nested too deeply") from error


def _refuse_odd_file(path: Path, suffix: str, argument: str) -> None:
    """Raise `ValueError` for what the readers would crash on, or misread in silence."""
    if path.stat().st_size == 0:
        raise ValueError(f"{argument} {path}: the file is empty")
    if suffix in (".csv", ".csv.gz"):
        opened: Any = gzip.open if suffix == ".csv.gz" else open
        with opened(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
            columns = next(csv.reader([file.readline(2**20)]), [])
        # The second of a name would be read as another column, chosen.1, and so not at all.
        if twice := sorted({column for column in columns if columns.count(column) > 1}):
            raise ValueError(
                f"{argument} {path}: column {twice[0]!r} stands there twice; rename or remove one of them"
            )


def choose_split(dataset: Any, split: str, argument: str, more_fixes: Sequence[str] = ()) -> Any:
    """
    `dataset[split]`, or an error that lists the splits there are and how to make this one.

    Args:
        dataset (`datasets.DatasetDict` or `datasets.IterableDatasetDict`):
            What was loaded.
        split (`str`):
            Name of the wanted split.
        argument (`str`):
            The argument that named it, for the message.
        more_fixes (`Sequence[str]`, *optional*, defaults to `()`):
            What else the user can do, for the message.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The split.

    Raises:
        `ValueError`: If there is no such split.
    """
    if split not in dataset:
        fixes = [
            f"pass {argument} with one of these names",
            f"put the data in a folder as train.jsonl and {split}.jsonl and pass the folder",
            *more_fixes,
        ]
        raise ValueError(
            f"{argument}: the dataset has no split {split!r}; it has {', '.join(map(repr, dataset))}. "
            f"Either {', or '.join(fixes)}."
        )
    return dataset[split]
