"""From content to verdicts: runs the checks of one surface over all readings of each piece.

Closed when in doubt.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Generator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from safeguard.driving import Lane, Step, StepRefused, StepTimeout
from safeguard.policy import Policy, Rules
from safeguard.runtime.tokenising import TextBatch
from safeguard.text import View, views
from safeguard.types import Action, Check, Coverage, Finding, Modality, Scores, Span, Stage, Verdict

log = logging.getLogger(__name__)

TIMED_OUT = "timed out"
"""What a verdict says of a check that ran out of its time."""
STUCK = "was not asked: too many calls of it hang"
"""What a verdict says of a check that ran out of its time so often that its threads pile up."""

_LONG = 4000  # characters; to normalise more takes too long for an event loop

Judging = Generator[Step, Any, "list[list[Verdict]]"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One thing to judge: where it came from, and all readings of it that checks should see.

    views: for text its readings with offsets, for images the pictures (frames, with and without alpha).
    unseen says why it cannot be judged at all.
    """

    source: str
    views: tuple[Any, ...] = field(repr=False)
    round: int = 0
    unseen: str | None = None
    refused: bool = False
    """Unseen and blocked whatever the policy says of errors: it has a setting of its own for these."""
    known: tuple[Verdict, ...] = ()
    """Verdicts that were made before, such as on a preview; it has no views then."""


def plain_text(text: Any) -> Any:
    """The characters of a text alone: a subclass may say one thing to a check and another to its reader."""
    return str.__str__(text) if isinstance(text, str) and type(text) is not str else text


def text_piece(source: str, text: Any, policy: Policy, number: int = 0) -> Piece:
    """A piece of text, in its raw and its normalised reading; unseen when it is no text or too long."""
    if not isinstance(text, str):
        return Piece(source, (), number, f"{source} must be text, got {type(text).__name__}")
    try:
        words = plain_text(text)
        written = plain_text(format(text)) if words is not text else words  # as in an f-string
        size = max(len(words), len(written))
        if size > policy.max_chars:
            why = f"{source} has {size} characters, more than max_chars {policy.max_chars}"
            return Piece(source, (), number, why)
        found = views(words)
        if written != words:
            found += tuple(_standing_for(view.text, len(words)) for view in views(written))
        return Piece(source, found, number)
    except Exception as exc:
        log.error(
            "text cannot be read: source=%s characters=%d error=%s", source, len(text), type(exc).__name__
        )
        return Piece(source, (), number, f"{source} cannot be read ({type(exc).__name__})")


def _standing_for(text: str, size: int) -> View:
    """A reading all of which stands for all of a text of that size."""
    return View("written", text, [0] * len(text), [size] * len(text))


def read_texts(named: Sequence[tuple[str, Any, int]], policy: Policy) -> Generator[Step, Any, list[Piece]]:
    """A piece for each (source, text, round); long ones are not normalised on an event loop."""

    def read() -> list[Piece]:
        return [text_piece(source, text, policy, number) for source, text, number in named]

    if sum(len(text) for _, text, _ in named if isinstance(text, str)) <= _LONG:
        return read()
    return (yield Step(read))  # type: ignore[no-any-return]  # what read gave, through the driver


def image_piece(image: Any) -> Piece:
    """A piece of one picture; image checks look at all its frames and backgrounds themselves."""
    return Piece("output", (image,))


class Budget:
    """Time left for the guard's own work in one call; a piece of work gets the smaller of its limits."""

    __slots__ = ("_each", "_left", "spent_ms")

    def __init__(self, policy: Policy) -> None:
        self._each = policy.check_timeout_s
        self._left = policy.total_timeout_s
        self.spent_ms = 0.0

    def timeout_s(self) -> float | None:
        """Seconds that the next step may take, None for any."""
        if self._left is None:
            return self._each
        left = max(self._left, 1e-6)
        return left if self._each is None else min(left, self._each)

    def spend(self, seconds: float) -> None:
        """Book what a step took."""
        self.spent_ms += seconds * 1e3
        if self._left is not None:
            self._left -= seconds


