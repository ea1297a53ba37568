"""Embedding and searching with several workers: processes of this machine, or actors of a Ray cluster.

To embed, the catalogue is cut into parts, which workers embed and the process that called commits in order, with the
code and so the bytes of a single process. To search, each worker holds some of a pool's shards. Workers write nothing;
all that survives a crash lies with the caller.
"""

from tgq_fast.scale.engine import PartsEngine
from tgq_fast.scale.processes import ProcessCrew
from tgq_fast.scale.sharded_pool import ShardedPool

__all__ = ["PartsEngine", "ProcessCrew", "ShardedPool", "ray_crew"]


def ray_crew(*args: object, **options: object):  # type: ignore[no-untyped-def]
    """:class:`tgq_fast.scale.ray_actors.RayCrew`; Ray is imported here only."""
    from tgq_fast.scale.ray_actors import RayCrew

    return RayCrew(*args, **options)  # type: ignore[arg-type]
