"""Arrays on disk that are written in chunks, survive kill −9 and are memory-mapped when whole.

What a published manifest names is never written to again: a repair writes new files, publishes them and unlinks the old
ones, which other processes may have mapped. A complete folder is opened without a lock, on a read-only disk too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgq_fast.io.files import (
    append_line,
    fsync_folder,
    locked,
    make_folder,
    open_regular,
    read_regular,
    write_atomic,
    writing,
)
from tgq_fast.io.json_text import read_json
from tgq_fast.models.cache_limit import cache_limit, evict, used

__all__ = ["CacheManifest", "ChunkedArray"]

Layout = Mapping[str, tuple[str, Sequence[int]]]  # name -> (dtype, shape of one row)
FORMAT = "tgq-fast feature cache"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Chunk:
    """One chunk: bytes per array, sha256 of them in the order of the layout, notes, whether they are for good.

    `lasting` is False where a note tells of a moment (no memory, no codec): the chunk is made again on the next open.
    """

    bytes: dict[str, int]
    sha256: str
    notes: list[Any] = field(default_factory=list)
    lasting: bool = True

    @classmethod
    def parse(cls, value: Mapping[str, Any], names: Sequence[str]) -> Chunk:
        """From JSON; ValueError for anything malformed."""
        if set(value) - {entry.name for entry in fields(cls)} or set(value["bytes"]) != set(names):
            raise ValueError("unknown or missing names")
        sizes = {str(name): int(size) for name, size in value["bytes"].items()}
        if min(sizes.values(), default=0) < 0 or not isinstance(value["notes"], list):
            raise ValueError("negative size or notes that are no list")
        return cls(sizes, str(value["sha256"]), value["notes"], bool(value.get("lasting", True)))


@dataclass(frozen=True)
class CacheManifest:
    """What `manifest.json` (and, without `chunks`, the first line of a journal) says.

    Attributes:
        facts: what the cache is of: keys, rows, chunk, layout.
        files: array name → file name in the folder.
        chunks: in order.
        format, version: of this file; other versions are made anew, but for version 1, which is read.
    """

    facts: dict[str, Any]
    files: dict[str, str]
    chunks: list[Chunk] = field(default_factory=list)
    format: str = FORMAT
    version: int = FORMAT_VERSION

    def to_json(self) -> bytes:
        """One line with a checksum over the rest."""
        body = asdict(self)
        return json.dumps({**body, "checksum": _digest(body)}).encode() + b"\n"

    @classmethod
    def parse(cls, text: bytes, facts: Mapping[str, Any], names: Sequence[str]) -> CacheManifest:
        """Read and check; ValueError for a foreign, damaged or older file, or one of other facts."""
        try:
            body = read_json(text)
            if "format" not in body and body["facts"] == dict(facts):  # version 1 named no files and had no checksum
                chunks = [Chunk.parse(chunk, names) for chunk in body["chunks"]]
                # It kept the verdicts of a moment too: a chunk with notes is made again.
                chunks = [dataclasses.replace(chunk, lasting=not chunk.notes) for chunk in chunks]
                return cls(body["facts"], {name: f"{name}.bin" for name in names}, chunks)
            if body.get("format") != FORMAT or body.get("version") != FORMAT_VERSION:
                raise ValueError("another format")
            if body.pop("checksum", None) != _digest(body):
                raise ValueError("checksum")
            files = {str(name): str(file) for name, file in body["files"].items()}
            if body["facts"] != dict(facts) or set(files) != set(names):
                raise ValueError("other facts")
            if any(Path(file).name != file or file.startswith(".") for file in files.values()):
                raise ValueError("a file outside the folder")
            return cls(body["facts"], files, [Chunk.parse(chunk, names) for chunk in body["chunks"]])
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise ValueError(f"malformed: {error}") from error


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Damaged:
    """A published cache that is not whole: its chunks that are, and where each array's chunks begin, in bytes."""

    manifest: CacheManifest
    intact: frozenset[int]
    starts: dict[str, list[int]]


def _starts(chunks: Sequence[Chunk], names: Iterable[str]) -> dict[str, list[int]]:
    return {name: list(accumulate((chunk.bytes[name] for chunk in chunks), initial=0)) for name in names}


