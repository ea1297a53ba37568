"""Plain PyTorch definitions of every operator: short, slow, right.

Every function works in any floating dtype including fp64 and is differentiable by autograd. The
operators in :mod:`tgq_fast.ops` have the same signatures and are held to these by the parity tests.
"""

from tgq_fast.reference.cross_attention import AttentionStats, HybridAttentionOutput, hybrid_cross_attention
from tgq_fast.reference.info_nce import info_nce
from tgq_fast.reference.modulation import GateParameters, ModulationOutput, centred_sigmoid, dual_gated_modulation
from tgq_fast.reference.redundancy import redundancy_loss
from tgq_fast.reference.stream_attention import stream_mask, stream_self_attention
from tgq_fast.reference.topk import TopK, exact_topk

__all__ = [
    "AttentionStats",
    "GateParameters",
    "HybridAttentionOutput",
    "ModulationOutput",
    "TopK",
    "centred_sigmoid",
    "dual_gated_modulation",
    "exact_topk",
    "hybrid_cross_attention",
    "info_nce",
    "redundancy_loss",
    "stream_mask",
    "stream_self_attention",
]
