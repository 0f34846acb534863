"""No state that grows: neither in modules nor in a guard, whatever texts come by."""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
import sys
import types
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from safeguard import Guard, Policy
from safeguard.checks.blocklist import Blocklist
from safeguard.testing import FailingCheck
from tests.security.test_import_effects import _names

BOUNDED = {"safeguard.registry._entries"}
"""Caches without a bound whose arguments are few: the groups of entry points that we read."""


class Untidy:
    """Raises a new error, with the batch in it, for what is odd."""

    name = "untidy"
    modality = "text"

    def __call__(self, batch: Sequence[str], /) -> list[dict[str, float]]:
        if any("odd" in text for text in batch):
            raise ValueError(*batch)
        return [{"odd": 0.0} for _ in batch]


def module_containers() -> dict[str, int]:
    """Size of every mutable container at the top of our modules and on their classes."""
    sizes: dict[str, int] = {}
    for name, module in sorted(sys.modules.items()):
        if name.split(".")[0] == "safeguard" and isinstance(module, types.ModuleType):
            spaces = [(name, vars(module))]
            spaces += [(f"{name}.{k}", dict(vars(v))) for k, v in vars(module).items() if isinstance(v, type)]
            for where, space in spaces:
                for key, value in space.items():
                    if isinstance(value, dict | list | set | bytearray) and not key.startswith("__"):
                        sizes[f"{where}.{key}"] = len(value)
    return sizes


def judge(first: int, count: int) -> None:
    """Different texts, each with its own words, some odd, some failing, some too long."""
    guard = Guard(
        [Blocklist(["knife"]), Untidy()],
        [Blocklist(["knife"])],
        policy=Policy(max_chars=3000, on_block="replace"),
    )
    guarded = guard(_echo)
    for i in range(first, first + count):
        guarded(f"word{i} kn1fe кnife {chr(0x4E00 + i)} odd" if i % 3 else f"k i l l {i}")
        "".join(guard.stream(iter([f"a line {i}, ", "and its end"])))


def _echo(prompt: str) -> str:
    return prompt


def test_module_state_does_not_grow_with_what_is_judged() -> None:
    judge(0, 30)
    before = module_containers()
    judge(1000, 60)
    assert module_containers() == before


def test_guard_holds_nothing_of_the_calls_it_served() -> None:
    class Marked(str):
        __slots__ = ("__weakref__",)

    guard = Guard(
        [Blocklist(["knife"]), Untidy()],
        policy=Policy(on_block="replace"),
    )
    guarded = guard(_echo)
    kept = []
    for text in ("a day out", "a knife", "odd"):
        marked = Marked(text)
        kept.append(weakref.ref(marked))
        guarded(marked)
        del marked
    gc.collect()
    assert [ref() for ref in kept] == [None, None, None]


def caches() -> Iterator[tuple[str, Any]]:
    """Every `functools` cache in our light modules, with its function."""
    for name in _names():
        for key, value in vars(importlib.import_module(name)).items():
            if isinstance(value, functools._lru_cache_wrapper) and value.__module__ == name:
                yield f"{name}.{key}", value


@pytest.mark.parametrize(("name", "cache"), [pytest.param(*pair, id=pair[0]) for pair in caches()])
def test_cache_has_a_bound(name: str, cache: Any) -> None:
    limited = cache.cache_parameters()["maxsize"] is not None
    assert limited or name in BOUNDED or not inspect.signature(cache.__wrapped__).parameters


def test_counts_of_failures_do_not_grow_with_what_fails() -> None:
    guard = Guard([FailingCheck()], policy=Policy(max_chars=10, on_block="replace", on_error="block"))
    if not hasattr(guard, "stats"):
        pytest.skip("guards do not count")
    for size in range(11, 60):
        guard.check_input("x" * size)
    assert sum(len(whys) for whys in guard.stats().errors.values()) <= 3
