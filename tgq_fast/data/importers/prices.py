"""Prices as shops write them: "1.299,00 €", "$1,299.00", "15.00 USD", "1'299.-", "from 12.99"."""

from __future__ import annotations

import re

from tgq_fast.data.values import RowError, amount, plain_value

__all__ = ["parse_price"]

_SIGNS = {"€": "EUR", "$": "USD", "£": "GBP", "¥": "JPY", "₹": "INR", "₽": "RUB", "₩": "KRW", "zł": "PLN"}
_THREE_DECIMALS = frozenset(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"))
_NUMBER = re.compile(r"\d(?:[\d.,'’\s\u00a0\u202f]*\d)?")


def parse_price(value: object) -> tuple[float | None, str | None]:
    """Number and currency code of a price; (None, None) for a gap or a text without digits ("—", "on request").

    The last of "." and "," is the decimal mark where both occur. A single one before exactly three digits parts
    thousands ("1.299" is 1299), but in currencies of three decimals. Of a range the first price counts.

    Raises:
        RowError: negative, infinite, or no price at all (a list).
    """
    value = plain_value(value)
    if not isinstance(value, str):
        return amount(value), None
    text = value.strip()[:100]
    match = _NUMBER.search(re.split(r"\s[-–—]\s", text)[0])
    if match is None:
        return None, None
    if text[: match.start()].rstrip().endswith(("-", "−")):
        raise RowError([f"price is {text[:40]!r}, expected at least 0"])
    around = text[: match.start()] + " " + text[match.end() :]
    currency = next((code for sign, code in _SIGNS.items() if sign in around), None)
    code = re.search(r"\b([A-Z]{3})\b", around)
    currency = code[1] if code else currency
    return float(_plain_number(match[0], currency)), currency


def _plain_number(text: str, currency: str | None) -> str:
    text = re.sub(r"['’\s\u00a0\u202f]", "", text)
    dot, comma = text.rfind("."), text.rfind(",")
    if dot >= 0 and comma >= 0:
        mark, other = (".", ",") if dot > comma else (",", ".")
        return text.replace(other, "").replace(mark, ".")
    mark = "." if dot >= 0 else ","
    whole, _, rest = text.rpartition(mark)
    thousands = len(rest) == 3 and whole not in ("", "0") and currency not in _THREE_DECIMALS
    if text.count(mark) > 1 or (thousands and len(whole) <= 3):
        return text.replace(mark, "")
    return text.replace(mark, ".")
