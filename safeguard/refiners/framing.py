"""How a prompt becomes the tokens that a refining model answers: one place for serving and for training.

A refiner trained on another form than it is served with answers worse for no reason that shows; so both call
`prompt_ids`, and nothing else builds that form.
"""

from __future__ import annotations

from safeguard.refiners.language_model import LanguageModel
from safeguard.refiners.template import RefinerTemplate


def as_data(model: LanguageModel, text: str) -> str:
    """The text without the tokenizer's special tokens, so that it cannot close its turn.

    Each becomes a blank, never nothing: pieces on both sides must not join into a new one.
    """
    return model.special.sub(" ", text) if model.special else text


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
