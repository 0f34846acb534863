"""The detoxification benchmark: how often a model goes on toxically, and what that cost its language.

TP and EMT as RealToxicityPrompts defines them, in UniDetox's setting, by any number of judges side by side;
perplexity, variety and knowledge beside them, since a model that only repeats harmless words is not toxic.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safeguard.errors import MissingExtra
from safeguard.evaluate.detox_judges import Judge
from safeguard.evaluate.detox_lm import (
    Question,
    accuracy,
    continuation_perplexity,
    continuations,
    drift,
    perplexity,
    question_of,
)
from safeguard.evaluate.detox_metrics import by_family, distinct, spread
from safeguard.evaluate.detox_settings import DetoxSettings, Prompt, Suite, clean_texts, read_prompts
from safeguard.packs import canonical_digest
from safeguard.train.recipe import versions
from safeguard.train.text_data import read_jsonl
from safeguard.train.unidetox.models import training_start

try:
    from tqdm import tqdm
except ImportError as exc:
    raise MissingExtra("tqdm", "train") from exc

if TYPE_CHECKING:
    from safeguard.evaluate.detox_lm import MakeProcessors

log = logging.getLogger(__name__)

_SHIPPED = "general_knowledge.jsonl"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured.

    digest: of its weights. before: text put before every prompt (a safety instruction). processors: guards
    inside decoding. decoding: says exactly which, so that continuations which a journal keeps are taken for
    the same guards alone. output: a check on the finished text; what it flags is replaced by nothing. step:
    of the training run, for curves.
    """

    name: str
    model: Any
    tokenizer: Any
    digest: str = ""
    before: str = ""
    processors: MakeProcessors | None = None
    decoding: str = ""
    output: Judge | None = None
    step: int | None = None
    note: str = ""


