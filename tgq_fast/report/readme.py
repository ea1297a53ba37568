"""``python -m tgq_fast.report.readme README.md docs/results``: retrieval figures of a folder's result files.

A result file is the study.json of `tgq-fast study`, or the results.json that `make demo` writes. The table replaces
what is between ``<!-- retrieval:begin -->`` and ``<!-- retrieval:end -->``. A catalogue that has a study shows that
alone; of demos, several files of one catalogue are its seeds.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tgq_fast.errors import ArgumentError
from tgq_fast.io.files import write_atomic
from tgq_fast.io.json_text import read_json
from tgq_fast.io.sealed import unseal

__all__ = ["beats_all", "fill", "main", "retrieval_table", "study_table"]

_BLOCK = re.compile(r"(<!-- retrieval:begin -->\n).*?(<!-- retrieval:end -->)", re.DOTALL)
_OURS = "files written by study or demo alone"
_METRICS = ("HR@1", "HR@10", "HR@100", "H@100", "MRR")


def fill(text: str, files: Sequence[Path]) -> str:
    """A document with its table of retrieval figures made anew.

    Raises:
        ArgumentError: the document has no marked place, or a result file is damaged or none.
    """
    if not _BLOCK.search(text):
        raise ArgumentError("document", "no marked place", "<!-- retrieval:begin --> and <!-- retrieval:end -->")
    table = retrieval_table([(path.as_posix(), _read(path)) for path in files])
    return _BLOCK.sub(lambda match: match[1] + table + match[2], text)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = read_json(path.read_bytes())
        if not isinstance(document, dict):
            raise ValueError(f"a {type(document).__name__}")
        return unseal(document)
    except (OSError, ValueError) as error:
        raise ArgumentError("result files", f"{path}: {error}", _OURS) from error


_INTERVAL: dict[str, Any] = {"value": float, "low": float, "high": float}
_DEMO: dict[Any, Any] = {
    "seed": int,
    "command": str,
    "fields": [str],
    "results": {str: {"queries": int, "pool_size": int, "metrics": dict.fromkeys(_METRICS, _INTERVAL)}},
}
_STUDY: dict[Any, Any] = {
    "main": str,
    "metrics": [str],
    "pooled": dict,
    "plan": {"fields": [str], "seeds": int, "conditions": [str]},
    "test": {"queries": int, "groups": int, "pool": int},
    "rows": {str: {"facts": dict, "metrics": dict}},
}


def _check(name: str, result: Mapping[str, Any]) -> None:
    """ArgumentError for a result file that lacks what its table shows, by the place where it lacks it."""
    if not isinstance(result.get("catalogue"), str):
        raise ArgumentError("result files", f"{name} without a catalogue", _OURS)
    if "plan" not in result:
        _check_shape(name, result, _DEMO)
        return
    _check_shape(name, result, _STUDY)
    if not any(metric.startswith("H@") for metric in result["metrics"]):
        raise ArgumentError("result files", f"{name}: metrics without an H@K", _OURS)
    shown = [metric for metric in result["metrics"] if metric.startswith(("H@", "HR@"))]
    for row_name, row in result["rows"].items():
        cells: dict[str, Any] = {"metrics": _INTERVAL}
        if "against" in row or row["facts"].get("ablation"):
            cells["against"] = {"verdict": str}
        for kind, cell in cells.items():
            wanted = {place: dict.fromkeys(shown, cell) for place in ("clean", *result["pooled"])}
            _check_shape(f"{name}: rows.{row_name}", row, {kind: wanted})


def _check_shape(where: str, value: Any, shape: Any) -> None:
    """`shape` is a type, [shape of each], {str: shape of each of at least one}, or {name: shape}."""
    kind: Any = type(shape) if isinstance(shape, (dict, list)) else (int, float) if shape is float else shape
    if not isinstance(value, kind) or (isinstance(shape, dict) and not value):
        raise ArgumentError("result files", f"{where}: {type(value).__name__} {str(value)[:40]}", _OURS)
    if isinstance(shape, list):
        for entry in value:
            _check_shape(where, entry, shape[0])
    for name, inner in shape.items() if isinstance(shape, dict) else ():
        for key in value if name is str else [name]:
            if key not in value:
                raise ArgumentError("result files", f"{where} without {key}", _OURS)
            _check_shape(f"{where}.{key}", value[key], inner)


def retrieval_table(results: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Markdown: per catalogue one table; mean and range over seeds, or value and bootstrap interval of a single one."""
    if not results:
        return "No result files yet.\n"
    for name, result in results:
        _check(name, result)
    studies = [(name, result) for name, result in results if "plan" in result]
    studied = {result["catalogue"] for _, result in studies}
    results = [(n, result) for n, result in results if "plan" not in result and result["catalogue"] not in studied]
    groups: dict[tuple[str, str, str], list[tuple[str, Mapping[str, Any]]]] = defaultdict(list)
    for name, result in sorted(results, key=lambda entry: (entry[1]["catalogue"], entry[1]["seed"])):
        groups[(result["catalogue"], ", ".join(result["fields"]), result["command"])].append((name, result))
    parts = [study_table(name, study) for name, study in studies]
    for (catalogue, fields, command), entries in groups.items():
        first = next(iter(entries[0][1]["results"].values()))
        seeds = ", ".join(str(result["seed"]) for _, result in entries)
        lines = [
            f"**{catalogue}**: {first['queries']:,} test queries, every item of {first['pool_size']:,} a candidate, "
            f"guided by {fields or 'nothing'}; seed{'s' if len(entries) > 1 else ''} {seeds}; "
            + ("mean [least, greatest]." if len(entries) > 1 else "95 % bootstrap intervals."),
            "",
            "| run | " + " | ".join(_METRICS) + " |",
            "|---|" + "---:|" * len(_METRICS),
        ]
        names = list(dict.fromkeys(name for _, result in entries for name in result["results"]))
        for name in names:
            found = [result["results"][name]["metrics"] for _, result in entries if name in result["results"]]
            lines.append(f"| {name} | " + " | ".join(_cell([m[metric] for m in found]) for metric in _METRICS) + " |")
        sources = ", ".join(f"`{name}`" for name, _ in entries)
        parts.append("\n".join([*lines, "", f"Made by `{command}`: {sources}.", ""]))
    return "\n".join(parts)


