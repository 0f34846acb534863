"""From a finished run to `text-guard-s`: export, int8, calibration on validation data, the pack.

Thresholds are chosen on validation rows and our own validation templates, never on what tests use.
"""

from __future__ import annotations

import json
import math
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safeguard.calibrate import Calibration, calibrate_scores, write_calibration
from safeguard.checks.text_classifier import TextClassifier
from safeguard.errors import MissingExtra
from safeguard.evaluate.card_text import card
from safeguard.evaluate.classifier import score_texts
from safeguard.files import write_whole
from safeguard.packs import read_pack as open_pack
from safeguard.packs import seal
from safeguard.train.benign_prompts import code_rows
from safeguard.train.classifier import ClassifierConfig, build_model, own_rows
from safeguard.train.int8_graph import Activations
from safeguard.train.public_prompts import prompt_rows
from safeguard.train.text_data import JUDGED, NOISY, Row, digests, hard_rows, read_pack, unique
from safeguard.train.text_pack import export_float, open_session, write_text_pack
from safeguard.train.toxicity_teacher import add_teacher

try:
    from tokenizers import Tokenizer
except ImportError as exc:
    raise MissingExtra("tokenizers", "onnx") from exc

if TYPE_CHECKING:
    from safeguard.manifest import Manifest

RATES: Mapping[str, Mapping[str, float]] = {
    "toxicity": {"lenient": 0.03, "standard": 0.08, "strict": 0.15},
    "t2i_prompt": {"lenient": 0.005, "standard": 0.01, "strict": 0.03},
    "llm_request": {"lenient": 0.005, "standard": 0.01, "strict": 0.03},
    "jailbreak": {"lenient": 0.005, "standard": 0.01, "strict": 0.03},
}
"""Judged label -> operating point -> wanted false positives; higher for toxicity, whose labels are noisy."""


_FLOORS: Mapping[str, float] = {"lenient": 0.5, "standard": 0.3, "strict": 0.15}
FLOORS: Mapping[str, Mapping[str, float]] = {
    "toxicity": _FLOORS,
    "t2i_prompt": _FLOORS,
    "llm_request": {"lenient": 0.7, "standard": 0.5, "strict": 0.25},
    "jailbreak": _FLOORS,
}
"""Lowest thresholds: where validation is too easy to say, new texts are harder than it."""

_PROMPTS = frozenset(
    {"awesome_chatgpt_prompts", "openai_evals", "writingbench", "swe_lancer", "stdlib_code", "hard_safe"}
)
_COUNTED: Mapping[str, frozenset[str]] = {"llm_request": _PROMPTS, "jailbreak": _PROMPTS}
"""Judged label -> sources whose harmless rows are what it will see: captions would flatter its rates."""


def validation_rows(data: Path, teacher: Path | None = None, prompts: Sequence[Path] = ()) -> list[Row]:
    """The pack's validation rows with their harmless twins, our own validation templates, code and prompts.

    teacher: folder of the toxicity teacher; with it, rows of sources that label hatred of groups only say
    nothing of toxicity where they are insults or threats to single people, as in training.
    """
    rows = read_pack(data, "validation")
    rows = [row for row in rows if row.source not in NOISY]
    if teacher is not None:
        rows = add_teacher(rows, teacher)
    twins = [row.twin for row in rows if row.twin is not None]
    return unique(
        [
            *rows,
            *twins,
            *hard_rows("hard_text_validation.toml"),
            *code_rows("validation", count=400),
            *prompt_rows(prompts, "validation"),
        ]
    )


def calibrations(check: TextClassifier, rows: Sequence[Row]) -> list[Calibration]:
    """One calibration for each judged label, from the rows that know it."""
    scores = score_texts(check, [row.text for row in rows])
    found = []
    for label in JUDGED:
        known = [i for i, row in enumerate(rows) if label in row.targets]
        truth = [int(rows[i].targets[label] > 0.45) for i in known]
        counted = [label not in _COUNTED or rows[i].source in _COUNTED[label] for i in known]
        column = scores[known, check.labels.index(label)]
        found.append(
            calibrate_scores(label, column, truth, rates=RATES[label], floors=FLOORS[label], counted=counted)
        )
    return found


