"""Files of this machine and of object stores by one kind of address: "s3://bucket/key" beside a plain path.

S3 goes through Arrow's own client (credentials, region and endpoint from the AWS_… variables), any other store through
`fsspec` and the package it names.

Source: ours.
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Union, cast
from urllib.parse import unquote, urlsplit

from tgq_fast.errors import DependencyError
from tgq_fast.io.files import open_regular

__all__ = ["STORES", "Place", "RemotePath", "absolute", "is_remote", "open_place", "place", "read_place"]

STORES = ("s3", "gs", "gcs", "az", "abfs", "abfss", "adl", "hdfs", "oss", "memory")
"""Schemes that are stores of objects. Web addresses are none: `tgq-fast import` fetches those."""
_ADDRESS = re.compile(rf"^({'|'.join(STORES)}):/+(?=[^/])", re.IGNORECASE)
_BUFFER = 1 << 20
_CONNECT_SECONDS, _ANSWER_SECONDS = 10, 60


class RemotePath(PurePosixPath):
    """A path in an object store; has what the readers of catalogues need of :class:`pathlib.Path`."""

    __slots__ = ()

    def __str__(self) -> str:
        return _ADDRESS.sub(lambda found: found[1].lower() + "://", super().__str__())

    @property
    def inside(self) -> str:
        """The path as the store's own file system has it: bucket and key."""
        return str(self).split("://", 1)[1]

    def exists(self) -> bool:
        """Whether there is such an object, or one below it. OSError where the store cannot be reached."""
        return _kind(self) != "NotFound"

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        return _kind(self) == "Directory"

    def is_file(self) -> bool:
        """Whether there is such an object."""
        return _kind(self) == "File"

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies directly below it."""
        from pyarrow.fs import FileSelector

        system = _system(_scheme(self))
        with _told(self):
            found = system.get_file_info(FileSelector(self.inside))
        yield from (self / entry.base_name for entry in found)


Place = Union[Path, RemotePath]  # noqa: UP007


def is_remote(path: str | PurePosixPath | Path) -> bool:
    """Whether it is an address in an object store; `Path("s3://a/b")`, which folds the slashes, is one, too."""
    return _ADDRESS.match(str(path)) is not None


def place(path: str | Path | RemotePath) -> Place:
    """What an address or a path means; file:// is a path of this machine."""
    if is_remote(path):
        return RemotePath(str(path))
    text = str(path)
    if text.lower().startswith(("file:/", "file://")):
        return Path(unquote(urlsplit(re.sub(r"^file:/+", "file:///", text, flags=re.IGNORECASE)).path))
    return Path(path)


def absolute(path: str | Path) -> str:
    """An address or absolute path that means the same in another working directory."""
    there = place(path)
    return str(there) if isinstance(there, RemotePath) else os.path.abspath(there)


def open_place(path: str | Path | RemotePath) -> BinaryIO:
    """Open for reading at any position.

    Raises:
        OSError: missing, no plain file, or a store that does not answer.
        DependencyError: the store needs a package that is not installed.
    """
    there = place(path)
    if not isinstance(there, RemotePath):
        return open_regular(there)
    with _told(there):
        return cast(BinaryIO, io.BufferedReader(_system(_scheme(there)).open_input_file(there.inside), _BUFFER))


def read_place(path: str | Path | RemotePath, most: int) -> bytes:
    """The first `most` bytes of a file. Errors as for :func:`open_place`."""
    with open_place(path) as file, _told(path):
        return file.read(most)


def _kind(path: RemotePath) -> str:
    with _told(path):
        return str(_system(_scheme(path)).get_file_info(path.inside).type.name)


def _scheme(path: RemotePath) -> str:
    return str(path).split(":", 1)[0]


@cache
def _system(scheme: str) -> Any:
    """Arrow's file system of a scheme."""
    from pyarrow import fs

    if scheme == "s3":
        given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        kind, _, host = given.rpartition("://")
        options = {"endpoint_override": host, "scheme": kind or "https"} if host else {}
        return fs.S3FileSystem(
            region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
            anonymous=os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "yes", "true"),
            connect_timeout=_CONNECT_SECONDS,
            request_timeout=_ANSWER_SECONDS,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=3),
            **options,
        )
    fsspec: Any = import_module("fsspec")

    try:
        return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem(scheme)))
    except ImportError as error:
        raise DependencyError(f"{scheme}:// addresses need a package: {error}") from error


@contextmanager
def _told(path: object) -> Iterator[None]:
    """Whatever a store's client raises becomes an OSError with an errno, as of a file that cannot be read."""
    try:
        yield
    except DependencyError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such object", str(path)) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise OSError(errno.EIO, str(error)[:200], str(path)) from error
