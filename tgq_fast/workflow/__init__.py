"""What the verbs of the command line, `make demo` and the report do: whole steps over catalogue, run and pool folders.

Results are returned as typed objects or plain dicts. Nothing is printed: a :class:`tgq_fast.watch.Watch` is told.
"""

from tgq_fast.workflow.configure import connector_table, continued_config, make_config
from tgq_fast.workflow.embed import catalog_of, embed_run, parts_engine
from tgq_fast.workflow.evaluate import evaluate_run, metric_table
from tgq_fast.workflow.opening import Policy, load_towers, open_run, open_store, zero_shot_model
from tgq_fast.workflow.train import DEFAULT_VIEWS, default_epochs, steps_per_epoch, train_run

__all__ = [
    "DEFAULT_VIEWS",
    "Policy",
    "catalog_of",
    "connector_table",
    "continued_config",
    "default_epochs",
    "embed_run",
    "evaluate_run",
    "load_towers",
    "make_config",
    "metric_table",
    "open_run",
    "open_store",
    "parts_engine",
    "steps_per_epoch",
    "train_run",
    "zero_shot_model",
]
