"""Every case of the registry; importing this package registers them."""

from benchmarks.cases import (
    connector,
    cross_attention,
    info_nce,
    modulation,
    pipeline,
    redundancy,
    search,
    stream_attention,
)

__all__ = [
    "connector",
    "cross_attention",
    "info_nce",
    "modulation",
    "pipeline",
    "redundancy",
    "search",
    "stream_attention",
]
