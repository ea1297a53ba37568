#!/usr/bin/env bash
# price-parser 0.5.1: prices with three digits behind one separator.
# Expected: "0.999 USD" is 0.999 (no thousands group starts with 0), as "1.5 USD" is 1.5; what cannot be read is None.
# Seen: 999. Three digits behind a separator are a thousands group whatever stands before it; "1.299 EUR" and "1,299 EUR" are both 1299,
#       the sign of "-5 EUR" is lost, and "3 for 10 EUR" is 3 EUR.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q price-parser==0.5.1 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
from price_parser import Price

texts = ["0.999 USD", "1.5 USD", "1.299 EUR", "1,299 EUR", "-5 EUR", "3 for 10 EUR"]
found = {text: str(Price.fromstring(text).amount) for text in texts}
print(found)
assert list(found.values()) == ["999", "1.5", "1299", "1299", "5", "3"]
PY
