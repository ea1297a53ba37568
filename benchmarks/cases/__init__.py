"""Every case of the registry; importing this package registers them."""

from benchmarks.cases import attention, connector, losses, modulation, pipeline, search, streams

__all__ = ["attention", "connector", "losses", "modulation", "pipeline", "search", "streams"]
