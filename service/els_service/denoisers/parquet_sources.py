"""Parquet tables of pictures, such as those of Hugging Face's datasets.

Rows are read in small batches when they are needed, so a table, and a group of its rows, may be
larger than memory.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from els_service.denoisers.bank_selection import Source
from els_service.denoisers.file_names import printable_name
from els_service.denoisers.pictures import decode_picture, refusing
from els_service.denoisers.tar_sources import MAX_PICTURE_BYTES
from els_service.errors import InvalidArgumentError, LoadError

_ROWS = 16
"""Rows of a batch in memory."""
_LABEL_NAMES = ("label", "labels", "fine_label")
"""Columns that have labels unless one is named, the first that there is."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table; None to find them.

    Attributes:
        image: bytes of picture files, or structures with a field ``bytes``; the only one there is.
        label: integers from 0; the first of ``label``, ``labels``, ``fine_label``, if any.
    """

    image: str | None = None
    label: str | None = None


def read_parquet(path: Path, columns: Columns | None = None) -> Source:
    """Return the pictures of a table, or of all tables of a folder in the order of names.

    Names of labels are those of a ``ClassLabel`` in the metadata of Hugging Face's datasets.

    Raises:
        LoadError: A file is damaged, differs from the first, has no such column, or several of
            pictures; names the file. Or pyarrow is not installed.
    """
    try:
        importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        expected = "expected an installation with the extra parquet"
        raise LoadError(path, f"format parquet: {expected}, got no module {error.name}") from error
    columns = columns or Columns()
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    tables = []
    for file in files:
        with refusing(file):
            tables.append(_Table(file, columns))
    if len({(table.image, table.label) for table in tables}) > 1:
        raise LoadError(path, "expected tables of the same columns, got different ones")
    labels = None
    if tables and tables[0].label is not None:
        labels = np.concatenate([table.labels() for table in tables])
    pictures = ParquetPictures(tables)
    names = tables[0].label_names() if tables else ()
    return Source(path, pictures=pictures, labels=labels, label_names=names)


class _Table:
    """One file: its columns and groups of rows."""

    def __init__(self, path: Path, columns: Columns) -> None:
        self.path = path
        file = self.open()
        self.schema = file.schema_arrow
        self.image = columns.image or _only_image(path, self.schema)
        self.field = _picture_field(self.schema, self.image)
        if columns.label is not None and columns.label not in self.schema.names:
            expected = f"a column of {', '.join(self.schema.names)}"
            raise InvalidArgumentError("label_column", expected, columns.label)
        found = [name for name in _LABEL_NAMES if name in self.schema.names]
        self.label = columns.label or next(iter(found), None)
        groups = range(file.metadata.num_row_groups)
        self.rows = [file.metadata.row_group(group).num_rows for group in groups]

    def open(self) -> Any:
        """Return the open file, whose columns are read through small buffers."""
        from pyarrow.parquet import ParquetFile

        return ParquetFile(self.path, buffer_size=1 << 18, pre_buffer=False)

    def labels(self) -> NDArray[np.int64]:
        """Return the labels of all rows; raises LoadError if they are none."""
        column = self.open().read(columns=[self.label], use_threads=False).column(0)
        values = column.to_numpy() if not column.null_count else np.array([None])
        if not np.issubdtype(values.dtype, np.integer) or values.min(initial=0) < 0:
            got = f"{column.type}, {column.null_count} empty"
            expected = f"column {self.label}: expected integers from 0"
            raise LoadError(self.path, f"{expected}, got {got}")
        return np.asarray(values, np.int64)

    def label_names(self) -> tuple[str, ...]:
        """Return the names of labels in the metadata, or none."""
        try:
            described = json.loads((self.schema.metadata or {})[b"huggingface"])
            names = described["info"]["features"][self.label]["names"]
            return tuple(names) if all(isinstance(name, str) for name in names) else ()
        except (KeyError, TypeError, ValueError, RecursionError):
            return ()

    def batches(self, group: int) -> Iterator[Any]:
        """Yield the bytes of pictures of a group of rows, ``_ROWS`` at a time."""
        options = {"row_groups": [group], "columns": [self.field], "use_threads": False}
        for batch in self.open().iter_batches(_ROWS, **options):
            column = batch.column(0)
            yield column.field("bytes") if self.field != self.image else column


class ParquetPictures:
    """Pictures of tables.

    Args:
        tables: the files.
    """

    def __init__(self, tables: Sequence[_Table]) -> None:
        self._groups = [(table, group) for table in tables for group in range(len(table.rows))]
        counts = [table.rows[group] for table, group in self._groups]
        self._starts = np.cumsum([0, *counts])
        """First row of each group, and the number of rows."""
        self._group, self._first, self._batch = -1, 0, ()
        self._batches: Iterator[Any] = iter(())

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return one picture, as ``decode_picture``; rising indices read each group once."""
        place = self.place(index)
        with refusing(place):
            value = self._value(index)
            if not value.is_valid:
                raise ValueError("expected the bytes of a picture, got none")
            data = value.as_buffer()
            if data.size > MAX_PICTURE_BYTES:
                raise ValueError(f"expected at most {MAX_PICTURE_BYTES} bytes, got {data.size}")
            return decode_picture(data.to_pybytes(), place)

    def place(self, index: int) -> str:
        """Return the file and the row in it."""
        group = self._group_of(index)
        table, number = self._groups[group]
        return f"{table.path}: row {index - int(self._starts[group - number])}"

    def name(self, index: int) -> str:
        """Return the file's name and the row."""
        place = Path(self.place(index))
        return printable_name(place, place.parent)

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, "right")) - 1

    def _value(self, index: int) -> Any:
        """Return the value of a row: the batch in memory, a later one, or its group from the start.

        An exception of a damaged group ends its iteration, and the next call starts it again.
        """
        group = self._group_of(index)
        if group != self._group or index < self._first:
            table, number = self._groups[group]
            self._group, self._first, self._batch = group, int(self._starts[group]), ()
            self._batches = table.batches(number)
        while index >= self._first + len(self._batch):
            self._first += len(self._batch)
            self._batch = ()
            try:
                self._batch = next(self._batches)
            except StopIteration:
                self._group = -1
                raise ValueError("expected as many rows as the file declares, got fewer") from None
            except Exception:
                self._group = -1
                raise
        return self._batch[index - self._first]


def _picture_field(schema: Any, image: str) -> str:
    """Return the column of bytes for an image column, within a structure or itself."""
    from pyarrow import types

    if image not in schema.names:
        raise InvalidArgumentError("image_column", f"a column of {', '.join(schema.names)}", image)
    kind = schema.field(image).type
    if types.is_binary(kind) or types.is_large_binary(kind):
        return image
    if types.is_struct(kind) and any(kind.field(at).name == "bytes" for at in range(len(kind))):
        return f"{image}.bytes"
    expected = "bytes, or structures with a field bytes"
    raise InvalidArgumentError("image_column", expected, f"{image} of {kind}")


def _only_image(path: Path, schema: Any) -> str:
    """Return the only column that has pictures; raises if there are none or several."""
    found: list[str] = []
    for name in schema.names:
        try:
            _picture_field(schema, name)
            found.append(name)
        except InvalidArgumentError:
            continue
    if len(found) != 1:
        got = ", ".join(found or schema.names)
        raise InvalidArgumentError("image_column", "the name of the column of pictures", got)
    return found[0]
