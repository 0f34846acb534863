"""Measures a finished UniDetox run: base, toxic twin and every detoxified model, in one table."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from safeguard.evaluate.detox import Subject, evaluate_detox
from safeguard.evaluate.detox_contamination import contamination_report
from safeguard.evaluate.detox_judges import Judge
from safeguard.evaluate.detox_report import read_result, report_html
from safeguard.evaluate.detox_settings import DetoxSettings, read_prompts
from safeguard.files import write_whole
from safeguard.packs import canonical_digest
from safeguard.train.unidetox.config import UniDetoxConfig, merged
from safeguard.train.unidetox.corpus import read_texts, texts_file, toxic_texts
from safeguard.train.unidetox.models import digest_of_model, load_lm
from safeguard.train.unidetox.stages import folder_of

log = logging.getLogger(__name__)


class RunConfig(UniDetoxConfig):
    """The whole recipe: the training stages, and how their results are measured."""

    evaluation: DetoxSettings = DetoxSettings()

    @property
    def training(self) -> UniDetoxConfig:
        """The part that decides weights and texts."""
        return UniDetoxConfig.model_validate(self.model_dump(include=set(UniDetoxConfig.model_fields)))

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """The recipe with other values, by dotted names such as `apply.steps`.

        Raises ValidationError for names that the recipe does not have.
        """
        settings = self.model_dump()
        for name, value in changes.items():
            nested: Any = value
            for part in reversed(name.split(".")):
                nested = {part: nested}
            settings = merged(settings, nested)
        return type(self).model_validate(settings)


def contamination_of_run(config: UniDetoxConfig, data: Path, out: Path) -> dict[str, Any]:
    """`contamination.json`: toxic corpus, each set of texts and the evaluation's prompts against each other.

    What is not there (no texts yet, no prompts in the data folder) is left out.
    """
    prompts: list[str] = []
    for suite in ("toxigen", "rtp"):
        try:
            prompts += [p.text for p in read_prompts(data, suite, DetoxSettings())]
        except (FileNotFoundError, ValueError):
            log.info("no prompts of %s, so contamination is not measured for them", suite)
    try:
        toxic, _ = toxic_texts(config.corpus, data)
    except FileNotFoundError:
        toxic = []
    report: dict[str, Any] = {}
    for name in config.texts:
        try:
            texts = read_texts(texts_file(name, data, out / "texts.jsonl"))
        except FileNotFoundError:
            continue
        for pair, figures in contamination_report(toxic, texts, prompts).items():
            report[pair.replace("texts", f"{name} texts")] = figures
    write_whole(out / "contamination.json", json.dumps(report, indent=1) + "\n")
    return report


def subjects_of(config: UniDetoxConfig, out: Path) -> Iterator[tuple[str, str, int | None]]:
    """(name, folder or model name, training step) of everything in a run that is to be measured."""
    yield "base", config.base, None
    if config.target is not None and config.target != config.base:
        yield "target", config.target, None
    if (out / "toxic" / "metrics.json").is_file():
        yield "toxic twin", str(out / "toxic"), None
    for texts in config.texts:
        folder = out / folder_of(texts)
        if (folder / "metrics.json").is_file():
            yield folder.name, str(folder), None
        for step in config.apply.keep_at:
            if (folder / f"step-{step}" / "config.json").is_file():
                yield folder.name, str(folder / f"step-{step}"), step


def evaluate_run(config: RunConfig, data: Path, out: Path, judges: Sequence[Judge]) -> list[dict[str, Any]]:
    """Measures every model of a run that is not measured yet; writes `results/*.json` and `report.html`.

    The origin (target or base) scores everybody's continuations, its own too: that figure is marked so.
    Models of training steps, which only make the curves, get the first seed alone.
    """
    folder = out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    settings = config.evaluation
    if settings.start is None and config.start is not None:
        settings = settings.model_copy(update={"start": config.start})
    origin = config.target or config.base
    reference, origin_tokenizer = load_lm(origin, dtype=settings.weights)
    results = []
    for name, where, step in subjects_of(config, out):
        asked = settings if step is None else settings.model_copy(update={"seeds": settings.seeds[:1]})
        key = canonical_digest([asked.model_dump(mode="json"), {j.name: j.digest for j in judges}])
        title = name.replace(" ", "-") + ("" if step is None else f"-{step}")
        path = folder / f"{title}.json"
        digest = digest_of_model(where)
        if path.is_file():
            old = read_result(path)
            if old.get("key") == key and old["model_digest"] == digest:
                results.append(old)
                continue
        model, tokenizer = load_lm(where, dtype=settings.weights)
        same = model.get_input_embeddings().num_embeddings == reference.get_input_embeddings().num_embeddings
        subject = Subject(name, model, tokenizer, digest=digest, step=step, note=config.reduced)
        by = f"{origin} (itself)" if where == origin else origin
        found = evaluate_detox(
            subject,
            data,
            judges,
            asked,
            other=(by, reference, origin_tokenizer),
            reference=reference if same else None,
            journal=out / "generations",
        )
        result = {**found, "key": key}
        write_whole(path, json.dumps(result, indent=1) + "\n")
        results.append(result)
        del model, subject
        gc.collect()
    write_whole(out / "report.html", report_html(results, contamination=_contamination(out)))
    return results


def _contamination(out: Path) -> dict[str, Any] | None:
    path = out / "contamination.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
