"""Bytes to hostile texts: what a fuzzer changes at random becomes Unicode that guards are attacked with."""

from __future__ import annotations

import json
from pathlib import Path

WORDS: dict[str, list[str]] = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
"""Pieces that mean something to what is fuzzed, by kind of input."""
PIECES = WORDS["texts"]
"""What a byte of the piecewise decoding stands for, beside plain letters."""
_MOST_CHARS = 4096


def text_of(data: bytes) -> str:
    """A text: the first byte says how the others are read, so that each kind of text is reached often."""
    if not data:
        return ""
    kind, rest = data[0] % 5, data[1:]
    if kind == 0:
        text = rest.decode("utf-8", "surrogatepass" if _is_utf8(rest) else "replace")
    elif kind == 1:
        text = "".join(_character(rest[i : i + 3]) for i in range(0, len(rest), 3))
    elif kind == 2:
        text = "".join(PIECES[b % len(PIECES)] if b >= 128 else chr(b) for b in rest)
    elif kind == 3:
        text = rest.decode("latin-1")
    else:
        text = (rest[1:].decode("utf-8", "replace") or "a") * (1 + (rest[0] if rest else 0))
    return text[:_MOST_CHARS]


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


def _character(data: bytes) -> str:
    return chr(int.from_bytes(data, "big") % 0x110000)
