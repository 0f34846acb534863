"""Token ids to train a refiner on: those of serving, and an answer that ends as its model ends one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
) -> list[dict[str, Any]]:
    """One example per pair, with its length, and whether its prompt stays.

    Those of more than `longest` tokens are left out. A cut answer would teach to stop in the middle.
    """
    made = ((example(lm, template, pair, end, whole=whole), pair.target is None) for pair in pairs)
    return [
        {**row, "length": length, "kept": kept}
        for row, kept in made
        if (length := len(row["input_ids"])) <= longest
    ]


def answer_end(lm: TorchLM, model: Any, tokenizer: Any, template: RefinerTemplate) -> int:
    """Id of the token that ends an answer when served, and that the chat template writes, where it does.

    Raises ValueError for a model without one: it would never learn to stop.
    """
    ends = end_tokens(model, tokenizer)
    turns = template.messages("a cat")
    before = lm.render(turns)
    after = ""
    if before is not None:
        after = tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": template.keep}], tokenize=False
        )
    return closing_token(lm.encode, before or "", after, ends)


def closing_token(
    encode: Callable[[str], Sequence[int]], before: str, after: str, ends: Sequence[int]
) -> int:
    """The first of the end tokens in what `after`, a conversation with its answer, adds to `before`.

    The first end token of all where there is none. Raises ValueError without end tokens.
    """
    closing = encode(after.removeprefix(before)) if after.startswith(before) else []
    found = next((token for token in closing if token in ends), None)
    if found is not None:
        return found
    if not ends:
        raise ValueError("the model must have an end-of-text token, or it never learns to stop")
    return ends[0]
