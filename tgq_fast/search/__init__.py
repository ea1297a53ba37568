"""Exact top-k over all rows: `topk` with its backends, quantised codes, results merged over parts and processes.

`topk` is a function here, and a module of the same name holds it.
"""

from tgq_fast.search.codes import Codes, build_codes
from tgq_fast.search.distributed import group_topk
from tgq_fast.search.topk import TopK, merge_topk, topk

__all__ = ["Codes", "TopK", "build_codes", "group_topk", "merge_topk", "topk"]
