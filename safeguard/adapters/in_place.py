"""What a guarded target does besides its work: copies stay guarded, pickles are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NoReturn


def keeping_methods(instead: str) -> dict[str, Callable[..., Any]]:
    """Methods of a guarded subclass; `instead` says how to save a target that cannot be pickled."""

    def refuse_pickle(self: Any, protocol: Any) -> NoReturn:
        raise TypeError(
            f"a guarded {type(self).__name__} cannot be pickled, "
            f"because it would come back without its guard; {instead}, and guard what you load"
        )

    return {"__reduce_ex__": refuse_pickle, "__copy__": _copy, "__deepcopy__": _deepcopy}


def kept(value: Any) -> Any:
    """A copy of lists and mappings, so that what is judged is what is handed on, whoever writes to them."""
    if isinstance(value, Mapping):
        return {key: kept(part) for key, part in value.items()}
    if type(value) is tuple:
        return tuple(map(kept, value))
    return [kept(part) for part in value] if isinstance(value, list) else value


def _copy(self: Any) -> Any:
    """A shallow copy, guarded like this one."""
    twin = object.__new__(type(self))
    twin.__dict__.update(self.__dict__)
    return twin


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """A deep copy, guarded like this one."""
    twin = object.__new__(type(self))
    memo[id(self)] = twin
    twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return twin