@dataclass
class Surface:
    """One place where content is judged: its rules, its checks and their thresholds, worked out once."""

    stage: Stage
    modality: Modality
    rules: Rules
    checks: Sequence[Check[Any]]
    policy: Policy
    _judged: list[dict[str, tuple[float, Action] | None]] = field(init=False)
    _lanes: list[Lane] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._judged = [{} for _ in self.checks]
        self._lanes = [Lane(in_turn=True) for _ in self.checks]
        for check in self.checks:
            points = getattr(check, "operating_points", None)
            if points and self.policy.operating_point and self.policy.operating_point not in points:
                log.warning(
                    "not calibrated, so the policy's own thresholds hold: check=%s point=%s known=%s",
                    check.name,
                    self.policy.operating_point,
                    ",".join(points),
                )
            for category, threshold in self._calibrated(check).items():
                if not 0.0 <= threshold <= 1.0:  # also false for NaN, which would never flag
                    raise ValueError(
                        f"check {check.name!r} has the threshold {threshold} for {category!r} at the "
                        f"operating point {self.policy.operating_point!r}; it must be in [0, 1]"
                    )

    def judge(self, pieces: Sequence[Piece], budget: Budget) -> Judging:
        """One list of verdicts per piece, in order.

        Never raises for what a check does: that becomes an error.
        """
        out: list[list[Verdict]] = [[] for _ in pieces]
        if not self.checks:
            return out
        if self.modality == "image" and (self.policy.image_tiles > 1 or self.policy.image_turns > 1):
            pieces = yield Step(partial(_closer, pieces, self.policy))
        seen = [i for i, piece in enumerate(pieces) if piece.views and piece.unseen is None]
        if len(seen) < len(pieces):
            for i in sorted(set(range(len(pieces))) - set(seen)):
                if pieces[i].known:
                    out[i] += [replace(v, round=pieces[i].round) for v in pieces[i].known]
                    continue
                why = pieces[i].unseen or "nothing to look at"
                out[i].append(self._failed("safeguard", pieces[i], why, 0.0))
        if not seen:
            return out
        batch, places = _flatten([pieces[i] for i in seen], self.modality)
        if self.modality == "text" and len(self.checks) > 1:
            batch = TextBatch(batch)  # checks with one tokenizer tokenise it once
        for number, check in enumerate(self.checks):
            started = time.perf_counter()
            results = yield from self._run(number, batch, budget)
            each_ms = (time.perf_counter() - started) * 1e3 / len(seen)
            for i, rows in zip(seen, places, strict=True):
                out[i].append(self._verdict(number, check, pieces[i], [results[r] for r in rows], each_ms))
        return out

    def _run(
        self, number: int, batch: Sequence[Any], budget: Budget
    ) -> Generator[Step, Any, list[Finding | str]]:
        """A finding per reading, or what went wrong with it.

        One bad item does not take its neighbours with it.
        """
        check, started = self.checks[number], time.perf_counter()
        try:
            try:
                found = yield Step(partial(_call, check, batch), budget.timeout_s(), lane=self._lanes[number])
            finally:  # before an item is tried again alone, so that all tries share the total
                budget.spend(time.perf_counter() - started)
        except StepTimeout:
            log.error("check timed out: check=%s items=%d", check.name, len(batch))
            return [TIMED_OUT] * len(batch)
        except StepRefused:
            log.error("check not asked, too many calls of it hang: check=%s items=%d", check.name, len(batch))
            return [STUCK] * len(batch)
        except Exception as exc:
            log.error("check failed: check=%s items=%d error=%s", check.name, len(batch), type(exc).__name__)
            if len(batch) == 1:
                return [f"failed with {type(exc).__name__}"]
        else:
            return found  # type: ignore[no-any-return]  # what _call gave, through the driver
        results: list[Finding | str] = []
        for item in batch:
            results += yield from self._run(number, [item], budget)
        return results

    def _verdict(
        self, number: int, check: Check[Any], piece: Piece, results: list[Finding | str], ms: float
    ) -> Verdict:
        """The worst of all readings of one piece, judged."""
        findings: list[Finding] = []
        for result in results:
            if isinstance(result, str):
                return self._failed(check.name, piece, result, ms)
            findings.append(result)
        scores = _worst(findings)
        known = self._judged[number]
        thresholds: dict[str, float] = {}
        flagged: list[str] = []
        action = Action.ALLOW
        for category, score in scores.items():
            judged = known[category] if category in known else self._threshold(known, check, category)
            if judged is None:
                continue
            thresholds[category] = judged[0]
            if score >= judged[0]:
                flagged.append(category)
                if judged[1].strength > action.strength:
                    action = judged[1]
        if flagged and self.policy.mode == "monitor":
            action = Action.MONITOR
        return Verdict(
            check.name,
            self.stage,
            action,
            scores,
            thresholds,
            tuple(flagged),
            _spans(piece, findings, flagged) if flagged else (),
            _coverage(findings),
            ms,
            getattr(check, "digest", None),
            None,
            piece.source,
            piece.round,
        )

    def _threshold(
        self, known: dict[str, tuple[float, Action] | None], check: Check[Any], category: str
    ) -> tuple[float, Action] | None:
        """Threshold and action of a category of a check, None where it is not judged; worked out once."""
        threshold = self.rules.threshold_of(category, self._calibrated(check))
        known[category] = None if threshold is None else (threshold, self.rules.action_of(category))
        return known[category]

    def _calibrated(self, check: Check[Any]) -> Mapping[str, float]:
        points: Mapping[str, Mapping[str, float]] = getattr(check, "operating_points", None) or {}
        return points.get(self.policy.operating_point or "", {})

    def _failed(self, check: str, piece: Piece, why: str, ms: float) -> Verdict:
        """The verdict on what could not be judged: the policy's on_error, and never a silent pass."""
        open_ = self.policy.mode == "monitor" or (self.policy.on_error == "allow" and not piece.refused)
        if open_:
            log.warning("not judged and let through by policy: check=%s source=%s", check, piece.source)
        action = Action.MONITOR if open_ else Action.BLOCK
        return Verdict(
            check, self.stage, action, {}, latency_ms=ms, error=why, source=piece.source, round=piece.round
        )


