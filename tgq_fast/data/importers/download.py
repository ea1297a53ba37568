"""Pictures by web address: bounded, resumable and polite.

A picture is fetched once and kept under the hash of its address, so that an interrupted import goes on where it ended.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from tgq_fast._version import __version__
from tgq_fast.data.images import load_image
from tgq_fast.data.importers.common import suffix_of_content
from tgq_fast.errors import ImageError
from tgq_fast.io.files import write_atomic

__all__ = ["DownloadLimits", "Downloader"]

_AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))
_REDIRECTS = frozenset((301, 302, 303, 307, 308))


@dataclass(frozen=True)
class DownloadLimits:
    """How fetching behaves.

    Attributes:
        max_bytes: of one picture; more is refused while it is read.
        timeout: seconds to connect and between two pieces.
        total: seconds that one picture may take in all, against servers that trickle.
        attempts: tries per address.
        wait: seconds before the second try, doubled for each further one; a server's Retry-After goes before, at most
            `longest_wait`.
        per_host: fetches at the same time from one host.
        interval: seconds between the starts of two fetches from one host.
        workers: fetches at the same time in all.
        redirects: at most so many per address.
        private: also fetch from addresses of this machine and of private networks.
        failures: a host that fails so many times in a row is not asked again.
    """

    max_bytes: int = 32 << 20
    timeout: float = 20.0
    total: float = 120.0
    attempts: int = 3
    wait: float = 1.0
    longest_wait: float = 60.0
    per_host: int = 4
    interval: float = 0.05
    workers: int = 8
    redirects: int = 5
    private: bool = False
    failures: int = 20


class _Refused(Exception):
    """One address cannot be had; `again` says whether another try may help, after `wait` seconds if the server says."""

    def __init__(self, reason: str, *, again: bool = False, wait: float | None = None) -> None:
        self.again, self.wait = again, wait
        super().__init__(reason)


class _Host:
    def __init__(self, limits: DownloadLimits) -> None:
        self.slots = threading.Semaphore(limits.per_host)
        self.lock = threading.Lock()
        self.next = 0.0
        self.failures = 0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are followed by us, so that each address on the way is checked."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Downloader:
    """Fetches pictures into a folder.

    Args:
        folder: where they are kept, by the hash of their address.
        limits: of size, time and pace.
    """

    def __init__(self, folder: Path, limits: DownloadLimits = DownloadLimits()) -> None:
        self.folder, self.limits = folder, limits
        self.fetched = self.reused = 0
        self._hosts: dict[str, _Host] = {}
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler())

    def fetch_all(self, addresses: Iterable[str], on_done: Callable[[], None] | None = None) -> dict[str, Path | str]:
        """Address → file, or the reason why there is none."""
        wanted = list(dict.fromkeys(addresses))

        def one(address: str) -> Path | str:
            try:
                return self.fetch(address)
            except _Refused as error:
                return str(error)
            finally:
                if on_done is not None:
                    on_done()

        with ThreadPoolExecutor(self.limits.workers) as pool:
            return dict(zip(wanted, pool.map(one, wanted), strict=True))

    def fetch(self, address: str) -> Path:
        """The picture of one address, from the folder or from the web; :class:`_Refused` with the reason."""
        name = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        kept = next(iter(self.folder.glob(f"{name}.*")), None) if self.folder.is_dir() else None
        if kept is not None:
            with self._lock:
                self.reused += 1
            return kept
        host = self._host(address)
        for attempt in range(1, self.limits.attempts + 1):
            if host.failures >= self.limits.failures:
                raise _Refused(f"its host failed {host.failures} times in a row and is not asked again")
            try:
                data = self._polite(address, host)
                break
            except _Refused as error:
                with host.lock:
                    host.failures += error.again
                if not error.again or attempt == self.limits.attempts:
                    raise
                pause = self.limits.wait * 2 ** (attempt - 1) if error.wait is None else error.wait
                time.sleep(min(pause, self.limits.longest_wait))
        host.failures = 0
        path = self.folder / f"{name}{_checked(data)}"
        write_atomic(path, data)
        with self._lock:
            self.fetched += 1
        return path

    def _host(self, address: str) -> _Host:
        try:
            parts = urlsplit(address)
            name = parts.hostname
            _ = parts.port
        except ValueError:
            raise _Refused("no web address") from None
        if parts.scheme not in ("http", "https") or not name:
            raise _Refused(f"no web address of http or https: {address[:80]!r}")
        with self._lock:
            return self._hosts.setdefault(f"{name}:{parts.port}", _Host(self.limits))

    def _polite(self, address: str, host: _Host) -> bytes:
        with host.slots:
            with host.lock:
                now = time.monotonic()
                start = max(now, host.next)
                host.next = start + self.limits.interval
            time.sleep(start - now)
            return self._follow(address)

    def _follow(self, address: str) -> bytes:
        end = time.monotonic() + self.limits.total
        for _ in range(self.limits.redirects + 1):
            self._check_target(address)
            request = urllib.request.Request(
                _ascii(address), headers={"User-Agent": f"tgq-fast/{__version__}", "Accept": "image/*"}
            )
            try:
                with self._opener.open(request, timeout=self.limits.timeout) as answer:
                    return self._read(answer, end)
            except urllib.error.HTTPError as error:
                place = error.headers.get("Location")
                if error.code in _REDIRECTS and place:
                    address = urljoin(address, place)
                    continue
                wait = error.headers.get("Retry-After", "")
                seconds = float(wait) if wait.isdecimal() else None
                raise _Refused(f"the server says {error.code}", again=error.code in _AGAIN, wait=seconds) from None
            except (OSError, http.client.HTTPException) as error:
                text = str(getattr(error, "reason", error)) or type(error).__name__
                raise _Refused(f"cannot be fetched: {text[:100]}", again=True) from None
            except (ValueError, UnicodeError) as error:
                raise _Refused(f"no web address: {str(error)[:80]}") from None
        raise _Refused(f"more than {self.limits.redirects} redirects")

    def _check_target(self, address: str) -> None:
        """Refuse what is no http(s) and, unless allowed, hosts of this machine and of private networks."""
        self._host(address)
        if self.limits.private:
            return
        parts = urlsplit(address)
        try:
            found = socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise _Refused(f"its host cannot be found: {error}", again=isinstance(error, socket.gaierror)) from None
        for *_, place in found:
            if not ipaddress.ip_address(str(place[0]).split("%")[0]).is_global:
                raise _Refused("its host is this machine or in a private network, which has to be allowed")

    def _read(self, answer: Any, end: float) -> bytes:
        kind = answer.headers.get_content_type()
        if kind.startswith("text/") or kind in ("application/json", "application/xml"):
            raise _Refused(f"the server sends {kind}, no picture")
        length = answer.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) > self.limits.max_bytes:
            raise _Refused(f"{length} bytes, at most {self.limits.max_bytes}")
        pieces, size = [], 0
        while piece := answer.read1(1 << 16):
            size += len(piece)
            if size > self.limits.max_bytes:
                raise _Refused(f"more than {self.limits.max_bytes} bytes")
            if time.monotonic() > end:
                raise _Refused(f"took longer than {self.limits.total:.0f} seconds", again=True)
            pieces.append(piece)
        if length.isdecimal() and size < int(length):
            raise _Refused(f"broke off after {size} of {length} bytes", again=True)
        return b"".join(pieces)


def _ascii(address: str) -> str:
    """The address with what is not ASCII percent-encoded, as browsers do."""
    parts = urlsplit(address.strip())
    host = parts.netloc.encode("idna").decode() if not parts.netloc.isascii() else parts.netloc
    safe = "%/:=&?~#+!$,;'@()*[]"
    return urlunsplit((parts.scheme, host, quote(parts.path, safe=safe), quote(parts.query, safe=safe), ""))


def _checked(data: bytes) -> str:
    """Suffix of a picture by its content; it must decode."""
    try:
        load_image(data, "picture")
    except ImageError as error:
        raise _Refused(f"what came is no usable picture: {error.reason} {error.detail}".rstrip()) from None
    return suffix_of_content(data)
