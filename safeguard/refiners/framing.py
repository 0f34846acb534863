"""How a prompt becomes the tokens that a refining model answers: one place for serving and for training.

A refiner trained on another form than it is served with answers worse for no reason that shows; so both call
`prompt_ids`, and nothing else builds that form.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Protocol

from safeguard.refiners.language_model import LanguageModel
from safeguard.refiners.template import RefinerTemplate


class HasSpecial(Protocol):
    """A model with a pattern of its special tokens; None where it has none."""

    @property
    def special(self) -> re.Pattern[str] | None: ...


def as_data(model: HasSpecial, text: str) -> str:
    """The text without the tokenizer's special tokens, so that it cannot close its turn.

    Each becomes a blank, never nothing: pieces on both sides must not join into a new one. A text that holds
    one only in compatibility forms (fullwidth brackets), which some tokenizers make plain before they look
    for their tokens, is given in plain forms and without it.
    """
    if model.special is None:
        return text
    text = model.special.sub(" ", text)
    folded = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    return model.special.sub(" ", folded) if model.special.search(folded) else text


def prompt_ids(model: LanguageModel, template: RefinerTemplate, text: str) -> list[int]:
    """Token ids up to the answer, as the chat template writes them; plain lines without one.

    text: the prompt, already passed through `as_data`.
    """
    rendered = model.render(template.messages(text))
    if rendered is not None:
        return model.encode(rendered)
    return model.encode(plain(template, text), framed=True)


def plain(template: RefinerTemplate, text: str) -> str:
    """The form for a tokenizer without chat template: instruction and prompt, a line each."""
    return "\n".join(part for part in (template.system, template.fill(text)) if part) + "\n"
