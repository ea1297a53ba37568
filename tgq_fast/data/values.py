"""One reading of metadata values, whoever brings them: catalogue rows, queries, data frames, Arrow, importers.

A value has one text. Gaps are what pandas and Arrow write for them (None, NaN, NaT, NA); an integral float is the
integer it was before its column had gaps; a number keeps every digit.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

import numpy as np

from tgq_fast.errors import TGQError

__all__ = ["RowError", "amount", "is_gap", "kind_of", "number_text", "plain_value", "price_text", "scalar_text"]

_LONG = 10**18
_DEEPEST = 8
_YEARS = "the date {}, expected years 1 … 9999"


class RowError(TGQError, ValueError):
    """One row breaks the schema; `messages` says how. Collected into the validation report with the row number."""

    def __init__(self, messages: Iterable[str]) -> None:
        self.messages = tuple(messages)
        super().__init__("; ".join(self.messages))


def kind_of(value: object) -> str:
    """Type and beginning of a value, for messages; never fails, however deep or long the value is."""
    if isinstance(value, (list, tuple, Mapping, set, frozenset, np.ndarray)):
        return f"{type(value).__name__} of {len(value) if getattr(value, 'ndim', 1) else 1}"
    try:
        return f"{type(value).__name__} {str(value)[:40]!r}"
    except Exception:  # integers of thousands of digits, objects whose own text fails
        return type(value).__name__


def plain_value(value: Any, *, depth: int = 0) -> Any:
    """A value as None, str, bool, int, float, Decimal, list or dict.

    Numpy and Arrow scalars become Python's; NaN, NaT and NA become None; bytes are read as UTF-8; dates and times
    become ISO 8601 text (midnight is a date). Lists and mappings are converted within.

    Raises:
        RowError: bytes that are not UTF-8, or a value nested deeper than 8.
    """
    if isinstance(value, RowError):  # a cell that the reader of the table could not hold
        raise value
    if value is None or isinstance(value, (str, bool)):
        return str.__str__(value) if isinstance(value, str) else value  # of a member of an enumeration, too
    if isinstance(value, float) and not isinstance(value, np.floating):
        return None if math.isnan(value) else float(value)
    if isinstance(value, int):
        return int(value)
    if depth > _DEEPEST:
        raise RowError([f"a value is nested deeper than {_DEEPEST}"])
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError:
            raise RowError([f"{len(value)} bytes that are not UTF-8 text"]) from None
    if isinstance(value, Mapping):
        return {key: plain_value(entry, depth=depth + 1) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        entries = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [plain_value(entry, depth=depth + 1) for entry in entries]
    if hasattr(value, "as_py"):  # an Arrow scalar
        return plain_value(value.as_py(), depth=depth + 1)
    if isinstance(value, np.generic):
        return _numpy_value(value)
    if isinstance(value, np.ndarray) and value is not np.ma.masked:
        return [plain_value(entry, depth=depth + 1) for entry in value] if value.ndim else plain_value(value[()])
    if is_gap(value):
        return None
    if isinstance(value, Decimal):
        return value
    if isinstance(value, datetime.datetime):
        if not 1 <= value.year <= 9999:  # of pandas
            raise RowError([_YEARS.format(value)])
        midnight = value.time() == datetime.time() and value.tzinfo is None
        return value.date().isoformat() if midnight else value.isoformat(sep=" ")
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta) and not getattr(value, "nanoseconds", 0):  # pandas' too
        return str(datetime.timedelta(value.days, value.seconds, value.microseconds))
    for read in ("to_pylist", "tolist"):  # columns of Arrow and of pandas
        if type(value).__module__.partition(".")[0] in ("pyarrow", "pandas") and hasattr(value, read):
            return plain_value(getattr(value, read)(), depth=depth + 1)
    if type(value).__module__ in ("datetime", "uuid", "pathlib") or type(value).__module__.startswith("pandas"):
        return str(value)
    return value


def _numpy_value(value: np.generic) -> Any:
    if isinstance(value, np.timedelta64):  # numpy counts it among its integers
        if np.isnat(value):
            return None
        if np.datetime_data(value.dtype)[0] in ("Y", "M", "generic"):  # of no fixed length
            return str(value)
        exact = value.astype("timedelta64[us]")
        return str(exact.astype(object) if exact.astype(value.dtype) == value else value)
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.floating):
        # By way of its own shortest text: float32 0.1 is 0.1, not 0.10000000149011612.
        return None if np.isnan(value) else float(str(value))
    if isinstance(value, np.datetime64):
        if np.isnat(value):
            return None
        return _date_value(value)
    if isinstance(value, np.bytes_):
        return plain_value(bytes(value))
    return str(value)


def _date_value(value: np.datetime64) -> str:
    """As pandas and Arrow write it: months and years by their first day; what lies below microseconds is kept."""
    exact = value.astype("datetime64[us]")
    moment = exact.item()
    if not isinstance(moment, datetime.datetime):
        raise RowError([_YEARS.format(value)])
    if exact.astype(value.dtype) != value:
        return str(value.astype("datetime64[ns]")).replace("T", " ")
    text: str = plain_value(moment)
    return text


def is_gap(value: object) -> bool:
    """Whether a value is None, NaN, NaT, NA or masked."""
    if value is None or value is np.ma.masked or type(value).__name__ in ("NAType", "NaTType"):
        return True
    try:
        return isinstance(value != value, (bool, np.bool_)) and bool(value != value)
    except Exception:  # an object with a comparison of its own
        return False


def number_text(value: int | float | Decimal) -> str:
    """Every digit of a number, without exponent or trailing zeros: 2012.0 is "2012", 12.50 is "12.5".

    Raises:
        RowError: infinite, or an integer of thousands of digits.
    """
    if isinstance(value, int):
        try:
            return str(value)
        except ValueError:  # Python refuses to print these
            raise RowError(["an integer of thousands of digits"]) from None
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RowError([f"{value}, expected a finite number"])
        if value.is_integer() and abs(value) < _LONG:
            return str(int(value))
        text = repr(value)
        return text if "e" not in text else _positional(Decimal(text), text)
    if not value.is_finite():
        raise RowError([f"{value}, expected a finite number"])
    return _positional(value, str(value))


def _positional(value: Decimal, short: str) -> str:
    if abs(value.adjusted()) > 40:  # 1e300 as 300 zeros helps nobody
        return short
    text = format(value, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text


def scalar_text(value: Any) -> str | None:
    """Text of a plain scalar: None stays None, a bool is "yes" or "no", a number keeps its digits.

    Raises:
        RowError: a list, a mapping, or a number that has no text.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float, Decimal)):
        return number_text(value)
    raise RowError([f"{kind_of(value)}, expected text or a number"])


def amount(value: Any) -> float | None:
    """A price or weight as a finite float of at least 0; None for a gap or blank text.

    Raises:
        RowError: anything else; prices with a currency or a decimal comma are read by the importers.
    """
    value = plain_value(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str, Decimal)):
            raise TypeError
        price = float(value)
    except (TypeError, ValueError, OverflowError):
        raise RowError([f"{kind_of(value)}, expected a number"]) from None
    if not math.isfinite(price) or price < 0:
        raise RowError([f"{price}, expected a finite number of at least 0"])
    return price


def price_text(price: float) -> str:
    """Text of a price: two decimals, more where it has more."""
    return f"{price:.2f}" if price < 1e15 and price == round(price, 2) else number_text(price)