class ChunkedArray:
    """Several arrays with one row per item, plus ragged ones, in one folder.

    Each array is one raw file. A journal gets one line per chunk, after the chunk's bytes are on disk. An interrupted
    build keeps the chunks whose journal line and checksum are right and cuts the rest. When all rows are there a
    manifest is published; only then is the folder complete.

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
        self._chunks: list[Chunk] = []
        self._files: dict[str, str] = {}
        self._old: _Damaged | None = None
        self._maps: dict[str, NDArray[Any]] = {}

    @property
    def notes(self) -> list[Any]:
        """Everything noted with the chunks, in order."""
        return [note for chunk in self._chunks for note in chunk.notes]

    def __contains__(self, name: str) -> bool:
        return name in self.layout or name in self._maps

    def __getitem__(self, name: str) -> NDArray[Any]:
        """The whole array, read-only: [rows, …], or [entries, …] for a ragged one."""
        if name not in self._maps:
            dtype, shape = self.layout[name]
            path = self.folder / self._files[name]
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
    def building(self, *, verify: bool = True) -> Iterator[list[int]]:
        """Open, under a lock where something is missing; yields the numbers of the chunks to append, in order.

        Raises:
            StorageError: the folder cannot be written to and is not complete.
        """
        cache_limit()  # a wrong one is said before hours of work
        if self.open_complete(verify=verify):
            yield []
            return
        make_folder(self.folder)
        with locked(self.folder / "lock"):
            if self.open_complete(verify=verify):  # another process finished it meanwhile
                yield []
                return
            kept = self._recover()
            todo = [n for n in range(len(self._chunks), -(-self.rows // self.chunk)) if n not in kept]
            yield todo
            self._copy_old()
            self._publish()
            evict(self.folder.parent.parent, self.folder)

    def append(self, values: Mapping[str, NDArray[Any]], notes: Sequence[Any], *, lasting: bool = True) -> None:
        """Add the next chunk to do: data first, then its journal line, each made durable."""
        self._copy_old()
        data = {n: np.ascontiguousarray(values[n], dtype=dtype).tobytes() for n, (dtype, _) in self.layout.items()}
        self._append(data, list(notes), lasting)

    # ------------------------------------------------------------------ writing

    def _append(self, data: Mapping[str, bytes], notes: list[Any], lasting: bool) -> None:
        digest, sizes = hashlib.sha256(), {}
        for name in self.layout:
            digest.update(data[name])
            sizes[name] = len(data[name])
            path = self.folder / self._files[name]
            with writing(path), path.open("ab") as handle:
                handle.write(data[name])
                handle.flush()
                os.fsync(handle.fileno())
        chunk = Chunk(sizes, digest.hexdigest(), notes, lasting)
        append_line(self.folder / "journal.jsonl", json.dumps(asdict(chunk)).encode() + b"\n")
        self._chunks.append(chunk)

    def _copy_old(self) -> None:
        """Copy the intact chunks of a damaged cache that come next."""
        if self._old is None:
            return
        while (number := len(self._chunks)) in self._old.intact:
            chunk, data = self._old.manifest.chunks[number], {}
            for name, size in chunk.bytes.items():
                with open_regular(self.folder / self._old.manifest.files[name]) as file:
                    file.seek(self._old.starts[name][number])
                    data[name] = file.read(size)
            self._append(data, chunk.notes, chunk.lasting)

    def _begin(self) -> None:
        """A new build: new files, numbered through and named in the first line of the journal."""
        numbers = [int(p.suffixes[-2][1:]) for p in self.folder.glob("*.*.bin") if p.suffixes[-2][1:].isdecimal()]
        self._files = {name: f"{name}.{max(numbers, default=-1) + 1}.bin" for name in self.layout}
        self._chunks = []
        for file in self._files.values():
            with writing(self.folder / file):
                (self.folder / file).touch()
        write_atomic(self.folder / "journal.jsonl", CacheManifest(self.facts, self._files).to_json())

    def _publish(self) -> None:
        manifest = CacheManifest(self.facts, self._files, self._chunks)
        write_atomic(self.folder / "manifest.json", manifest.to_json())
        with writing(self.folder):
            (self.folder / "journal.jsonl").unlink(missing_ok=True)
            self._sweep()
        self._old = None
        for name in self.layout:  # map now: a repair by another process unlinks the files
            self[name]

    def _sweep(self) -> None:
        """Unlink the files of earlier builds; what other processes have mapped lives on for them."""
        for path in self.folder.glob("*.bin"):
            if path.name not in self._files.values():
                path.unlink(missing_ok=True)
        fsync_folder(self.folder)

    # ------------------------------------------------------------------ reading

    def open_complete(self, *, verify: bool) -> bool:
        """Open the folder if it is complete; with `verify` only if every chunk has its checksum."""
        manifest = self._manifest()
        if manifest is None or len(manifest.chunks) != -(-self.rows // self.chunk):
            return False
        if not all(chunk.lasting for chunk in manifest.chunks):
            return False
        try:
            for name, file in manifest.files.items():
                if (self.folder / file).stat().st_size != sum(chunk.bytes[name] for chunk in manifest.chunks):
                    return False
            if verify and len(self._intact(manifest)) < len(manifest.chunks):
                return False
            self._chunks, self._files = manifest.chunks, manifest.files
            for name in self.layout:
                self[name]
        except (OSError, ValueError):
            self._maps.clear()
            return False
        used(self.folder)
        return True

    def intact(self, number: int) -> bool:
        """Whether a chunk of a complete folder, of arrays with one entry per row, has its checksum."""
        rows, digest = slice(number * self.chunk, (number + 1) * self.chunk), hashlib.sha256()
        for name in self.layout:
            digest.update(np.ascontiguousarray(self[name][rows]).tobytes())
        return digest.hexdigest() == self._chunks[number].sha256

    def _manifest(self) -> CacheManifest | None:
        try:
            return CacheManifest.parse(read_regular(self.folder / "manifest.json"), self.facts, list(self.layout))
        except (OSError, ValueError):
            return None

    def _recover(self) -> frozenset[int]:
        """Take up an unfinished build, or begin one that keeps what is intact of a damaged cache.

        Returns:
            the chunks that need not be made: they are copied when their turn comes.
        """
        self._old = None
        published = self._manifest()
        if published is not None:
            intact = frozenset(n for n in self._intact(published) if published.chunks[n].lasting)
            self._old = _Damaged(published, intact, _starts(published.chunks, self.layout))
        unfinished = self._unfinished()
        if unfinished is None:
            self._begin()
        else:
            self._files, chunks = unfinished.files, unfinished.chunks
            whole = self._intact(unfinished)
            good = next((n for n, _ in enumerate(chunks) if n not in whole or not chunks[n].lasting), len(chunks))
            self._chunks = chunks[:good]
            lines = [CacheManifest(self.facts, self._files).to_json()]
            lines += [json.dumps(asdict(chunk)).encode() + b"\n" for chunk in self._chunks]
            write_atomic(self.folder / "journal.jsonl", b"".join(lines))
            for name, file in self._files.items():
                with writing(self.folder / file), (self.folder / file).open("ab") as handle:
                    handle.truncate(sum(chunk.bytes[name] for chunk in self._chunks))
        with writing(self.folder):
            fsync_folder(self.folder)
        return frozenset() if self._old is None else self._old.intact

    def _unfinished(self) -> CacheManifest | None:
        """The build that a journal tells of."""
        try:
            head, *lines = read_regular(self.folder / "journal.jsonl").split(b"\n")
            manifest = CacheManifest.parse(head, self.facts, list(self.layout))
        except (OSError, ValueError):
            return None
        for line in lines:
            try:
                manifest.chunks.append(Chunk.parse(read_json(line), list(self.layout)))
            except (ValueError, KeyError, TypeError, AttributeError):
                break  # a torn last line ends the journal
        published = self._manifest()
        if published is not None and set(published.files.values()) & set(manifest.files.values()):
            return None  # its files were published: they are not written to again
        return manifest

    def _intact(self, manifest: CacheManifest) -> list[int]:
        """Numbers of the chunks that are on disk with the right checksum."""
        found = []
        with contextlib.ExitStack() as stack:
            try:
                files = {
                    name: stack.enter_context(open_regular(self.folder / manifest.files[name])) for name in self.layout
                }
            except OSError:
                return []
            for number, chunk in enumerate(manifest.chunks):
                digest = hashlib.sha256()
                for name, file in files.items():
                    digest.update(file.read(chunk.bytes[name]))
                if digest.hexdigest() == chunk.sha256:
                    found.append(number)
        return found
