"""What a pool consists of: its shards, which of their rows are deleted, who wrote them, and checksums of everything.

A :class:`Manifest` is one state of a pool and never changes; a :class:`Change` leads from one state to the next.
:mod:`tgq_fast.pool.log` keeps both on disk.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from tgq_fast.io.identity import sha256_file

FORMAT = "tgq-fast item pool"
FORMAT_VERSION = 2
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class FileRecord:
    """A file of the pool: its name, size in bytes and SHA-256."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Of a file that lies there."""
        return cls(path.name, path.stat().st_size, sha256_file(path))

    @classmethod
    def parse(cls, value: dict[str, Any]) -> FileRecord:
        """From JSON; a pool may only name files of its own folder."""
        name = str(value["name"])
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"file name {name!r}")
        return cls(name, int(value["bytes"]), str(value["sha256"]))


@dataclass(frozen=True)
class ShardRecord:
    """One shard. Its files never change.

    Attributes:
        rows: number of items n, deleted ones among them.
        embeddings: safetensors file with the tensor "embeddings" [n, D].
        ids: Parquet file with the string column "id" [n], and where known "content", the key of what was embedded.
        index: safetensors file that finds ids (:mod:`~tgq_fast.pool.ids`); None in pools of release 1.
    """

    rows: int
    embeddings: FileRecord
    ids: FileRecord
    index: FileRecord | None = None

    @property
    def name(self) -> str:
        """Stem of the files' names, unique in the life of a pool."""
        return self.embeddings.name.partition(".")[0]

    @property
    def files(self) -> list[FileRecord]:
        """The shard's files."""
        return [record for record in (self.embeddings, self.ids, self.index) if record is not None]

    @classmethod
    def parse(cls, value: dict[str, Any]) -> ShardRecord:
        """From JSON."""
        index = value.get("index")
        return cls(
            int(value["rows"]),
            FileRecord.parse(value["embeddings"]),
            FileRecord.parse(value["ids"]),
            None if index is None else FileRecord.parse(index),
        )


@dataclass(frozen=True)
class Change:
    """What one commit does to a pool.

    Attributes:
        add: new shards; they follow the others, or stand in for `remove`.
        dead: rows that are deleted now, ascending, by shard name.
        remove: names of adjacent shards that `add` replaces.
        facts: new values of `model`, `source`, `complete`, `rejects`, `rejected` and `writers`.
    """

    add: tuple[ShardRecord, ...] = ()
    dead: Mapping[str, np.ndarray] = field(default_factory=dict)
    remove: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self, rows: Mapping[str, int]) -> dict[str, Any]:
        """JSON-ready form.

        Args:
            rows: number of rows of each shard that loses some, by name.
        """
        facts = dict(self.facts)
        if isinstance(facts.get("rejects"), FileRecord):
            facts["rejects"] = asdict(facts["rejects"])
        return {
            "add": [asdict(shard) for shard in self.add],
            "dead": {name: pack_rows(dead, rows[name]) for name, dead in self.dead.items()},
            "remove": list(self.remove),
            "facts": facts,
        }

    @classmethod
    def parse(cls, body: dict[str, Any], rows: Mapping[str, int]) -> Change:
        """From JSON; KeyError, TypeError or ValueError where it is malformed."""
        facts = dict(body["facts"])
        unknown = facts.keys() - {"model", "source", "complete", "rejects", "rejected", "writers"}
        if unknown:
            raise ValueError(f"facts {sorted(unknown)}")
        if facts.get("rejects") is not None:
            facts["rejects"] = FileRecord.parse(facts["rejects"])
        if "writers" in facts:
            facts["writers"] = tuple(facts["writers"])
        return cls(
            tuple(ShardRecord.parse(shard) for shard in body["add"]),
            {str(name): unpack_rows(packed, rows[name]) for name, packed in body["dead"].items()},
            tuple(map(str, body["remove"])),
            facts,
        )


