"""What a batch of frozen features may be asked for: fields to keep, rows of metadata, views of pictures.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgq_fast.arguments import row_numbers
from tgq_fast.errors import ArgumentError
from tgq_fast.models.pictures import ChosenViews, PictureFeatures

__all__ = ["kept_fields", "metadata_rows", "viewed"]

Draw = Callable[[int, np.random.Generator], NDArray[np.bool_]]


def kept_fields(keep: Any, drop_fields: Any, shape: tuple[int, int], draw: Draw) -> NDArray[np.bool_] | None:
    """[B, F] bool: `keep`, or what `draw` makes of a generator; None for all fields.

    Raises:
        ArgumentError: another shape or dtype, or no generator.
    """
    if drop_fields is not None and not isinstance(drop_fields, np.random.Generator):
        raise ArgumentError("drop_fields", f"a {type(drop_fields).__name__}", "numpy.random.default_rng(seed), or None")
    if keep is None:
        return None if drop_fields is None else draw(shape[0], drop_fields)
    try:
        given = np.asarray(keep)
    except Exception:  # ragged lists, tensors of another device
        raise ArgumentError("keep", f"a {type(keep).__name__}", f"bool of shape {shape} in NumPy") from None
    if given.dtype != bool or given.shape != shape:
        told = f"{given.dtype} of shape {given.shape}"
        raise ArgumentError("keep", told, f"bool of shape {shape}: for each row, each field of the configuration")
    return given


def metadata_rows(given: Any, rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """[B] rows to take the metadata from: `rows` where nothing is given; ArgumentError for what is none."""
    if given is None:
        return rows
    found = row_numbers("metadata_from", given, count)
    if len(found) != len(rows):
        raise ArgumentError("metadata_from", f"{len(found)} rows", f"one for each of the {len(rows)} rows")
    return found


def viewed(views: ChosenViews, own: PictureFeatures, count: int) -> NDArray[np.int64]:
    """Places of a batch of `count` where a view stands in for the picture.

    Raises:
        ArgumentError: no views, rows that the views do not have, or views of other towers or another whitening.
    """
    if not isinstance(views, ChosenViews):
        raise ArgumentError("views", f"a {type(views).__name__}", "ChosenViews(source, rows), or None")
    if getattr(views.source, "whitening", None) != own.whitening:
        raise ArgumentError("views", "views of another whitening", "whitened as the store is")
    for ours, theirs in ((own.visual, views.source.visual), (own.global_image, views.source.global_image)):
        if ours.shape[1:] != theirs.shape[1:] or ours.dtype.kind != theirs.dtype.kind:
            told, wanted = (f"{one.dtype} of shape [n, {str(one.shape[1:])[1:-1]}]" for one in (theirs, ours))
            raise ArgumentError("views", f"features in {told}", f"features of the store's tower, {wanted}")
    rows = views.rows if isinstance(views.rows, np.ndarray) else np.empty(0)
    if rows.dtype.kind not in "i" or rows.shape != (count,):
        told = f"rows that are {rows.dtype} of shape {rows.shape}"
        raise ArgumentError("views", told, f"int64 rows of shape ({count},), -1 where the own picture is kept")
    last = len(views.source.visual) - 1
    if count and (rows.min() < -1 or rows.max() > last):
        raise ArgumentError("views", f"rows {rows.min()} … {rows.max()}", f"rows in 0 … {last}, or -1")
    return np.flatnonzero(rows >= 0)