def sources(data: Path, prompts: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Every source of the training rows with its licence, address and number of rows."""
    text = (resources.files("safeguard.train") / "data" / "sources.toml").read_text(encoding="utf-8")
    known = tomllib.loads(text)["source"]
    counts = Counter(
        row.source for row in unique([*read_pack(data, "train"), *own_rows(), *prompt_rows(prompts)])
    )
    return [{"name": name, "rows": count, **known[name]} for name, count in counts.items()]


def build_text_guard(
    run: Path,
    data: Path,
    out: Path,
    config: ClassifierConfig,
    *,
    name: str = "text-guard-s",
    version: str = "1.0.0",
    teacher: Path | None = None,
    prompts: Sequence[Path] = (),
    keep: Sequence[str] = (),
    activations: Activations | None = None,
) -> tuple[Manifest, list[Calibration]]:
    """Writes the pack of a run into `out` and calibrates it; other files already there are listed with it."""
    fields = {
        "name": name,
        "version": version,
        "summary": "Toxicity, unsafe image prompts, harmful requests, jailbreaks in text; MiniLM-L6, int8.",
        "license": "Apache-2.0",
        "data": sources(data, prompts),
        "notes": "data digests: "
        + ", ".join(f"{file} {digest[:16]}" for file, digest in digests(data, prompts).items()),
    }
    write_text_pack(run, out, fields, config, keep=keep, activations=activations)
    found = calibrations(TextClassifier.load(out), validation_rows(data, teacher, prompts))
    return write_calibration(out, found), found


def write_card(out: Path, metrics: Mapping[str, Any]) -> Manifest:
    """Writes `metrics.json` and the card `README.md` into a pack and lists them in its manifest.

    metrics: of `card_metrics`, with "flips", "speed" and "training" where they were measured.
    """
    manifest, figures = open_pack(out).manifest, _without_nan(metrics)
    text = json.dumps(figures, indent=1, sort_keys=True, allow_nan=False)
    write_whole(out / "metrics.json", text + "\n")
    write_whole(out / "README.md", card(manifest, figures))
    return seal(out, manifest.model_dump(mode="json", exclude={"files"}))


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def flips(
    run: Path, pack: Path, config: ClassifierConfig, rows: Sequence[Row], *, point: str = "standard"
) -> dict[str, float]:
    """Judged label -> share of the rows that know it on which int8 and float32 decide differently."""
    manifest = open_pack(pack).manifest
    texts = [row.text for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float.onnx"
        export_float(build_model(run, config), plain, narrow=False)
        wide = _logits(plain, pack / "tokenizer.json", texts, config.max_tokens)
    narrow = _logits(pack / manifest.model.file, pack / "tokenizer.json", texts, config.max_tokens)
    result = {}
    for label in JUDGED:
        column = manifest.labels.index(label)
        threshold = manifest.operating_points[point][label]
        cut = np.log(threshold / (1 - threshold)) * manifest.temperatures.get(label, 1) - manifest.biases.get(
            label, 0
        )
        known = [i for i, row in enumerate(rows) if label in row.targets]
        changed = (wide[known, column] >= cut) != (narrow[known, column] >= cut)
        result[label] = float(changed.mean()) if known else 0.0
    return result


def _logits(model: Path, tokenizer: Path, texts: Sequence[str], most: int) -> Any:
    session = open_session(model, threads=2)
    encode: Callable[[str], Any] = Tokenizer.from_file(str(tokenizer)).encode
    rows = []
    for text in texts:
        ids = np.array([encode(text).ids[:most]], np.int64)
        rows.append(session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0])
    return np.array(rows)