@dataclass(frozen=True)
class Manifest:
    """One state of a pool. No timestamps: the same work gives the same bytes.

    Attributes:
        dims: D.
        dtype: storage type of the embeddings, one of :data:`DTYPES`.
        shard_size: most rows a shard may hold.
        model: digest of the model that made the embeddings; "" when unknown.
        source: digest of the catalogue the pool was cut from; "" when it was filled by hand.
        complete: False while the catalogue `source` is being embedded.
        writers: distinct {version, commit} of tgq_fast that wrote, in order of first write.
        shards: in pool order.
        rejects: record of the reject log, or None.
        rejected: number of items in the reject log.
        dead: deleted rows of the shards that have any, ascending, by shard name.
        version: number of commits.
        chain: checksum of the last commit, which the next one names; "" before the first.
        next_shard: number of the next shard to be written.
    """

    dims: int
    dtype: str
    shard_size: int
    model: str = ""
    source: str = ""
    complete: bool = True
    writers: tuple[dict[str, str], ...] = ()
    shards: tuple[ShardRecord, ...] = ()
    rejects: FileRecord | None = None
    rejected: int = 0
    dead: Mapping[str, np.ndarray] = field(default_factory=dict)
    version: int = 0
    chain: str = ""
    next_shard: int = 0

    @property
    def rows(self) -> int:
        """Number of items in the pool."""
        return sum(shard.rows for shard in self.shards) - self.deleted

    @property
    def deleted(self) -> int:
        """Number of deleted rows that shards still hold."""
        return sum(map(len, self.dead.values()))

    def live_rows(self, shard: ShardRecord) -> int:
        """Items of a shard that are not deleted."""
        return shard.rows - len(self.dead.get(shard.name, ()))

    @property
    def files(self) -> list[FileRecord]:
        """Every file that this state consists of."""
        return [record for shard in self.shards for record in shard.files] + ([self.rejects] if self.rejects else [])

    def apply(self, change: Change, chain: str) -> Manifest:
        """The next state; ValueError if the change does not fit this one."""
        shards = list(self.shards)
        at = len(shards)
        if change.remove:
            names = [shard.name for shard in shards]
            at = names.index(change.remove[0])
            if tuple(names[at : at + len(change.remove)]) != change.remove:
                raise ValueError(f"shards {change.remove} do not follow one another")
        shards[at : at + len(change.remove)] = change.add
        dead = {name: rows for name, rows in self.dead.items() if name not in change.remove}
        for name, rows in change.dead.items():
            before = dead.get(name, np.empty(0, np.int64))
            dead[name] = np.union1d(before, rows)
            if len(dead[name]) != len(before) + len(rows):
                raise ValueError(f"{name}: a row is deleted twice")
        return replace(
            self,
            shards=tuple(shards),
            dead=dead,
            version=self.version + 1,
            chain=chain,
            next_shard=self.next_shard + len(change.add),
            **change.facts,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form without the checksum."""
        rows = {shard.name: shard.rows for shard in self.shards}
        dead = {name: pack_rows(gone, rows[name]) for name, gone in sorted(self.dead.items())}
        body = asdict(replace(self, dead={}))
        return {"format": FORMAT, "format_version": FORMAT_VERSION, "items": self.rows, **body, "dead": dead}

    @classmethod
    def parse(cls, body: dict[str, Any]) -> Manifest:
        """From JSON of this or the first format version; KeyError, TypeError or ValueError where it is malformed."""
        values = {entry.name: body[entry.name] for entry in fields(cls) if entry.name in body}
        shards = tuple(ShardRecord.parse(shard) for shard in body["shards"])
        rows = {shard.name: shard.rows for shard in shards}
        values |= {
            "shards": shards,
            "writers": tuple(body["writers"]),
            "rejects": None if body["rejects"] is None else FileRecord.parse(body["rejects"]),
            "dead": {str(name): unpack_rows(gone, rows[name]) for name, gone in body.get("dead", {}).items()},
            "next_shard": int(body.get("next_shard", len(shards))),
        }
        if values["dtype"] not in DTYPES:
            raise ValueError(f"dtype {values['dtype']!r}")
        return cls(**values)


def pack_rows(rows: np.ndarray, count: int) -> str:
    """Some of `count` rows as text: a bitmap, compressed."""
    bitmap = np.zeros(count, dtype=bool)
    bitmap[rows] = True
    return base64.b64encode(zlib.compress(np.packbits(bitmap).tobytes(), 6)).decode("ascii")


def unpack_rows(text: str, count: int) -> np.ndarray:
    """What :func:`pack_rows` packed, ascending int64; ValueError for anything else."""
    size = -(-count // 8)
    try:
        packed = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    except zlib.error as error:
        raise ValueError(f"deleted rows: {error}") from None
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8))
    if len(packed) != size or bits[count:].any():
        raise ValueError(f"deleted rows of another shard than one of {count} rows")
    return np.flatnonzero(bits).astype(np.int64)
