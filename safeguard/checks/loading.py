"""From the name of a check in a policy to the check: a registered kind with its argument, or a model pack."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safeguard import registry
from safeguard.errors import PackError, UnknownName
from safeguard.packs import resolve
from safeguard.types import Check

_KIND = re.compile(r"[A-Za-z][\w-]+", re.ASCII)  # two letters or more, so that `C:\pack` is a path


def load_check(
    spec: str, *, device: str = "cpu", options: Mapping[str, Any] = MappingProxyType({})
) -> Check[Any]:
    """The check that a policy names.

    spec: "kind:argument" for a kind in the entry-point group `safeguard.checks`, whose factory gets the
    argument (none after a bare "kind:") and, of the device and these options, those that it takes; else name
    or folder of a pack.
    Raises UnknownName for a kind that nobody registered, ValueError for one given no argument that needs it
    (or the reverse), PackNotFound and PackError for packs.
    """
    kind, colon, argument = spec.partition(":")
    if colon:
        known = registry.names("checks")
        if kind in known:
            return _made(kind, argument, {**options, "device": device})
        if _KIND.fullmatch(kind) and not Path(spec).exists():
            raise UnknownName("check", kind, known)
    return _from_pack(spec, device)


def _made(kind: str, argument: str, offered: Mapping[str, Any]) -> Check[Any]:
    factory = registry.load("checks", kind)
    signature = inspect.signature(factory)
    given = (argument,) if argument else ()
    options = {name: value for name, value in offered.items() if name in signature.parameters}
    try:
        signature.bind(*given, **options)
    except TypeError as exc:
        raise ValueError(
            f"check '{kind}:{argument}' must be kind:argument as its factory wants: {exc}"
        ) from exc
    check = factory(*given, **options)
    if not callable(check) or not hasattr(check, "name") or not hasattr(check, "modality"):
        raise TypeError(
            f"{kind!r} in safeguard.checks must give a check (name, modality, callable), "
            f"got {type(check).__name__}"
        )
    return check  # type: ignore[no-any-return]  # a registered factory has no type


def _from_pack(name: str, device: str) -> Check[Any]:
    pack = resolve(name)
    match pack.manifest.kind:
        case "text_classifier":
            from safeguard.checks.text_classifier import TextClassifier

            return TextClassifier.load(pack, device=device)
        case "image_classifier":
            from safeguard.checks.image_classifier import ImageClassifier

            return ImageClassifier.load(pack, device=device)
        case "clip_heads":
            from safeguard.checks.clip_heads import ClipHeads

            return ClipHeads.load(pack, device=device)
        case kind:
            raise PackError(f"pack {name!r} is a {kind}, which is no check")