def study_table(name: str, study: Mapping[str, Any]) -> str:
    """Markdown table of one study: clean metrics, and H@K of the largest K over overlays, scenes and everything.

    A value of the main row is bold where every other connector and floor is worse beyond its interval (none is where
    only floors are beside it); ablations carry an arrow where they differ from the main row beyond the interval.
    """
    last = [metric for metric in study["metrics"] if metric.startswith("H@")][-1]
    columns = [("clean", m) for m in study["metrics"] if m.startswith("HR@")] + [("clean", last)]
    columns += [(place, last) for place in study["pooled"] if place != "all"] + [("all", last)] * (
        "all" in study["pooled"]
    )
    test, plan = study["test"], study["plan"]
    lines = [
        f"**{study['catalogue']}**: {test['queries']:,} test queries of {test['groups']:,} groups, every item of "
        f"{test['pool']:,} a candidate, guided by {', '.join(plan['fields']) or 'nothing'}; {_seeds(plan['seeds'])}, "
        "95 % bootstrap intervals over groups"
        + "; bold: better than every other connector and floor beyond the paired interval" * bool(_rivals(study))
        + "; ↓ ↑: worse or better than the whole beyond the paired interval" * bool(plan.get("ablations"))
        + ".",
        "",
        "| row | " + " | ".join(f"{metric} {place}" for place, metric in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for row_name, row in study["rows"].items():
        cells = []
        for place, metric in columns:
            value = row["metrics"][place][metric]
            text = f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
            if row["facts"].get("ablation"):
                text += {"win": " ↓", "loss": " ↑", "tie": ""}[row["against"][place][metric]["verdict"]]
            won = row_name == study["main"] and beats_all(study, place, metric)
            cells.append(f"**{text}**" if won else text)
        lines.append(f"| {row_name} | " + " | ".join(cells) + " |")
    conditions = ", ".join(plan["conditions"])
    return "\n".join([*lines, "", f"Made by `tgq-fast study` under {conditions}: `{name}`.", ""])


def beats_all(study: Mapping[str, Any], place: str, metric: str) -> bool:
    """Whether every rival is worse than the main row beyond its interval; never where only floors stand beside it."""
    rivals = _rivals(study)
    return bool(rivals) and all(rival["against"][place][metric]["verdict"] == "win" for rival in rivals)


def _rivals(study: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows of other connectors and of floors; none where only floors stand beside the main row."""
    rows = [row for row in study["rows"].values() if "against" in row and not row["facts"].get("ablation")]
    return [] if all(row["facts"].get("stage") == "floor" for row in rows) else rows


def _seeds(count: int) -> str:
    return f"mean of {count} seeds" if count > 1 else "one seed"


def _cell(values: Sequence[Mapping[str, float]]) -> str:
    middle = [value["value"] for value in values]
    low, high = (min(middle), max(middle)) if len(values) > 1 else (values[0]["low"], values[0]["high"])
    return f"{sum(middle) / len(middle):.3f} [{low:.3f}, {high:.3f}]"


def main(arguments: Sequence[str]) -> int:
    """Rewrite a document in place."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    document, folder = map(Path, arguments)
    write_atomic(document, fill(document.read_text(encoding="utf-8"), sorted(folder.glob("*.json"))).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
