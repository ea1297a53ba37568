"""Bytes of pictures that lie in Parquet files, read when they are asked for."""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from tgq_fast.data.parquet_rows import cell_pictures, column_chunks, open_parquet, picture_columns
from tgq_fast.io.places import Place

__all__ = ["ParquetPictures"]

_WHOLE = 64 << 20  # bytes up to which a row group is kept whole
_STEP = 32  # pictures that are read at a time from a larger one
_STEPS = 16  # of these that are kept


class ParquetPictures:
    """Bytes of pictures that lie in Parquet files, read by row group. Safe to use from several threads.

    Of a large row group a window is kept that moves forward; whoever goes back in it makes it start anew, so groups of
    a few hundred pictures are faster.

    Args:
        files: table name, as addresses have it → file.
    """

    _KEPT = 2  # row groups in memory

    def __init__(self, files: dict[str, Place]) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[str, int], _Whole | _Window] = OrderedDict()
        self._layout: dict[str, tuple[str, list[int], list[int]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self._files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["files"])  # type: ignore[misc]

    def __contains__(self, address: object) -> bool:
        table, mark, row = str(address).rpartition("#")
        return bool(mark) and row.isdecimal() and table in self._files

    def read(self, address: str) -> bytes:
        """Bytes of one picture.

        Raises:
            OSError: the file cannot be read, has changed, or the row has no bytes.
        """
        table, _, row = address.rpartition("#")
        number = int(row) - 1
        try:
            with self._lock:
                column, ends, sizes = self._layout_of(table)
                group = next((g for g, end in enumerate(ends) if number < end), None)
                if group is None:
                    raise OSError(errno.EIO, f"{self._files[table]}: has no row {row}; the file has changed")
                first = ends[group - 1] if group else 0
                if (table, group) not in self._groups:
                    kind = _Whole if sizes[group] <= _WHOLE else _Window
                    self._groups[table, group] = kind(self._files[table], group, column)
                    while len(self._groups) > self._KEPT:
                        self._groups.popitem(last=False)
                self._groups.move_to_end((table, group))
                value = self._groups[table, group].cell(number - first)
        except (pa.ArrowException, IndexError) as error:
            raise OSError(errno.EIO, f"{self._files[table]}: {str(error)[:200]}") from error
        except OSError as error:  # what Arrow raises on damaged pages has no errno
            if error.errno is not None:
                raise
            raise OSError(errno.EIO, f"{self._files[table]}: {str(error)[:200]}") from error
        held, _ = cell_pictures(value)
        if not held or not isinstance(held[0], bytes):
            raise OSError(errno.EIO, f"{self._files[table]}: row {row} holds no picture; the file has changed")
        return held[0]

    def _layout_of(self, table: str) -> tuple[str, list[int], list[int]]:
        """Column, last rows and bytes of the row groups."""
        if table not in self._layout:
            with open_parquet(self._files[table]) as file:
                column = picture_columns(file)[0]
                groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
            sizes = [sum(leaf.total_uncompressed_size for leaf in column_chunks(group, column)) for group in groups]
            self._layout[table] = (column, np.cumsum([group.num_rows for group in groups]).tolist(), sizes)
        return self._layout[table]


class _Whole:
    """A row group in memory."""

    def __init__(self, path: Place, group: int, column: str) -> None:
        with open_parquet(path) as file:
            self._data = file.read_row_group(group, columns=[column], use_threads=False).column(0)

    def cell(self, row: int) -> Any:
        """Value of a row."""
        return self._data[row].as_py()


class _Window:
    """Some steps of a row group, read forward."""

    def __init__(self, path: Place, group: int, column: str) -> None:
        self._source = path, group, column
        self._steps: OrderedDict[int, Any] = OrderedDict()
        self._stream: Iterator[Any] = iter(())
        self._next = -1

    def cell(self, row: int) -> Any:
        """Value of a row."""
        step = row // _STEP
        if step not in self._steps:
            if not 0 <= self._next <= step:
                self._stream, self._next = self._read(), 0
            while self._next <= step:
                data = next(self._stream, None)
                if data is None:
                    raise IndexError(f"row {row} of a row group; the file has changed")
                self._steps[self._next] = data
                self._next += 1
                while len(self._steps) > _STEPS:
                    self._steps.popitem(last=False)
        return self._steps[step][row % _STEP].as_py()

    def _read(self) -> Iterator[Any]:
        path, group, column = self._source
        with open_parquet(path) as file:
            batches = file.iter_batches(batch_size=_STEP, row_groups=[group], columns=[column], use_threads=False)
            yield from (batch.column(0) for batch in batches)
