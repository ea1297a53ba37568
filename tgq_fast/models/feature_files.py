"""Arrays on disk that are written in chunks, survive kill −9 and are memory-mapped when whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgq_fast.data.files import fsync_folder, write_atomic

__all__ = ["ChunkedArray"]

Layout = Mapping[str, tuple[str, Sequence[int]]]  # name -> (dtype, shape of one row)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that the kernel releases when the process dies."""
    with path.open("wb") as handle:
        if os.name == "posix":
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class ChunkedArray:
    """Several arrays with one row per item, plus ragged ones, in one folder.

    Each array is one raw file. A journal gets one line per chunk, after the chunk's bytes are on disk: bytes written, a
    sha256 and notes. An interrupted build keeps the chunks whose journal line and checksum are right and cuts the rest.
    When all rows are there the journal becomes `manifest.json`; only then is the folder complete.

    Args:
        folder: where the files lie.
        layout: arrays with one entry per row.
        rows, chunk: rows in all and per chunk.
        ragged: arrays with any number of entries per row.
        facts: kept in the manifest and compared on opening.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        *,
        rows: int,
        chunk: int,
        facts: Mapping[str, str],
        ragged: Layout | None = None,
    ) -> None:
        self.folder, self.rows, self.chunk = folder, rows, chunk
        self.layout: dict[str, tuple[str, Sequence[int]]] = {**layout, **(ragged or {})}
        described = {name: [dtype, list(shape)] for name, (dtype, shape) in self.layout.items()}
        self.facts: dict[str, Any] = {**facts, "rows": rows, "chunk": chunk, "layout": described}
        self._journal: list[dict[str, Any]] = []
        self._maps: dict[str, NDArray[Any]] = {}

    @property
    def notes(self) -> list[Any]:
        """Everything noted with the chunks, in order."""
        return [note for entry in self._journal for note in entry["notes"]]

    def __contains__(self, name: str) -> bool:
        return name in self.layout or name in self._maps

    def __getitem__(self, name: str) -> NDArray[Any]:
        """The whole array, read-only: [rows, …], or [entries, …] for a ragged one."""
        if name not in self._maps:
            dtype, shape = self.layout[name]
            path = self._path(name)
            if path.stat().st_size == 0:
                self._maps[name] = np.empty((0, *shape), dtype)
            else:
                flat = np.memmap(path, dtype=dtype, mode="r")
                self._maps[name] = flat.reshape(-1, *shape) if shape else flat
        return self._maps[name]

    def set(self, name: str, value: NDArray[Any]) -> None:
        """Attach a derived array, kept in memory only."""
        self._maps[name] = value

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the files again rather than receiving a copy of them.
        derived = {k: v for k, v in self._maps.items() if k not in self.layout}
        return {**self.__dict__, "_maps": derived}

    @contextlib.contextmanager
    def building(self, *, verify: bool = True) -> Iterator[range]:
        """Open, under a lock; yields the numbers of the chunks still to append, empty for a complete folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / "lock"):
            chunks = -(-self.rows // self.chunk)
            if self._open_complete(verify):
                yield range(0)
                return
            done = self._recover()
            yield range(done, chunks)
            (self.folder / "journal.jsonl").touch()
            manifest = {"facts": self.facts, "chunks": self._journal}
            write_atomic(self.folder / "manifest.json", json.dumps(manifest).encode())
            (self.folder / "journal.jsonl").unlink()

    def append(self, values: Mapping[str, NDArray[Any]], notes: Sequence[Any]) -> None:
        """Add the next chunk: data first, then its journal line, each made durable."""
        digest, sizes = hashlib.sha256(), {}
        for name, (dtype, _) in self.layout.items():
            data = np.ascontiguousarray(values[name], dtype=dtype).tobytes()
            digest.update(data)
            sizes[name] = len(data)
            with self._path(name).open("ab") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
        entry = {"bytes": sizes, "sha256": digest.hexdigest(), "notes": list(notes)}
        with (self.folder / "journal.jsonl").open("a") as journal:
            journal.write(json.dumps(entry) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self._journal.append(entry)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _open_complete(self, verify: bool) -> bool:
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text())
            entries = manifest["chunks"]
            if manifest["facts"] != self.facts:
                return False
            total = {name: sum(e["bytes"][name] for e in entries) for name in self.layout}
            if any(self._path(name).stat().st_size != size for name, size in total.items()):
                return False
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if verify and self._intact(entries) < len(entries):
            return False
        self._journal = entries
        return True

    def _recover(self) -> int:
        """Keep the intact prefix of an unfinished or damaged build; the number of chunks kept."""
        entries: list[dict[str, Any]] = []
        for name in ("manifest.json", "journal.jsonl"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                text = (self.folder / name).read_text()
                if name == "manifest.json":
                    manifest = json.loads(text)
                    entries = manifest["chunks"] if manifest["facts"] == self.facts else []
                elif not entries:
                    for line in text.splitlines():
                        entry = json.loads(line)  # a torn last line ends the journal
                        entries.append({key: entry[key] for key in ("bytes", "sha256", "notes")})
        kept = self._intact(entries)
        self._journal = entries[:kept]
        lines = "".join(json.dumps(entry) + "\n" for entry in self._journal)
        write_atomic(self.folder / "journal.jsonl", lines.encode())
        (self.folder / "manifest.json").unlink(missing_ok=True)
        for name in self.layout:
            with self._path(name).open("ab") as handle:
                handle.truncate(sum(e["bytes"][name] for e in self._journal))
        fsync_folder(self.folder)
        return kept

    def _intact(self, entries: Sequence[Mapping[str, Any]]) -> int:
        """How many leading chunks are on disk with the right checksum."""
        with contextlib.ExitStack() as stack:
            try:
                files = {name: stack.enter_context(self._path(name).open("rb")) for name in self.layout}
            except OSError:
                return 0
            for number, entry in enumerate(entries):
                digest = hashlib.sha256()
                for name, file in files.items():
                    digest.update(file.read(entry["bytes"][name]))
                if digest.hexdigest() != entry["sha256"]:
                    return number
        return len(entries)
