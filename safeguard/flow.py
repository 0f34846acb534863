"""What happens in a guarded call: judge the prompt, refine it, generate, judge the result, try again.

Written once as a generator over a `Job`, which is one call as its adapter sees it; `safeguard.driving` runs
it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from safeguard.calls import NEGATIVE, Ask, Item, Job, Outcome, Route, cut_spans, make_report
from safeguard.driving import Step, StepRefused, StepTimeout
from safeguard.errors import RefinerError
from safeguard.judging import STUCK, TIMED_OUT, Budget, Piece, plain_text, read_texts, strongest
from safeguard.policy import Policy
from safeguard.types import REFINER, Action, Refiner, RefineRequest, Report, Verdict

log = logging.getLogger(__name__)


def judge_asks(route: Route, asks: Sequence[Ask], budget: Budget) -> Generator[Step, Any, list[Item]]:
    """Judge all texts of all asks, refine or redact what the policy says, and judge the new texts again."""
    policy = route.policy
    items = [Item({name: plain_text(text) for name, text in ask.texts.items()}) for ask in asks]
    yield from _judge_texts(route, items, [list(item.texts) for item in items], budget)
    for item, ask in zip(items, asks, strict=True):
        if ask.unseen and policy.unseen_input == "block" and route.inputs.checks:
            unseen = [
                Piece(name, (), 0, f"{name} cannot be seen by any check", refused=True) for name in ask.unseen
            ]
            rows = yield from route.inputs.judge(unseen, budget)
            item.verdicts += [v for row in rows for v in row]
        item.asked = strongest(item.verdicts)
    todo = [item for item in items if item.asked in (Action.REFINE, Action.REDACT)]
    if todo:
        changed, refined = yield from _rewrite(route, todo, budget)
        again = [(item, names) for item, names in zip(todo, changed, strict=True) if names]
        yield from _judge_texts(route, [i for i, _ in again], [names for _, names in again], budget)
        for _ in range(1, getattr(route.refiner, "attempts", 1)):
            refined = [place for place in refined if _stays(place)]
            if not refined:
                break
            refined = yield from _try_again(route, refined, budget)
        passed = {id(item) for item, _ in again if _passes(item)}
        for item in todo:
            if id(item) not in passed:
                item.asked = Action.BLOCK
            else:
                item.refined = item.asked is Action.REFINE
    return items


@dataclass(frozen=True, slots=True)
class _Refined:
    """One text of an item that was rewritten, and what the refiner was asked."""

    item: Item
    name: str
    request: RefineRequest


def _latest(item: Item, name: str) -> list[Verdict]:
    """The verdicts on one text as it stands."""
    last = _last_round(item, "input", name)
    return [v for v in item.verdicts if v.source == name and v.stage == "input" and v.round == last]


def _passes(item: Item) -> bool:
    """Whether every text of the item passed when it was last judged."""
    return all(strongest(_latest(item, v.source)).passes for v in item.verdicts)


def _stays(refined: _Refined) -> bool:
    """Whether a rewrite is flagged too, and by nothing that another one could not mend."""
    return strongest(_latest(refined.item, refined.name)) is Action.REFINE


def _try_again(
    route: Route, places: Sequence[_Refined], budget: Budget
) -> Generator[Step, Any, list[_Refined]]:
    """Another rewrite for each place, judged again; without those that the refiner had no other for."""
    requests = [replace(p.request, tried=(*p.request.tried, p.item.texts[p.name])) for p in places]
    texts = yield from _refine(route, requests, [p.item for p in places], budget)
    found = [
        (_Refined(p.item, p.name, request), text)
        for p, request, text in zip(places, requests, texts, strict=True)
        if text is not None and text != request.prompt and text not in request.tried
    ]
    for place, text in found:
        place.item.texts[place.name] = text
    yield from _judge_texts(route, [p.item for p, _ in found], [[p.name] for p, _ in found], budget)
    return [place for place, _ in found]


def _judge_texts(
    route: Route, items: Sequence[Item], names: Sequence[Sequence[str]], budget: Budget
) -> Generator[Step, Any, None]:
    """Judge the named texts of each item; verdicts are added to the items."""
    places = [(item, name) for item, wanted in zip(items, names, strict=True) for name in wanted]
    pieces = yield from read_texts(
        [
            (name, item.texts[name], 1 + _last_round(item, "input", name) if item.verdicts else 0)
            for item, name in places
        ],
        route.policy,
    )
    rows = yield from route.inputs.judge(pieces, budget)
    for (item, name), row in zip(places, rows, strict=True):
        if route.policy.negative_prompt == "report" and name.startswith(NEGATIVE):
            row = [_report_only(v) for v in row]
        item.verdicts += row


def _last_round(item: Item, stage: str, source: str) -> int:
    return max((v.round for v in item.verdicts if v.stage == stage and v.source == source), default=-1)


def _report_only(verdict: Verdict) -> Verdict:
    return verdict if verdict.error or verdict.action.passes else replace(verdict, action=Action.MONITOR)


def _rewrite(
    route: Route, items: Sequence[Item], budget: Budget
) -> Generator[Step, Any, tuple[list[list[str]], list[_Refined]]]:
    """Refine or redact the flagged texts of each item in place.

    Returns the names of the texts of each that changed, and those of them that were refined.
    """
    refined: list[_Refined] = []
    changed: list[list[str]] = [[] for _ in items]
    places: list[tuple[int, str]] = []
    requests: list[RefineRequest] = []
    for i, item in enumerate(items):
        for name in item.texts:
            verdicts = [v for v in item.verdicts if v.source == name and not v.action.passes]
            if not verdicts:
                continue
            spans = tuple(s for v in verdicts for s in v.spans)
            if strongest(verdicts) is Action.REDACT:
                text = cut_spans(item.texts[name], spans, route.policy.placeholder_text)
                if text != item.texts[name]:
                    item.texts[name] = text
                    changed[i].append(name)
            elif strongest(verdicts) is Action.REFINE and not name.startswith(NEGATIVE):
                flagged = tuple(dict.fromkeys(c for v in verdicts for c in v.flagged))
                places.append((i, name))
                requests.append(RefineRequest(item.texts[name], flagged, spans))
    texts = yield from _refine(route, requests, [items[i] for i, _ in places], budget)
    for (i, name), request, rewrite in zip(places, requests, texts, strict=True):
        if rewrite is not None and rewrite != items[i].texts[name]:
            items[i].texts[name] = rewrite
            changed[i].append(name)
            refined.append(_Refined(items[i], name, request))
    return changed, refined


def _refine(
    route: Route, requests: Sequence[RefineRequest], items: Sequence[Item], budget: Budget
) -> Generator[Step, Any, list[str | None]]:
    """A rewrite per request; None where there is no refiner, or it gave nothing that can be used.

    Then the flagged text stays, so the item is blocked (or made again with a new seed only), and the failure
    is noted in its verdicts.
    """
    if not requests or route.refiner is None:
        return [None] * len(requests)
    started = time.perf_counter()
    why = ""
    texts: list[str | None] = [None] * len(requests)
    try:
        texts = yield Step(
            partial(_rewrites, route.refiner, requests), budget.timeout_s(), lane=route.refining
        )
    except StepTimeout:
        why = TIMED_OUT
    except StepRefused:
        why = STUCK
    except Exception as exc:
        why = f"failed with {type(exc).__name__}"
    finally:
        budget.spend(time.perf_counter() - started)
    name = route.refiner.name
    if why:
        log.error("refiner failed: refiner=%s items=%d why=%s", name, len(requests), why)
    for request, item, text in zip(requests, items, texts, strict=True):
        if text is None:  # monitor: what was flagged already decides, and where nothing was, on_error
            error, decides = why or "gave no text", request.flagged or route.policy.on_error == "allow"
            action = Action.BLOCK if request.round and not decides else Action.MONITOR
            item.verdicts.append(
                Verdict(name, "input", action, {}, error=error, source=REFINER, round=request.round + 1)
            )
    return texts


def _rewrites(refiner: Refiner, requests: Sequence[RefineRequest]) -> list[str | None]:
    """What the refiner gives, None for what is no text. Raises RefinerError for the wrong number of them."""
    texts = refiner(list(requests))
    if isinstance(texts, str) or len(texts) != len(requests):
        raise RefinerError(f"refiner {refiner.name!r} must give {len(requests)} texts, one for each request")
    return [text if isinstance(text, str) and text.strip() else None for text in texts]


def run(route: Route, job: Job) -> Generator[Step, Any, Outcome]:
    """The whole guarded call: prompts judged, outputs made and judged, rounds, one report per output."""
    budget = Budget(route.policy)
    asks = yield from judge_asks(route, job.asks, budget)
    texts = [None if ask.asked is Action.BLOCK else ask.texts for ask in asks]
    made: Sequence[Sequence[Any]] = [[] for _ in asks]
    if any(t is not None for t in texts):
        made = yield Step(partial(job.first, texts), on_loop=job.on_loop)
    items: list[list[Item]] = []
    for ask, spec, outputs in zip(asks, job.asks, made, strict=True):
        refused = ask.asked is Action.BLOCK
        items.append(
            [
                Item(dict(ask.texts), list(ask.verdicts), ask.asked, Action.ALLOW, ask.refined, 0, output)
                for output in ([None] * spec.outputs if refused else outputs)
            ]
        )
    yield from _judge_outputs(
        route, job, [i for row in items for i in row if i.asked is not Action.BLOCK], budget
    )
    for a, row in enumerate(items):
        for place, item in enumerate(row):
            if item.asked is not Action.BLOCK and _goes_on(route, item):
                yield from _more_rounds(route, job, a, place, item, budget)
            if item.made is Action.REDACT:
                yield from _redact(route, job, item, budget)
    return _settle(route, job, items, budget)


def _judge_outputs(
    route: Route, job: Job, items: Sequence[Item], budget: Budget
) -> Generator[Step, Any, None]:
    """Judge the present output of each item."""
    if not items or not (route.outputs.checks or route.always_judges):
        return
    started = time.perf_counter()
    pieces = yield from _read_outputs(job, [item.output for item in items], route.policy)
    budget.spend(time.perf_counter() - started)
    pieces = [
        replace(piece, round=1 + _last_round(item, "output", piece.source))
        if item.rounds or item.made.strength
        else piece
        for piece, item in zip(pieces, items, strict=True)
    ]
    rows = yield from route.outputs.judge(pieces, budget)
    for item, piece, row in zip(items, pieces, rows, strict=True):
        item.verdicts += row
        item.made = strongest(row)
        item.views = piece.views if route.outputs.modality == "image" else ()


def _read_outputs(job: Job, outputs: Sequence[Any], policy: Policy) -> Generator[Step, Any, list[Piece]]:
    """A piece per output; one that cannot be read is unseen, and does not take its neighbours with it."""
    try:
        return (yield Step(partial(_pieces, job, outputs, policy)))  # type: ignore[no-any-return]
    except Exception as exc:
        log.error("output cannot be read: items=%d error=%s", len(outputs), type(exc).__name__)
        if len(outputs) == 1:
            return [Piece("output", (), 0, f"output cannot be read ({type(exc).__name__})")]
    found: list[Piece] = []
    for output in outputs:
        found += yield from _read_outputs(job, [output], policy)
    return found


def _pieces(job: Job, outputs: Sequence[Any], policy: Policy) -> list[Piece]:
    pieces = list(job.pieces(outputs, policy))
    if len(pieces) != len(outputs):
        raise ValueError(f"{len(outputs)} outputs were read as {len(pieces)} pieces")
    return pieces


def _more_rounds(
    route: Route, job: Job, a: int, place: int, item: Item, budget: Budget
) -> Generator[Step, Any, None]:
    """Iterative refinement of one output.

    Original prompt and latest result in, new prompt or new seed, judged again.

    Unlike the published loop the last result is judged too; what is still unsafe then is blocked. What the
    checks pass goes on only where the refiner always judges, until that keeps it or the rounds are over.
    """
    main = next(iter(job.asks[a].texts), None)
    for number in range(1, route.policy.max_rounds + 1):
        came = "same"
        if item.made is not Action.REGENERATE and main is not None:
            came = yield from _refine_again(route, job.asks[a].texts[main], main, item, number, budget)
        if came == "unsafe" or (came == "failed" and item.made.passes and route.policy.on_error != "allow"):
            item.made = Action.BLOCK
            return
        if item.made.passes and came != "new":
            return
        item.output = yield Step(partial(job.again, a, place, dict(item.texts)), on_loop=job.on_loop)
        item.rounds = number
        yield from _judge_outputs(route, job, [item], budget)
        if not _goes_on(route, item):
            return
    if not item.made.passes:
        item.made = Action.BLOCK
    elif main is not None and not route.outputs.checks:
        yield from _ask_of_last(route, job.asks[a].texts[main], main, item, budget)


def _ask_of_last(
    route: Route, original: str, main: str, item: Item, budget: Budget
) -> Generator[Step, Any, None]:
    """Ask about the last picture, which no check has judged: the refiner keeps it, or it is blocked."""
    number = route.policy.max_rounds + 1
    request = _look(item, original, main, number)
    (text,) = yield from _refine(route, [request], [item], budget)
    if text is None:
        item.made = item.made if route.policy.on_error == "allow" else Action.BLOCK
    elif route.refiner is not None and text not in (original, item.texts[main]):
        item.made, whole = Action.BLOCK, {"not_kept": 1.0}
        item.verdicts.append(
            Verdict(
                route.refiner.name,
                "output",
                item.made,
                whole,
                whole,
                tuple(whole),
                source="output",
                round=number,
            )
        )


def _look(item: Item, original: str, main: str, number: int, flagged: tuple[str, ...] = ()) -> RefineRequest:
    """What a refiner is asked of the latest output."""
    current = item.texts[main]
    return RefineRequest(original, flagged, (), item.output, number, current=current, views=item.views)


def _goes_on(route: Route, item: Item) -> bool:
    """Whether there is something to do about the present output, or somebody else to ask about it."""
    return item.made in (Action.REFINE, Action.REGENERATE) or (item.made.passes and route.always_judges)


def _redact(route: Route, job: Job, item: Item, budget: Budget) -> Generator[Step, Any, None]:
    """Cut the flagged places out of an output.

    What is left is judged again, and blocked if it is still flagged.
    """
    last = _last_round(item, "output", "output")
    spans = [s for v in item.verdicts if v.stage == "output" and v.round == last for s in v.spans]
    try:
        output = job.redact(item.output, spans) if spans else item.output
    except Exception as exc:
        log.error("output cannot be redacted: error=%s", type(exc).__name__)
        spans = []
    if spans:
        item.output = output
        yield from _judge_outputs(route, job, [item], budget)
    # flagged as a whole there is no place to cut
    item.made = Action.REDACT if spans and item.made.passes else Action.BLOCK


def _refine_again(
    route: Route, original: str, main: str, item: Item, number: int, budget: Budget
) -> Generator[Step, Any, Literal["same", "new", "failed", "unsafe"]]:
    """Rewrite the prompt after a result; "unsafe" when the new prompt itself is.

    "same" and "failed" have nothing new to say: after a flagged result the round still gets a new seed.
    """
    flagged: tuple[str, ...] = ()
    if not item.made.passes:
        flagged = tuple(dict.fromkeys(c for v in item.verdicts if v.stage == "output" for c in v.flagged))
    request = _look(item, original, main, number, flagged)
    (text,) = yield from _refine(route, [request], [item], budget)
    if text is None:
        return "failed"
    if text in (item.texts[main], original):  # the original, where another text drew this, is no news either
        return "same"
    before = len(item.verdicts)
    item.texts[main] = text
    yield from _judge_texts(route, [item], [[main]], budget)
    item.refined = True
    return "new" if strongest(item.verdicts[before:]).passes else "unsafe"


def _settle(route: Route, job: Job, items: Sequence[Sequence[Item]], budget: Budget) -> Outcome:
    """Carry out the final actions and write the reports."""
    each_ms = budget.spent_ms / max(sum(len(row) for row in items), 1)
    outputs: list[list[Any]] = []
    reports: list[list[Report]] = []
    for ask, row in zip(job.asks, items, strict=True):
        done = [_carry_out(job, item) for item in row]
        outputs.append([output for output, _ in done])
        reports.append(
            [_report(route, ask, item, action, each_ms) for item, (_, action) in zip(row, done, strict=True)]
        )
    return Outcome(outputs, reports)


def _carry_out(job: Job, item: Item) -> tuple[Any, Action]:
    """The output as it is handed on, and what was finally done to the item."""
    output = item.output
    if Action.BLOCK in (item.asked, item.made):
        return job.placeholder(output), Action.BLOCK
    if item.made is Action.REPLACE:
        return job.placeholder(output), Action.REPLACE
    if item.made is Action.REDACT:
        return output, Action.REDACT
    if item.refined:
        return output, Action.REFINE
    if item.rounds:
        return output, Action.REGENERATE
    return output, max(item.asked, item.made, key=lambda a: a.strength)


def _report(route: Route, ask: Ask, item: Item, action: Action, ms: float) -> Report:
    return make_report(
        route, ask, item.texts, item.verdicts, action, refined=item.refined, rounds=item.rounds, ms=ms
    )


def input_reports(route: Route, asks: Sequence[Ask]) -> Generator[Step, Any, list[Report]]:
    """Judge asks alone, refined where the policy says so; never generates."""
    budget = Budget(route.policy)
    items = yield from judge_asks(route, asks, budget)
    each_ms = budget.spent_ms / max(len(items), 1)
    return [_report(route, ask, item, item.asked, each_ms) for ask, item in zip(asks, items, strict=True)]


def output_reports(route: Route, pieces: Sequence[Piece]) -> Generator[Step, Any, list[Report]]:
    """Judge results alone; what would be regenerated or refined says so."""
    budget = Budget(route.policy)
    rows = yield from route.outputs.judge(pieces, budget)
    each_ms = budget.spent_ms / max(len(rows), 1)
    empty = Ask({})
    return [_report(route, empty, Item({}, row, strongest(row)), strongest(row), each_ms) for row in rows]
