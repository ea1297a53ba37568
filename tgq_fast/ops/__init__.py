"""Operators: the reference's functions with a choice of backend.

Same names and signatures as :mod:`tgq_fast.reference`, plus `backend=None`. Which backend runs, and why, is told by
:func:`explain`; :func:`use_backend` and the environment variable ``TGQ_BACKEND`` override the choice.
"""

from tgq_fast.ops.cross_attention import hybrid_cross_attention
from tgq_fast.ops.dispatch import BACKENDS, Decision, explain, use_backend
from tgq_fast.ops.info_nce import info_nce
from tgq_fast.ops.modulation import dual_gated_modulation
from tgq_fast.ops.patch import patch, unpatch
from tgq_fast.ops.redundancy import redundancy_loss
from tgq_fast.ops.stream_attention import stream_self_attention
from tgq_fast.reference import AttentionStats, GateParameters, HybridAttentionOutput, ModulationOutput

__all__ = [
    "BACKENDS",
    "AttentionStats",
    "Decision",
    "GateParameters",
    "HybridAttentionOutput",
    "ModulationOutput",
    "dual_gated_modulation",
    "explain",
    "hybrid_cross_attention",
    "info_nce",
    "patch",
    "redundancy_loss",
    "stream_self_attention",
    "unpatch",
    "use_backend",
]
