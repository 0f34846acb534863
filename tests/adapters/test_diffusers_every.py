"""Every pipeline class that diffusers exports can be guarded, and no text argument of any slips by."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from safeguard import Guard
from safeguard.adapters.diffusers_call import Call
from safeguard.testing import WordCheck

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),
]

TEXT = "draw a knife"
NO_TEXT = ("_mask", "_attention_mask")
"""Ends of the names of arguments in which a text has no meaning: a mask made by a tokenizer."""


def classes() -> list[Any]:
    found = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Pipeline")]
    return [
        kind
        for kind in found
        if isinstance(kind, type)
        and issubclass(kind, diffusers.DiffusionPipeline)
        and kind is not diffusers.DiffusionPipeline
    ]


def call(kind: Any, **given: Any) -> Call:
    """A call of a pipeline class; 1 for what it cannot do without."""
    signature = inspect.signature(kind.__call__)
    needed = {
        p.name: 1
        for p in list(signature.parameters.values())[1:]
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    }
    return Call(signature, (object(),), needed | given)


def judged(found: Call) -> bool:
    ask = found.asks()[0]
    return bool(ask.unseen) or any(text == TEXT for text in ask.texts.values())


def parameters(kind: Any) -> list[inspect.Parameter]:
    return [
        p
        for p in list(inspect.signature(kind.__call__).parameters.values())[1:]
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]


def test_every_class_can_be_guarded_and_keeps_its_signature() -> None:
    guard = Guard([WordCheck("knife")])
    wrong = [
        kind.__name__
        for kind in classes()
        if inspect.signature(type(guard(object.__new__(kind))).__call__) != inspect.signature(kind.__call__)
    ]
    assert wrong == []
    assert len(classes()) > 200


def test_text_in_any_argument_of_any_class_is_judged() -> None:
    missed = {
        f"{kind.__name__}.{p.name}"
        for kind in classes()
        for p in parameters(kind)
        for value in (TEXT, [TEXT])
        if not judged(call(kind, **{p.name: value}))
    }
    assert {name for name in missed if not name.endswith(NO_TEXT)} == set()


def test_defaults_given_by_hand_are_not_judged() -> None:
    judged_too = {
        f"{kind.__name__}.{argument.name}"
        for kind in classes()
        for argument in call(
            kind, **{p.name: p.default for p in parameters(kind) if p.default is not p.empty}
        ).texts
    }
    assert judged_too == set()
