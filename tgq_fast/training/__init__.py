"""Training: pairs of items, the trainer, and a run in a folder."""

from tgq_fast.training.pairs import DistinctBatchSampler, PairCollator, PairDataset
from tgq_fast.training.run import TrainResult, train
from tgq_fast.training.sharding import shard_model, whole_state
from tgq_fast.training.trainer import TGQTrainer

__all__ = [
    "DistinctBatchSampler",
    "PairCollator",
    "PairDataset",
    "TGQTrainer",
    "TrainResult",
    "shard_model",
    "train",
    "whole_state",
]
