"""A word that may turn up nowhere, and the places where one looks for it."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Sequence

CANARY = "".join(["zebra", "quartz", "4711"])
"""In pieces, so that no line of source that a traceback quotes holds it."""


def everything_said(error: BaseException) -> str:
    """All that an error, its causes and its group say of themselves, as logs and consoles would show it."""
    said: list[str] = []
    todo: list[BaseException] = [error]
    seen: set[int] = set()
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        said += [str(one), repr(one), repr(one.args), repr(getattr(one, "__notes__", None))]
        todo += [e for e in (one.__cause__, one.__context__) if e is not None]
        todo += list(getattr(one, "exceptions", ()))
    said += traceback.format_exception(error)
    return "\n".join(said)


def logged(records: Sequence[logging.LogRecord]) -> str:
    """All that log records hold: message, arguments, tracebacks and extra fields."""
    return "\n".join(_lines(records))


def _lines(records: Sequence[logging.LogRecord]) -> Iterator[str]:
    formatter = logging.Formatter("%(name)s %(levelname)s %(message)s")
    for record in records:
        yield formatter.format(record)
        yield repr(vars(record))
