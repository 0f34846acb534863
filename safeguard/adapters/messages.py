"""Chat messages (`{"role": ..., "content": ...}`): which turns of a conversation are judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from safeguard.chunks import named

ANSWERS = frozenset({"assistant", "model", "ai"})
"""Roles whose turns were made by the model."""

INSTRUCTIONS = frozenset({"system", "developer"})
"""Roles that the application speaks in, at the beginning: there its words are not judged as a user's."""


def is_chat(value: Any) -> bool:
    """Whether a value is a list of chat messages."""
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(turn, Mapping) and "role" in turn and "content" in turn for turn in value)
    )


def judged_turns(messages: Sequence[Any], history: Literal["new", "all"]) -> Iterator[tuple[int, Any]]:
    """Index and content of each turn that is judged.

    Those after the last answer, or all but the application's, which are those at the beginning.

    A conversation that ends in answers has words put into the model's mouth: those are judged as well.

    Content in parts (`[{"type": "text", "text": ...}]`) is joined; a part that is not text is handed on as it
    is, which the flow refuses as unseen.
    """
    roles = _roles(messages)
    for i in _judged(roles, history):
        content = messages[i]["content"]
        if not (roles[i] in ANSWERS and content is None):  # None: a call of a tool
            yield i, text_of(content)


def other_words(messages: Sequence[Any], history: Literal["new", "all"]) -> Iterator[tuple[int, str, str]]:
    """Index, key and words of what the judged turns hold besides their content: names, calls of tools ...

    A key that is no plain name is told by its number, since it may say anything.
    """
    for i in _judged(_roles(messages), history):
        for place, (key, value) in enumerate(messages[i].items()):
            if key not in ("role", "content") and (words := words_of(value)):
                yield i, key if named(key) == key else f"part{place}", "\n".join(words)


def words_of(value: Any) -> list[str]:
    """All texts inside a value, however nested, the keys of mappings left out."""
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [word for v in value for word in words_of(v)] if isinstance(value, list | tuple) else []


def _roles(messages: Sequence[Any]) -> list[str]:
    return [str(turn["role"]).strip().lower() for turn in messages]


def _judged(roles: Sequence[str], history: Literal["new", "all"]) -> Iterator[int]:
    """Places of the turns that are judged. What stands at the end as answered is a prefill, if in parts."""
    size = len(roles)
    while size and roles[size - 1] in ANSWERS:
        size -= 1
    answered = [i for i in range(size) if roles[i] in ANSWERS]
    start = answered[-1] + 1 if answered and history == "new" else 0
    first = next((i for i, role in enumerate(roles) if role not in INSTRUCTIONS), 0)
    yield from range(max(start, first), len(roles))


def text_of(content: Any) -> Any:
    """Text of a message's content; what is no text comes back as it is."""
    if not isinstance(content, list | tuple):
        return content
    parts = [
        part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
        for part in content
    ]
    texts = [part for part in parts if isinstance(part, str)]
    return "\n".join(texts) if len(texts) == len(parts) else content
