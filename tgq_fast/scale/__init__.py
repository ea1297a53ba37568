"""Embedding with several workers: processes of this machine, or actors of a Ray cluster.

The catalogue is cut into parts, which workers embed and the process that called commits in order, with the code and so
the bytes of a single process. Workers write nothing; all that survives a crash lies with the caller.
"""

from tgq_fast.scale.engine import PartsEngine
from tgq_fast.scale.processes import ProcessCrew

__all__ = ["PartsEngine", "ProcessCrew", "ray_crew"]


def ray_crew(*args: object, **options: object):  # type: ignore[no-untyped-def]
    """:class:`tgq_fast.scale.ray_actors.RayCrew`; Ray is imported here only."""
    from tgq_fast.scale.ray_actors import RayCrew

    return RayCrew(*args, **options)  # type: ignore[arg-type]
