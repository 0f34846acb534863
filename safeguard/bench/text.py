"""A classifier of toxic-bert's architecture and text-guard-s, beside the ways that others have."""

from __future__ import annotations

from collections.abc import Callable

from safeguard.bench.models import Made, make_text_models
from safeguard.bench.process import OURS, PEERS, Start, Worker, workers
from safeguard.bench.report import Row, Section
from safeguard.bench.settings import Settings
from safeguard.bench.texts import SHORT_TOKENS, characters, of_length
from safeguard.bench.timing import Contender, Sample, interleave

TEXTS, SHORT, TRIVIAL = "8 prompts", "one short text", "trivial check"
INT8, FLOAT32, TORCH, GUARD = "ours int8", "ours float32", "ours torch", "text-guard-s"
EAGER, PIPELINE = "torch eager", "transformers pipeline"
DETOXIFY, DETOXIFY_ONE, LLM_GUARD = "detoxify", "detoxify one by one", "llm-guard onnx"
_COUNT = 8
_CALLS = 100


def run_text(settings: Settings) -> Section:
    """Goals 1 and 2: throughput on texts as long as real prompts are, and one short text."""
    made = make_text_models(settings.work / "text", tiny=settings.tiny, say=settings.say)
    section = Section(
        "text", "Text: toxic-bert's architecture, random weights, the same for all; text-guard-s"
    )
    starts = _starts(settings, made)
    with workers(starts, settings.work / "logs" / "text", say=settings.say) as (running, failed):
        section.failed |= failed
        section.about = {name: worker.about for name, worker in running.items()}
        for workload, payload, items in (
            (TEXTS, lambda turn: settings.texts.draw(_COUNT, settings.seed * 1000 + turn), _COUNT),
            (SHORT, lambda turn: [of_length(SHORT_TOKENS, seed=turn)], 1),
        ):
            _measure(section, settings, running, workload, payload, items, {s.name: s.note for s in starts})
    _overheads(section, settings)
    _goals(section)
    drawn = [length for i in range(20) for length in characters(settings.texts.draw(_COUNT, i))]
    section.notes += [
        "weights are random: they cost what trained ones do, scores mean nothing",
        f"texts: {settings.texts.source}; characters, quartiles: {_quartiles(drawn)}",
        "detoxify pads a list to its longest text, so it is given one text a call as well",
    ]
    return section


def _starts(settings: Settings, made: Made) -> list[Start]:
    source = {"source": str(made.source)}
    python = settings.python_of("llm-guard")
    found = [
        Start(
            INT8, OURS, "text_pack", {"pack": str(made.int8)}, note="onnxruntime, int8 dynamic per channel"
        ),
        Start(FLOAT32, OURS, "text_pack", {"pack": str(made.float32)}, note="onnxruntime"),
        Start(TORCH, OURS, "text_torch", source, note="our check, torch eager inside"),
        Start(GUARD, OURS, "text_pack", {"pack": "text-guard-s"}, note="our shipped model, trained weights"),
        Start(EAGER, PEERS, "torch_eager", source, note="tokenizer and model, one text a call, no padding"),
        Start(PIPELINE, PEERS, "pipeline", source, note="a list, batch size 1 as by default"),
    ]
    if python:
        real = "the real package, our weights in it"
        return [
            *found,
            Start(DETOXIFY, PEERS, "detoxify", source, python, f"{real}; one list a call"),
            Start(
                DETOXIFY_ONE,
                PEERS,
                "detoxify",
                {**source, "by_one": True},
                python,
                f"{real}; one text a call",
            ),
            Start(
                LLM_GUARD, PEERS, "llm_guard", source, python, f"{real}; optimum, every text padded to 512"
            ),
        ]
    path = "its code path, not the package (no --peers)"
    graph = {**source, "graph": str(made.float32 / "model.onnx")}
    return [
        *found,
        Start(DETOXIFY, PEERS, "detoxify_path", source, note=f"{path}; one list a call"),
        Start(
            DETOXIFY_ONE, PEERS, "detoxify_path", {**source, "by_one": True}, note=f"{path}; one text a call"
        ),
        Start(LLM_GUARD, PEERS, "llm_guard_path", graph, note=f"{path}; every text padded to 512"),
    ]


def _measure(
    section: Section,
    settings: Settings,
    running: dict[str, Worker],
    workload: str,
    texts: Callable[[int], list[str]],
    items: int,
    notes: dict[str, str],
) -> None:
    def contender(worker: Worker) -> Contender:
        return lambda turn: worker({"texts": texts(turn)}, items)

    turns = {name: contender(worker) for name, worker in running.items()}
    outcome = interleave(
        turns, settings.repeats, seed=settings.seed, say=lambda what: settings.say(f"{workload}: {what}")
    )
    section.failed |= outcome.failed
    for name in outcome.samples:
        more = {"peak_mb": running[name].peak_mb}
        section.rows.append(Row(name, workload, outcome.per_item(name), items, notes[name], more))


def _overheads(section: Section, settings: Settings) -> None:
    """For information: what each framework adds around a check that does next to nothing."""
    asked = [
        ("openai-guardrails", "openai_guardrails", "its keyword check"),
        ("guardrails-ai", "guardrails_ai", "a validator that passes everything"),
        ("nemoguardrails", "nemo_guardrails", "an input rail whose action allows everything"),
    ]
    starts = [Start("safeguard", OURS, "trivial_guard", note="a check that does nothing")]
    for name, factory, note in asked:
        python = settings.python_of(name)
        if python is None:
            section.failed[name] = "no environment for it (--peers)"
        else:
            starts.append(Start(name, PEERS, factory, {}, python, note))
    payload = {"text": of_length(SHORT_TOKENS), "calls": _CALLS}
    with workers(starts, settings.work / "logs" / "text", say=settings.say) as (running, failed):
        section.failed |= failed
        section.about |= {name: worker.about for name, worker in running.items()}

        def contender(worker: Worker) -> Callable[[int], Sample]:
            return lambda _: worker(payload, _CALLS)

        outcome = interleave(
            {n: contender(w) for n, w in running.items()}, settings.repeats, seed=settings.seed
        )
        section.failed |= outcome.failed
        notes = {start.name: start.note for start in starts}
        for name in outcome.samples:
            more = {"peak_mb": running[name].peak_mb}
            section.rows.append(Row(name, TRIVIAL, outcome.per_item(name), _CALLS, notes[name], more))


def _goals(section: Section) -> None:
    section.goal("int8 against a peer that pads to 512", 25, [LLM_GUARD], INT8, TEXTS)
    section.goal("int8 against torch eager at equal lengths", 3.5, [EAGER], INT8, TEXTS)
    section.goal("text-guard-s against Detoxify, its faster way", 30, [DETOXIFY, DETOXIFY_ONE], GUARD, TEXTS)
    section.goal("text-guard-s against llm-guard", 200, [LLM_GUARD], GUARD, TEXTS)


def _quartiles(ordered: list[int]) -> str:
    ordered = sorted(ordered)
    return ", ".join(str(ordered[int(share * (len(ordered) - 1))]) for share in (0.25, 0.5, 0.75))
