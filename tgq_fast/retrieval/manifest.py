"""The manifest of an item pool: what the shards are, who wrote them, and their checksums."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tgq_fast.data.files import write_atomic
from tgq_fast.errors import PoolError
from tgq_fast.retrieval._identity import canonical_json

FORMAT = "tgq-fast item pool"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class FileRecord:
    """A file of the pool: its name, size in bytes and SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """One shard.

    Attributes:
        rows: number of items n.
        embeddings: safetensors file with the tensor "embeddings" [n, D].
        ids: Parquet file with the string column "id" [n].
        source_stop: for shards cut from a catalogue, how many catalogue rows are done once this shard is; else None.
    """

    rows: int
    embeddings: FileRecord
    ids: FileRecord
    source_stop: int | None = None


@dataclass
class Manifest:
    """Everything in `manifest.json`. No timestamps: the same work gives the same bytes.

    Attributes:
        dims: D.
        dtype: storage type of the embeddings, one of :data:`DTYPES`.
        shard_size: most rows a shard may hold.
        model: digest of the model that made the embeddings; "" when unknown.
        source: digest of the catalogue the pool was cut from; "" when it was filled by hand.
        writers: distinct {version, commit} of tgq_fast that wrote, in order of first write.
        shards: in pool order.
        rejects: record of the reject log, or None.
        rejected: number of items in the reject log.
    """

    dims: int
    dtype: str
    shard_size: int
    model: str = ""
    source: str = ""
    writers: list[dict[str, str]] = field(default_factory=list)
    shards: list[ShardRecord] = field(default_factory=list)
    rejects: FileRecord | None = None
    rejected: int = 0

    @property
    def rows(self) -> int:
        """Number of items in the pool."""
        return sum(shard.rows for shard in self.shards)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form without the checksum."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, "items": self.rows, **asdict(self)}

    def save(self, folder: Path) -> None:
        """Write atomically, with a checksum over the content."""
        body = self.to_dict()
        body["checksum"] = _checksum(body)
        text = json.dumps(body, indent=1, ensure_ascii=False) + "\n"
        write_atomic(folder / MANIFEST_NAME, text.encode("utf-8"))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and check.

        Raises:
            PoolError: missing, not JSON, foreign, of another format version, or its checksum does not fit.
        """
        path = folder / MANIFEST_NAME
        try:
            body = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise PoolError(f"{folder} is not an item pool: it has no {MANIFEST_NAME}") from None
        except (OSError, ValueError) as error:
            raise PoolError(f"{path}: not readable as JSON ({error}); the pool is corrupt, embed it again") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise PoolError(f"{path}: foreign file, expected format {FORMAT!r}")
        if body.get("format_version") != FORMAT_VERSION:
            raise PoolError(
                f"{path}: format version {body.get('format_version')!r}, this release reads {FORMAT_VERSION}; "
                "use a matching release of tgq_fast or embed again"
            )
        if body.pop("checksum", None) != _checksum(body):
            raise PoolError(f"{path}: checksum does not fit its content; the manifest was altered or damaged")
        try:
            return cls._parse(body)
        except (KeyError, TypeError, ValueError) as error:
            raise PoolError(f"{path}: malformed ({type(error).__name__}: {error})") from None

    @classmethod
    def _parse(cls, body: dict[str, Any]) -> Manifest:
        values = {entry.name: body[entry.name] for entry in fields(cls)}
        values["shards"] = [
            ShardRecord(int(shard["rows"]), _record(shard["embeddings"]), _record(shard["ids"]), shard["source_stop"])
            for shard in values["shards"]
        ]
        values["rejects"] = None if values["rejects"] is None else _record(values["rejects"])
        if values["dtype"] not in DTYPES:
            raise ValueError(f"dtype {values['dtype']!r}")
        return cls(**values)


def _record(value: dict[str, Any]) -> FileRecord:
    name = str(value["name"])
    if Path(name).name != name or name.startswith("."):  # a manifest may only name files of its own folder
        raise ValueError(f"file name {name!r}")
    return FileRecord(name, int(value["bytes"]), str(value["sha256"]))


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(body).encode("utf-8")).hexdigest()
