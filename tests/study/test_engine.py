"""What a study says when one of its workers ends."""

from __future__ import annotations

import pytest

from tgq_fast.study.engine import _why


@pytest.mark.parametrize(
    ("code", "log", "said"),
    [
        (-9, "half a line", "signal SIGKILL"),
        (1, "Traceback …\n\nStorageError: disk full\n", "StorageError: disk full"),
        (1, " \n", "exit status 1 and an empty log: the disk may be full"),
    ],
)
def test_why_a_worker_ended(code: int, log: str, said: str) -> None:
    assert _why(code, log) == said
