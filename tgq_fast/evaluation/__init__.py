"""Full-pool evaluation of embeddings: hit rates and ranking metrics with intervals, comparisons of two evaluations.

`evaluate` is a function here, and a module of the same name holds it.
"""

from tgq_fast.evaluation.evaluate import Comparison, Evaluation, compare, evaluate, format_table
from tgq_fast.evaluation.metrics import Interval

__all__ = ["Comparison", "Evaluation", "Interval", "compare", "evaluate", "format_table"]