def evaluate_detox(
    subject: Subject,
    data: Path,
    judges: Sequence[Judge],
    settings: DetoxSettings,
    *,
    other: tuple[str, Any, Any] | None = None,
    reference: Any = None,
    journal: Path | None = None,
) -> dict[str, Any]:
    """The result as plain data, ready for JSON.

    other: (name, model, tokenizer) that scores the continuations' perplexity, best not the one measured.
    reference: model of the same vocabulary, for the drift on clean text. journal: folder that keeps the
    continuations, so that an interrupted run goes on; they are model output and may be offensive.
    Raises ValueError without judges.
    """
    if not judges:
        raise ValueError("give at least one judge")
    began = time.monotonic()
    result: dict[str, Any] = {
        "format": 1,
        "kind": "detox",
        "name": subject.name,
        "model_digest": subject.digest,
        "step": subject.step,
        "note": subject.note,
        "settings": settings.model_dump(mode="json"),
        "judges": {judge.name: judge.digest for judge in judges},
        "output_check": subject.output.name if subject.output else None,
        "suites": {},
        "versions": versions("torch", "transformers"),
    }
    pairs: list[tuple[str, str]] = []
    for suite in settings.suites:
        prompts = read_prompts(data, suite, settings)
        result["suites"][suite], some = measure_suite(subject, suite, prompts, judges, settings, journal)
        pairs += some
    result |= _language(subject, data, settings, reference)
    if other is not None:
        chosen = pairs[:: max(1, len(pairs) // settings.perplexity_pairs)][: settings.perplexity_pairs]
        found = continuation_perplexity(other[1], other[2], chosen)
        result["continuation_perplexity"] = {"by": other[0], **found}
    if settings.choices is not None:
        result["choice"] = _choices(subject, data, settings)
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def measure_suite(
    subject: Subject,
    suite: Suite,
    prompts: Sequence[Prompt],
    judges: Sequence[Judge],
    settings: DetoxSettings,
    journal: Path | None = None,
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Figures of one suite, and (prompt, continuation) pairs of the first seed, one per prompt."""
    texts, seconds, tokens = [], 0.0, 0
    for seed in settings.seeds:
        made, spent, count = _generate(subject, suite, prompts, settings, seed, journal)
        texts.append(made)
        seconds, tokens = seconds + spent, tokens + count
    shown, withheld = _checked(subject, texts)
    families = [prompt.family for prompt in prompts]
    pairs = [(p.text, row[0]) for p, row in zip(prompts, texts[0], strict=True)]
    return {
        "prompts": len(prompts),
        "prompts_sha256": canonical_digest([prompt.text for prompt in prompts]),
        "judges": {
            judge.name: by_family(
                [_scores(judge, run) for run in shown], families, threshold=settings.threshold
            )
            for judge in judges
        },
        "distinct": _variety(prompts, texts),
        "withheld": withheld,
        "tokens_per_s": round(tokens / seconds, 2) if seconds else None,
    }, pairs


def _generate(
    subject: Subject,
    suite: str,
    prompts: Sequence[Prompt],
    settings: DetoxSettings,
    seed: int,
    journal: Path | None,
) -> tuple[list[list[str]], float, int]:
    """Continuations of one seed, the seconds that making them took and the tokens that were made."""
    key = canonical_digest(
        [
            [subject.digest or subject.name, subject.before, _guards_of(subject), suite, seed],
            [prompt.text for prompt in prompts],
            settings.model_dump(
                mode="json",
                include={
                    "continuations",
                    "new_tokens",
                    "top_p",
                    "top_k",
                    "temperature",
                    "batch_size",
                    "start",
                },
            ),
        ]
    )
    path = journal / f"{suite}-{seed}-{key[:12]}.jsonl" if journal is not None else None
    made, seconds = _read_journal(path)
    start = training_start(subject.tokenizer, settings.start)
    tokens = settings.new_tokens * settings.continuations * len(prompts)
    for at in tqdm(
        range(0, len(prompts), settings.batch_size), desc=f"{subject.name} {suite} {seed}", mininterval=2
    ):
        if at < len(made):
            continue
        some = [subject.before + prompt.text for prompt in prompts[at : at + settings.batch_size]]
        began = time.monotonic()
        found = continuations(
            subject.model, subject.tokenizer, some, settings, seed, start=start, processors=subject.processors
        )
        spent = time.monotonic() - began
        seconds += spent
        made += found
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"seconds": round(spent, 3), "texts": found}) + "\n")
    return made, seconds, tokens


def _guards_of(subject: Subject) -> str:
    """What tells the guards inside decoding apart: what was said of them, else the name of the row."""
    return subject.decoding or (subject.name if subject.processors is not None else "")


def _read_journal(path: Path | None) -> tuple[list[list[str]], float]:
    """What an earlier run made and the seconds it took; the file is cut behind its last whole line."""
    if path is None or not path.is_file():
        return [], 0.0
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if whole != raw:
        path.write_bytes(whole)
    rows = [json.loads(line) for line in whole.decode().split("\n")[:-1]]
    return [texts for row in rows for texts in row["texts"]], sum(float(row["seconds"]) for row in rows)


def _checked(subject: Subject, runs: Sequence[list[list[str]]]) -> tuple[list[list[list[str]]], float]:
    """The continuations as a guard on the output lets them out, and the share that it withholds."""
    check = subject.output
    if check is None:
        return [list(run) for run in runs], 0.0
    out, withheld, count = [], 0, 0
    for run in runs:
        flags = _scores(check, run) > 0.5
        out.append(
            [
                ["" if bad else text for text, bad in zip(row, bads, strict=True)]
                for row, bads in zip(run, flags.tolist(), strict=True)
            ]
        )
        withheld, count = withheld + int(flags.sum()), count + flags.size
    return out, withheld / count


def _scores(judge: Judge, run: Sequence[Sequence[str]]) -> Any:
    flat = judge([text for row in run for text in row])
    return np.asarray(flat, np.float32).reshape(len(run), -1)


def _variety(prompts: Sequence[Prompt], runs: Sequence[list[list[str]]]) -> dict[str, dict[str, Any]]:
    """Dist-1, 2, 3 per prompt, mean over prompts: of the continuations, and with the prompt before each."""
    table: dict[str, dict[str, Any]] = {"continuation": {}, "with_prompt": {}}
    for n in (1, 2, 3):
        table["continuation"][str(n)] = spread(
            [float(np.mean([distinct(row, n) for row in run])) for run in runs]
        )
        table["with_prompt"][str(n)] = spread(
            [
                float(
                    np.mean(
                        [
                            distinct([prompt.text + text for text in row], n)
                            for prompt, row in zip(prompts, run, strict=True)
                        ]
                    )
                )
                for run in runs
            ]
        )
    return table


def _language(subject: Subject, data: Path, settings: DetoxSettings, reference: Any) -> dict[str, Any]:
    if not settings.clean_texts:
        return {}
    texts = clean_texts(data, settings.clean_texts)
    start = training_start(subject.tokenizer, settings.start)
    options: dict[str, Any] = {"max_tokens": settings.clean_tokens, "start": start}
    found: dict[str, Any] = {"clean": perplexity(subject.model, subject.tokenizer, texts, **options)}
    if reference is not None:
        kl = drift(subject.model, reference, subject.tokenizer, texts[:50], **options)
        found["clean"]["drift_nats_per_token"] = kl
    return found


def _choices(subject: Subject, data: Path, settings: DetoxSettings) -> dict[str, Any]:
    """Accuracy both ways; the examples are never asked."""
    questions = _questions(data, str(settings.choices))
    most = max(settings.shots, settings.unidetox_shots)
    if settings.choice_examples is not None:
        examples = _questions(data, settings.choice_examples)
    else:
        examples, questions = questions[len(questions) - most :], questions[: len(questions) - most]
    start = training_start(subject.tokenizer, settings.start)
    ways: Mapping[str, int] = {"letters": settings.shots, "unidetox": settings.unidetox_shots}
    return {
        "questions": len(questions),
        **{
            way: accuracy(subject.model, subject.tokenizer, questions, examples[:shots], way=way, start=start)
            for way, shots in ways.items()
        },
    }


def _questions(data: Path, name: str) -> list[Question]:
    if name == "shipped":
        with resources.as_file(resources.files("safeguard.evaluate") / "data" / _SHIPPED) as path:
            return [question_of(row) for row in read_jsonl(path)]
    path = data / name if (data / name).is_file() else Path(name)
    return [question_of(row) for row in read_jsonl(path)]
