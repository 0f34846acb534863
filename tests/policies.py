"""Policies in a few words, and the plainest function to guard."""

from __future__ import annotations

from typing import Any

from safeguard import Policy


def policy(**parts: Any) -> Policy:
    return Policy.from_data(parts)


def llm(action: str, **parts: Any) -> Policy:
    return policy(input={"llm": {"action": action}}, **parts)


def text(action: str, **parts: Any) -> Policy:
    return policy(output={"text": {"action": action}}, **parts)


def echo(prompt: str) -> str:
    return prompt
