"""Whether training helped: the trained model against the frozen feature without training, on the validation queries.

Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tgq_fast.data import Catalog
from tgq_fast.evaluation import Evaluation, compare, evaluate
from tgq_fast.models.features import FeatureStore
from tgq_fast.pool import zero_shot_embeddings
from tgq_fast.pool.embed import RAW_FLOOR, WHITENED_FLOOR

__all__ = ["Verdict", "judge", "measure_floors"]

_JUDGED = ("HR@1", "HR@10", "MRR")
_SAMPLES = 1000


def measure_floors(
    catalog: Catalog, raw: FeatureStore, whitened: FeatureStore | None, split: str
) -> dict[str, Evaluation]:
    """Evaluations of the frozen image feature alone, raw and whitened."""
    stores = {RAW_FLOOR: raw, WHITENED_FLOOR: whitened}
    return {
        name: evaluate(catalog, zero_shot_embeddings(catalog, store), ks=(1, 10, 100), split=split, samples=0)
        for name, store in stores.items()
        if store is not None
    }


@dataclass(frozen=True)
class Verdict:
    """What validation says about a run.

    Attributes:
        keep: "trained", or the floor that is better.
        words: the verdict in a few sentences.
        floors: floor → metric → value.
        differences: metric → (trained minus the better floor, low, high), 95 % intervals over groups.
    """

    keep: str
    words: str
    floors: dict[str, dict[str, float]]
    differences: dict[str, tuple[float, float, float]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "keep": self.keep,
            "words": self.words,
            "floors": self.floors,
            "differences": {name: list(value) for name, value in self.differences.items()},
        }


def judge(trained: Evaluation, floors: dict[str, Evaluation]) -> Verdict:
    """Compare a trained model with the better floor at HR@1, HR@10 and MRR.

    Training is kept if it is better on average over the three and significantly worse in none.
    """

    def score(evaluation: Evaluation) -> float:
        return sum(evaluation[name] for name in _JUDGED) / len(_JUDGED)

    name, floor = max(floors.items(), key=lambda entry: score(entry[1]))
    differences = {}
    for metric in _JUDGED:
        found = compare(trained, floor, metric).difference
        differences[metric] = (found.value, found.low, found.high)
    worse = [metric for metric, (_, _, high) in differences.items() if high < 0]
    helps = score(trained) >= score(floor) and not worse
    sure = [metric for metric, (_, low, _) in differences.items() if low > 0]
    shown = ", ".join(f"{m} {v:+.3f} [{low:+.3f}, {high:+.3f}]" for m, (v, low, high) in differences.items())
    groups = "" if trained.group is None else f" in {len(set(trained.group.tolist()))} groups"
    what = f"on {trained.queries} validation queries{groups}, trained minus {name}: {shown} (95 % over groups)"
    if helps and sure:
        words = f"Training helped: {what}."
    elif helps:
        words = f"Training did not hurt, but its gain is within chance: {what}. {_ADVICE}"
    else:
        words = f"Training did not help, so what needs none is kept, {name}: {what}. {_ADVICE}"
    values = {n: {m: i.value for m, i in e.metrics.items()} for n, e in floors.items()}
    return Verdict("trained" if helps else name, words, values, differences)


_ADVICE = (
    "What may help: other guiding fields (those that mates share), more pairs or groups, training views of the "
    "pictures that shoppers send, or another vision tower."
)