def _closer(pieces: Sequence[Piece], policy: Policy) -> list[Piece]:
    """The pieces with the closer looks at pictures that the policy asks for; unseen where it cannot be."""
    from safeguard.images import closer_looks  # PIL, and few policies ask for it

    found = []
    for piece in pieces:
        try:
            looks = tuple(
                look
                for view in piece.views
                for look in closer_looks(view, tiles=policy.image_tiles, turns=policy.image_turns)
            )
            found.append(replace(piece, views=looks))
        except (ValueError, TypeError) as exc:
            found.append(Piece(piece.source, (), piece.round, f"cannot be looked at closely: {exc}"))
        except Exception as exc:  # out of memory, errors of a picture library
            log.error("picture cannot be looked at closely: error=%s", type(exc).__name__)
            why = f"cannot be looked at closely ({type(exc).__name__})"
            found.append(Piece(piece.source, (), piece.round, why))
    return found


def _call(check: Check[Any], batch: Sequence[Any]) -> list[Finding | str]:
    """Run a check and look at all that it gives; what is not a probability is an error of that item."""
    try:
        rows = check(copy(batch))  # its own: what it does to that changes nothing here
    except BaseException as exc:
        if type(exc).__module__ != "pyo3_runtime":  # what ends a program passes through
            raise
        raise RuntimeError("a part of the check that is written in Rust panicked") from exc
    if len(rows) != len(batch):
        raise ValueError(f"check {check.name!r} gave {len(rows)} results for {len(batch)} items")
    return [_finding(row, item) for row, item in zip(rows, batch, strict=True)]


