"""From a finished training run to the pack with its card, in one go."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeguard.checks.text_classifier import TextClassifier
from safeguard.evaluate.card import card_metrics
from safeguard.evaluate.card_text import Goal, goals
from safeguard.train.classifier import ClassifierConfig
from safeguard.train.int8_graph import Activations
from safeguard.train.text_guard import build_text_guard, flips, validation_rows, write_card

_FLIP_ROWS = 3000


def make_text_guard(
    run: Path,
    data: Path,
    out: Path,
    *,
    name: str = "text-guard-s",
    version: str = "1.0.0",
    teacher: Path | None = None,
    prompts: Sequence[Path] = (),
    activations: Activations | None = "token",
    speed: dict[str, Any] | None = None,
) -> list[Goal]:
    """Exports, calibrates, measures and describes the model of `run`; writes the pack `out` whole or not.

    data, teacher, prompts: as in training. activations: how the int8 graph is written, see
    `safeguard.train.text_pack.write_text_pack`. speed: what `tests/bench/text_guard.py` printed.
    Returns what was to be reached and what was. Raises FileExistsError where `out` is, FileNotFoundError for
    a run that is not finished.
    """
    if out.exists():
        raise FileExistsError(17, "the pack is there already; give a new folder", str(out))
    told = run / "metrics.json"
    if not told.is_file():
        raise FileNotFoundError(2, "no metrics.json of a finished run", str(run))
    training = json.loads(told.read_text(encoding="utf-8"))
    config = ClassifierConfig.model_validate(training["config"])
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        made = Path(folder) / out.name
        build_text_guard(
            run,
            data,
            made,
            config,
            name=name,
            version=version,
            teacher=teacher,
            prompts=prompts,
            activations=activations,
        )
        metrics = card_metrics(TextClassifier.load(made), data, prompts=prompts)
        rows = validation_rows(data, teacher, prompts)
        random.Random(0).shuffle(rows)
        metrics["flips"] = flips(run, made, config, rows[:_FLIP_ROWS])
        if speed is not None:
            metrics["speed"] = speed
        metrics["training"] = training
        write_card(made, metrics)
        shutil.move(made, out)
    return goals(metrics)
