"""64-bit hashes of ids, many at a time.

Source: ours (the mixing steps are those of MurmurHash3's finaliser).
"""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

__all__ = ["hash_ids"]

_LONG = 256  # bytes from which an id is hashed by itself, not with the others word by word
_FIRST, _SECOND = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)


def hash_ids(ids: pa.StringArray | pa.LargeStringArray) -> np.ndarray:
    """[n] uint64 hash of each id's UTF-8 bytes; the same in every process and on every machine."""
    count = len(ids)
    if not count:
        return np.empty(0, np.uint64)
    _, offsets, data = ids.buffers()
    width = "<i8" if pa.types.is_large_string(ids.type) else "<i4"
    stops = np.frombuffer(offsets, dtype=width)[ids.offset : ids.offset + count + 1].astype(np.int64)
    data = b"" if data is None else data[int(stops[0]) : int(stops[-1])].to_pybytes()  # of a slice its own
    stops -= stops[0]
    starts, lengths = stops[:-1], np.diff(stops)
    padded = np.frombuffer(data + bytes(8), dtype=np.uint8)
    words = np.ndarray((len(padded) - 7,), dtype="<u8", buffer=padded, strides=(1,))  # at every byte, not aligned
    state = _mix(lengths.astype(np.uint64))
    active = np.flatnonzero((lengths > 0) & (lengths < _LONG))
    done = 0
    while active.size:
        left = lengths[active] - done
        word = words[starts[active] + done].astype(np.uint64)
        unused = np.maximum(8 - left, 0).astype(np.uint64) * np.uint64(8)
        state[active] = _mix(state[active] ^ ((word << unused) >> unused)) + np.uint64(done + 1)
        done += 8
        active = active[left > 8]
    for row in np.flatnonzero(lengths >= _LONG).tolist():
        digest = hashlib.blake2b(ids[row].as_py().encode("utf-8"), digest_size=8).digest()
        state[row] = int.from_bytes(digest, "little")
    return state


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> _SHIFT)) * _FIRST
    value = (value ^ (value >> _SHIFT)) * _SECOND
    mixed: np.ndarray = value ^ (value >> _SHIFT)
    return mixed