def _finding(row: Finding | Scores, item: Any) -> Finding | str:
    finding = row if isinstance(row, Finding) else Finding(row)
    if not isinstance(finding.scores, Mapping):
        return f"gave {type(finding.scores).__name__}, a row must be a Finding or scores"
    if not finding.scores:
        return "gave no scores"
    for category, score in finding.scores.items():
        if not isinstance(category, str):
            return f"gave a category of type {type(category).__name__}, it must be a name"
        if type(score) is not float:
            scores = {c: float(s + 0.0) for c, s in finding.scores.items()}
            return _finding(replace(finding, scores=scores), item)
        if not 0.0 <= score <= 1.0:  # also false for NaN
            kind = "NaN" if math.isnan(score) else f"{score:g}"
            return f"gave {kind} for {category!r}, scores must be in [0, 1]"
    if finding.coverage is not None and not isinstance(finding.coverage, Coverage):
        return f"gave a coverage of type {type(finding.coverage).__name__}"
    return (_wrong_span(finding.spans, item) if finding.spans else None) or finding


def _wrong_span(spans: Sequence[Span], item: Any) -> str | None:
    """What is wrong with the places that a check named, if anything."""
    for span in spans:
        if not isinstance(span, Span) or not isinstance(span.category, str):
            return "gave a span that is no Span of a category"
        whole = isinstance(span.start, int) and isinstance(span.end, int)
        if isinstance(item, str) and not (whole and 0 <= span.start <= span.end <= len(item)):
            return f"gave a span outside 0 to {len(item)}"
        if not 0.0 <= span.score <= 1.0:
            return "gave a span whose score is not in [0, 1]"
    return None


def _flatten(pieces: Sequence[Piece], modality: Modality) -> tuple[list[Any], list[list[int]]]:
    """All readings in one batch, and for each piece the rows that are its own.

    Equal texts are scored once.
    """
    batch: list[Any] = []
    places: list[list[int]] = []
    known: dict[str, int] = {}
    for piece in pieces:
        rows: list[int] = []
        for view in piece.views:
            if modality != "text":
                rows.append(len(batch))
                batch.append(view)
                continue
            row = known.setdefault(view.text, len(batch))
            if row == len(batch):
                batch.append(view.text)
            rows.append(row)
        places.append(rows)
    return batch, places


def _worst(findings: Sequence[Finding]) -> dict[str, float]:
    if len(findings) == 1:
        return dict(findings[0].scores)
    worst: dict[str, float] = {}
    for finding in findings:
        for category, score in finding.scores.items():
            worst[category] = max(score, worst.get(category, 0.0))
    return worst


def _spans(piece: Piece, findings: Sequence[Finding], flagged: Sequence[str]) -> tuple[Span, ...]:
    """Places of the flagged categories in the original text, each once, in order."""
    found: dict[tuple[int, int, str], float] = {}
    for view, finding in zip(piece.views, findings, strict=True):
        if not isinstance(view, View):
            continue
        for span in finding.spans:
            if span.category in flagged:
                start, end = view.span(span.start, span.end)
                key = (start, end, span.category)
                found[key] = max(found.get(key, 0.0), span.score)
    return tuple(Span(start, end, category, score) for (start, end, category), score in sorted(found.items()))


def _coverage(findings: Sequence[Finding]) -> Coverage | None:
    """The reading of which least was seen."""
    if len(findings) == 1:
        return findings[0].coverage
    known = [f.coverage for f in findings if f.coverage is not None]
    return min(known, key=lambda c: c.checked / max(c.total, 1), default=None)


def strongest(verdicts: Sequence[Verdict]) -> Action:
    """The strongest action among verdicts; allow where there are none."""
    if len(verdicts) == 1:
        return verdicts[0].action
    return max((v.action for v in verdicts), key=lambda a: a.strength, default=Action.ALLOW)


def hash_of(text: str | None, salt: bytes) -> str | None:
    """First 12 hex digits of a salted hash: enough to find a text again, not to recover it."""
    if not isinstance(text, str):
        return None
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=salt, digest_size=6).hexdigest()
