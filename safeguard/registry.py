"""Find checks, refiners and adapters by name, importing only the one asked for."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from safeguard.errors import UnknownName

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


@cache
def _entries(group: str) -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # slow to import, so only when asked

    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=f"safeguard.{group}"):
        known = found.setdefault(entry.name, entry)
        if known.value != entry.value:
            raise ValueError(f"{entry.name!r} is registered twice: {known.value} and {entry.value}")
    return found


def names(group: str) -> list[str]:
    """Names registered in `safeguard.<group>`. Imports nothing of theirs."""
    return sorted(_entries(group))


def load(group: str, name: str) -> Any:
    """Import and return the object registered as `name`. Raises UnknownName naming what there is."""
    try:
        entry = _entries(group)[name]
    except KeyError:
        raise UnknownName(group.removesuffix("s"), name, names(group)) from None
    return entry.load()
