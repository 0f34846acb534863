"""What is measured of a language model itself: continuations, likelihoods, perplexity, drift, questions."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from safeguard.decoding.sampling import continued
from safeguard.errors import MissingExtra

try:
    import torch
    from torch import Tensor
except ImportError as exc:
    raise MissingExtra("torch", "torch") from exc

if TYPE_CHECKING:
    from safeguard.evaluate.detox_settings import DetoxSettings

MakeProcessors = Callable[[Tensor, int], Sequence[Any]]
"""(attention mask of the prompts (prompt, token), pad token) -> logits processors of one generate() call."""
LETTERS = "ABCDEFGHIJ"
TOO_HIGH = 1e4
"""Perplexities of single continuations from here on are left out, as UniDetox does."""


def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: DetoxSettings,
    seed: int,
    *,
    start: Sequence[int] = (),
    processors: MakeProcessors | None = None,
) -> list[list[str]]:
    """So many sampled continuations of each prompt, (prompt, continuation), without the prompt.

    The random numbers follow from the seed and the prompts of the call, so it can be repeated alone.
    """
    rows = [[*start, *_ids(tokenizer, prompt)] or [_first(tokenizer)] for prompt in prompts]
    ids, mask, pad = left_padded(rows, tokenizer)
    digest = hashlib.sha256("\0".join([str(seed), *prompts]).encode("utf-8", "surrogatepass")).digest()
    made = continued(
        model,
        ids,
        mask,
        copies=settings.continuations,
        new_tokens=settings.new_tokens,
        pad=pad,
        generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")),
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        processors=list(processors(mask, pad)) if processors else [],
    )
    texts = tokenizer.batch_decode(made, skip_special_tokens=True)
    count = settings.continuations
    return [texts[i * count : (i + 1) * count] for i in range(len(prompts))]


def left_padded(rows: Sequence[Sequence[int]], tokenizer: Any) -> tuple[Tensor, Tensor, int]:
    """Ids and mask (row, token), padded on the left, and the token they are padded with."""
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    pad = int(pad) if pad is not None else 0
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask, pad


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def log_likelihoods(
    model: Any, rows: Sequence[Sequence[int]], firsts: Sequence[int], *, batch_size: int = 8
) -> list[tuple[float, int]]:
    """Of each row of ids, the log-likelihood of its tokens from number `firsts` on, and how many they are.

    The first token of a row has nothing before it and is never counted.
    """
    found: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # so that little is padded
    for at in range(0, len(rows), batch_size):
        numbers = order[at : at + batch_size]
        begins = {i: max(1, firsts[i]) for i in numbers}
        left_out = max(0, min(begins.values()) - 1)  # tokens in front whose scores nobody wants
        ids, logits = _read(model, [rows[i] for i in numbers], left_out)
        for k, i in enumerate(numbers):
            first, end = begins[i], len(rows[i])
            if first >= end:
                continue
            scores = logits[k, first - 1 - left_out : end - 1 - left_out].float()
            chosen = scores.gather(-1, ids[k, first:end].unsqueeze(-1)).squeeze(-1)
            found[i] = (float((chosen - scores.logsumexp(-1)).double().sum()), end - first)
    return found


def _read(model: Any, rows: Sequence[Sequence[int]], left_out: int) -> tuple[Tensor, Tensor]:
    """Ids (row, token), padded on the right, and logits (row, token behind left_out, vocabulary)."""
    width = max(2, *map(len, rows))
    left_out = min(left_out, width - 1)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    named: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if left_out and "logits_to_keep" in inspect.signature(model.forward).parameters:
        return ids, model(**named, logits_to_keep=width - left_out).logits
    return ids, model(**named).logits[:, left_out:]


def perplexity(
    model: Any, tokenizer: Any, texts: Sequence[str], *, max_tokens: int, start: Sequence[int] = ()
) -> dict[str, float]:
    """Exponential of the mean negative log-likelihood per token over all texts, each cut to max_tokens.

    Raises ValueError where no text has a token to predict.
    """
    rows = [[*start, *_ids(tokenizer, text)][:max_tokens] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    found = log_likelihoods(model, rows, [len(start)] * len(rows)) if rows else []
    tokens = sum(count for _, count in found)
    if not tokens:
        raise ValueError("perplexity needs texts of two tokens or more")
    return {"perplexity": math.exp(-sum(value for value, _ in found) / tokens), "tokens": tokens}


def continuation_perplexity(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], *, max_tokens: int = 512
) -> dict[str, float | None]:
    """Mean perplexity of continuations given their prompts: exp(mean NLL of the continuation's tokens).

    pairs: (prompt, continuation). Values of 1e4 and more are left out and counted, as are continuations
    without a token; None where none is left. Source: UniDetox's evaluator.
    """
    rows, firsts = [], []
    for prompt, text in pairs:
        before = _ids(tokenizer, prompt)
        rows.append(_ids(tokenizer, prompt + text)[:max_tokens] or [0])
        firsts.append(len(before))
    values = [math.exp(min(50.0, -v / n)) for v, n in log_likelihoods(model, rows, firsts) if n]
    kept = [value for value in values if value < TOO_HIGH]
    mean = float(np.mean(kept)) if kept else None
    return {"perplexity": mean, "texts": len(kept), "left_out": len(pairs) - len(kept)}


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def drift(
    model: Any,
    reference: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_tokens: int,
    start: Sequence[int] = (),
) -> float:
    """Mean KL divergence per token, nats, of the reference's next-token distribution from the model's.

    Both must have one vocabulary. On neutral text it says how far the model left its origin.
    """
    total, tokens = 0.0, 0
    for text in texts:
        row = [*start, *_ids(tokenizer, text)][:max_tokens]
        if len(row) < 2:
            continue
        ids = torch.tensor([row])
        logs = [
            m(input_ids=ids.to(m.device)).logits[0].float().log_softmax(-1).cpu() for m in (reference, model)
        ]
        total += float((logs[0].exp() * (logs[0] - logs[1])).sum())
        tokens += len(row)
    if not tokens:
        raise ValueError("drift needs texts of two tokens or more")
    return total / tokens


@dataclass(frozen=True, slots=True)
class Question:
    """A multiple-choice question. answer: number of the right choice."""

    text: str = field(repr=False)
    choices: tuple[str, ...] = field(repr=False)
    answer: int
    subject: str = ""


def question_of(row: Mapping[str, Any]) -> Question:
    """A row in MMLU's format: question, choices, answer (a number or a letter), maybe subject.

    Raises ValueError for an answer that is no choice.
    """
    choices = tuple(str(choice) for choice in row["choices"])
    answer = row["answer"]
    number = LETTERS.find(answer.strip().upper()) if isinstance(answer, str) else int(answer)
    if not 0 <= number < len(choices) <= len(LETTERS):
        raise ValueError(
            f"answer must be one of {len(choices)} choices (at most {len(LETTERS)}), got {answer!r}"
        )
    return Question(str(row["question"]), choices, number, str(row.get("subject", "")))


def letters_prompt(question: Question, examples: Sequence[Question]) -> str:
    """The usual few-shot prompt of MMLU (Hendrycks et al. 2021); the answer is the letter that follows."""
    about = f" about {question.subject.replace('_', ' ')}" if question.subject else ""
    head = f"The following are multiple choice questions (with answers){about}.\n\n"
    shown = "".join(f"{_lettered(e)} {LETTERS[e.answer]}\n\n" for e in examples)
    return head + shown + _lettered(question)


def _lettered(question: Question) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
    return "\n".join([question.text.strip(), *lines, "Answer:"])


def answer_texts(question: Question, examples: Sequence[Question]) -> list[str]:
    """UniDetox's way: one full text per choice, "Question / Answer" with the words of the answer."""
    shown = "".join(f"Question: {e.text}\nAnswer: {e.choices[e.answer]}\n\n" for e in examples)
    return [f"{shown}Question: {question.text}\nAnswer: {choice}" for choice in question.choices]


def accuracy(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    examples: Sequence[Question],
    *,
    way: str,
    start: Sequence[int] = (),
) -> float:
    """Share of questions answered rightly.

    way: "letters", the likeliest letter after the prompt; "unidetox", the choice whose whole text is the
    likeliest, not divided by its length. The two cannot be compared. Raises ValueError without questions.
    """
    if not questions:
        raise ValueError("accuracy needs at least one question")
    asked = []
    for question, shown in _with_examples(questions, examples):
        if way == "letters":
            before = letters_prompt(question, shown)
            texts = [f"{before} {letter}" for letter in LETTERS[: len(question.choices)]]
        else:
            texts = answer_texts(question, shown)
        asked.append([[*start, *_ids(tokenizer, text)] for text in texts])
    best = [int(np.argmax(scores)) for scores in _choice_scores(model, asked)]
    right = sum(found == question.answer for found, question in zip(best, questions, strict=True))
    return right / len(questions)


def _choice_scores(model: Any, asked: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
    """Of each question's choices, the log-likelihood of their ids behind what all of them begin with.

    asked: (question, choice, token). What they share is as likely for each, so it does not count. Choices of
    one token more, such as letters, are all read off one row.
    """
    shared = [_shared(rows) for rows in asked]
    short = [
        begin > 0 and all(len(row) == begin + 1 for row in rows)
        for begin, rows in zip(shared, asked, strict=True)
    ]
    found: list[list[float]] = [[] for _ in asked]
    letters = [i for i, is_short in enumerate(short) if is_short]
    for i, logits in zip(
        letters, _last_logits(model, [asked[i][0][: shared[i]] for i in letters]), strict=True
    ):
        found[i] = [float(logits[row[-1]]) for row in asked[i]]
    others = [i for i, is_short in enumerate(short) if not is_short]
    scores = iter(
        log_likelihoods(
            model, [row for i in others for row in asked[i]], [shared[i] for i in others for _ in asked[i]]
        )
    )
    for i in others:
        found[i] = [next(scores)[0] for _ in asked[i]]
    return found


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """How many ids all rows begin with."""
    count = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def _last_logits(model: Any, rows: Sequence[Sequence[int]], *, batch_size: int = 8) -> list[Tensor]:
    """Logits (vocabulary,) of what follows each row."""
    found: dict[int, Tensor] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for at in range(0, len(rows), batch_size):
        numbers = order[at : at + batch_size]
        left_out = min(len(rows[i]) for i in numbers) - 1
        _, logits = _read(model, [rows[i] for i in numbers], left_out)
        for k, i in enumerate(numbers):
            found[i] = logits[k, len(rows[i]) - 1 - left_out].float()
    return [found[i] for i in range(len(rows))]


def _with_examples(
    questions: Sequence[Question], examples: Sequence[Question]
) -> Iterator[tuple[Question, list[Question]]]:
    """Each question with the examples, but for itself."""
    for question in questions:
        yield question, [example for example in examples if example != question]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _first(tokenizer: Any) -> int:
    return int(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)
