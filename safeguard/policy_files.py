"""Policy files: YAML, TOML and JSON in and out, strict where the formats are lax."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Hashable
from typing import Any, Literal

import yaml

from safeguard.errors import PolicyError


class _StrictLoader(yaml.SafeLoader):
    """YAML without what a policy never needs: aliases (which can blow up) and keys given twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"keys must be text, got {key!r}", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_OTHER_BREAKS = frozenset("\x85\u2028\u2029\ufeff")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} twice")
    return data


def parse(text: str, form: Literal["yaml", "toml", "json"], where: str) -> Any:
    """Plain data of a policy file. Raises PolicyError that names the file and the line."""
    try:
        match form:
            case "yaml":
                data = yaml.load(text, Loader=_StrictLoader)
            case "toml":
                data = tomllib.loads(text)
            case "json":
                data = json.loads(text, object_pairs_hook=_unique)
        json.dumps(
            data, ensure_ascii=False, default=str
        ).encode()  # half a surrogate pair cannot be written back
        return data
    except (yaml.YAMLError, tomllib.TOMLDecodeError, ValueError, RecursionError) as exc:
        detail = " ".join(str(exc).split())
        raise PolicyError(f"{where} is not valid {form.upper()}: {detail}") from exc


def dump(data: dict[str, Any], form: Literal["yaml", "toml", "json"]) -> str:
    """Text of a policy file in the given form; keys keep their order."""
    match form:
        case "yaml":
            text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
            if _OTHER_BREAKS.isdisjoint(text):
                return text
            return str(yaml.safe_dump(data, sort_keys=False))  # written out, YAML would fold them
        case "toml":
            import tomli_w

            return tomli_w.dumps(_without_none(data))
        case "json":
            return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _without_none(data: Any) -> Any:
    """TOML has no null; our only nullable fields have None as their default.

    So leaving them out says the same.
    """
    if isinstance(data, dict):
        return {key: _without_none(value) for key, value in data.items() if value is not None}
    return data
