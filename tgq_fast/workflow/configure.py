"""Configurations of runs from a preset, a catalogue and overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgq_fast.arguments import checked
from tgq_fast.defaults import plain_defaults
from tgq_fast.errors import ArgumentError
from tgq_fast.watch import SILENT, Watch
from tgq_fast.workflow.opening import load_towers

if TYPE_CHECKING:
    from tgq_fast.data import Catalog
    from tgq_fast.models import TGQFormerConfig


@checked
def make_config(
    catalog: Catalog,
    *,
    preset: str,
    connector: str = "tgq",
    fields: Sequence[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    match: bool = True,
    watch: Watch = SILENT,
) -> TGQFormerConfig:
    """Configuration of a run with the widths of its towers filled in.

    Args:
        catalog: fields are checked against it, and chosen from it when `fields` is None.
        preset: "tiny", "paper" or "large".
        connector: which connector; with `match` it gets as many trainable parameters as tgq would have.
        overrides: further configuration fields.

    Raises:
        ArgumentError: unknown field, preset, connector or configuration field.
    """
    from tgq_fast.data.guides import suggest_fields
    from tgq_fast.models import CONNECTORS, TGQFormerConfig, match_budget

    known = catalog.field_names()
    chosen = suggest_fields(catalog) if fields is None else list(fields)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ArgumentError("fields", ", ".join(unknown), "fields of this catalogue: " + ", ".join(known))
    if connector not in CONNECTORS:
        raise ArgumentError("connector", repr(connector), "one of " + ", ".join(CONNECTORS))
    config = _with_overrides(TGQFormerConfig.preset(preset, fields=chosen), overrides, "connector", "fields")
    config = config.with_towers(*load_towers(config, watch))
    if connector == "tgq":
        return config
    if match and "intermediate_size" not in (overrides or {}):
        return match_budget(config, connector)
    return config.with_connector(connector)


def continued_config(
    run: Path, *, connector: str | None, fields: Sequence[str] | None, overrides: Mapping[str, Any]
) -> TGQFormerConfig:
    """Configuration of a run that starts from another: the other's, but for overrides.

    Args:
        run: the other run.
        connector, fields: asked for, or None; what the run has cannot change.
        overrides: configuration fields that only training reads.

    Raises:
        ArgumentError: another connector, other fields, or an unknown configuration field.
        CheckpointError: the run holds no trained model.
    """
    from tgq_fast.training.warm import warm_start

    held = warm_start(run).config
    for name, asked, own in (("connector", connector, held.connector), ("fields", fields, list(held.fields))):
        if asked is not None and asked != own:
            raise ArgumentError(name, repr(asked), f"{own!r}, as in {run}, or nothing")
    return _with_overrides(held, overrides, "connector", "fields")


def _with_overrides(config: TGQFormerConfig, overrides: Mapping[str, Any] | None, *reserved: str) -> TGQFormerConfig:
    """A copy with other values of some fields, but for reserved ones.

    Raises:
        ArgumentError: an unknown or reserved field, or a value that it cannot have.
    """
    values, changed = config.to_dict(), dict(overrides or {})
    if wrong := [name for name in changed if name not in values or name in (*reserved, "model_type")]:
        own = f"; {' and '.join(reserved)} have arguments of their own" if set(wrong) & set(reserved) else ""
        raise ArgumentError("overrides", ", ".join(map(str, wrong)), "fields of TGQFormerConfig" + own)
    made: TGQFormerConfig = type(config).from_dict(values | changed)
    return made


@plain_defaults()
@checked
def connector_table(preset: str, overrides: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Per connector, at the budget of the preset's tgq: what it does, its source, tokens, trainable parameters and
    multiply-accumulates per item. No tower is loaded: widths and L are the configuration's.

    Raises:
        ArgumentError: an unknown configuration field, or a connector that cannot have these sizes.
    """
    from tgq_fast.models import CONNECTORS, TGQFormerConfig, match_budget
    from tgq_fast.models.flops import connector_cost

    config = _with_overrides(TGQFormerConfig.preset(preset), overrides, "connector")
    rows = []
    for name, spec in CONNECTORS.items():
        cost = connector_cost(match_budget(config, name))
        rows.append(
            {
                "connector": name,
                "what it does": spec.summary,
                "source": spec.source,
                "reader sees metadata": spec.reader_sees_metadata,
                "tokens": spec.tokens(config),
                "parameters": cost.parameters,
                "macs": cost.macs,
            }
        )
    return rows
