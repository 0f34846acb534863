"""Chat messages (`{"role": ..., "content": ...}`): which turns of a conversation are judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

ANSWERS = frozenset({"assistant", "model", "ai"})
"""Roles whose turns were made by the model."""

INSTRUCTIONS = frozenset({"system", "developer"})
"""Roles that the application speaks in; its own words are not judged as a user's."""


def is_chat(value: Any) -> bool:
    """Whether a value is a list of chat messages."""
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(turn, Mapping) and "role" in turn and "content" in turn for turn in value)
    )


def judged_turns(messages: Sequence[Any], history: Literal["new", "all"]) -> Iterator[tuple[int, Any]]:
    """Index and content of each turn that is judged.

    Those after the last answer, or all but the application's.

    A conversation that ends in an answer has words put into the model's mouth: those are judged as well.

    Content in parts (`[{"type": "text", "text": ...}]`) is joined; a part that is not text is handed on as it
    is, which the flow refuses as unseen.
    """
    roles = [str(turn["role"]).strip().lower() for turn in messages]
    answered = [i for i, role in enumerate(roles[:-1]) if role in ANSWERS]  # a last one is a prefill
    start = answered[-1] + 1 if answered and history == "new" else 0
    for i in range(start, len(messages)):
        content = messages[i]["content"]
        if roles[i] in INSTRUCTIONS or (roles[i] in ANSWERS and content is None):  # None: a call of a tool
            continue
        yield i, text_of(content)


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
