"""Token ids to train a refiner on: those of serving, and an answer that ends as its model ends one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safeguard.refiners.framing import as_data, prompt_ids
from safeguard.refiners.template import RefinerTemplate
from safeguard.refiners.torch_lm import TorchLM, end_tokens
from safeguard.train.refiner.pairs import Pair

IGNORED = -100
"""Label of a token without loss, as torch's cross-entropy has it."""


def example(
    lm: TorchLM, template: RefinerTemplate, pair: Pair, end: int, *, whole: bool = False
) -> dict[str, list[int]]:
    """input_ids and labels (token,) of one pair; labels are `IGNORED` before the answer.

    end: id that closes the answer, see `answer_end`. whole: loss on every token, as the papers' code has it.
    """
    start = prompt_ids(lm, template, as_data(lm, pair.prompt))
    answer = template.keep if pair.target is None else as_data(lm, pair.target).strip()
    tail = [*lm.encode(answer), end]
    ids = start + tail
    return {"input_ids": ids, "labels": list(ids) if whole else [IGNORED] * len(start) + tail}


def examples(
    lm: TorchLM,
    template: RefinerTemplate,
    pairs: Sequence[Pair],
    end: int,
    *,
    longest: int,
    whole: bool = False,
) -> list[dict[str, list[int]]]:
    """One example per pair; those of more than `longest` tokens are left out, never cut.

    A cut answer would teach to stop in the middle.
    """
    made = (example(lm, template, pair, end, whole=whole) for pair in pairs)
    return [row for row in made if len(row["input_ids"]) <= longest]


def answer_end(lm: TorchLM, model: Any, tokenizer: Any, template: RefinerTemplate) -> int:
    """Id of the token that ends an answer when served, and that the chat template writes, where it does.

    Raises ValueError for a model without one: it would never learn to stop.
    """
    ends = end_tokens(model, tokenizer)
    turns = template.messages("a cat")
    before = lm.render(turns)
    if before is not None:
        after = tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": template.keep}], tokenize=False
        )
        closing = lm.encode(after.removeprefix(before)) if after.startswith(before) else []
        found = next((token for token in closing if token in ends), None)
        if found is not None:
            return found
    if not ends:
        raise ValueError("the model must have an end-of-text token, or it never learns to stop")
    return ends[0]
