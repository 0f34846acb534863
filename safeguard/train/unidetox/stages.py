"""The three stages of UniDetox, each alone or in a row; what is finished in a folder is not made again."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safeguard.errors import MissingExtra, PackError
from safeguard.files import write_whole
from safeguard.packs import canonical_digest
from safeguard.train.recipe import versions
from safeguard.train.text_data import sha256_of
from safeguard.train.unidetox.config import Tuning, UniDetoxConfig
from safeguard.train.unidetox.corpus import digest_of_texts, read_texts, texts_file, toxic_texts
from safeguard.train.unidetox.distil import distil, finish
from safeguard.train.unidetox.models import digest_of_model, load_lm, public_name, training_start, write_card
from safeguard.train.unidetox.rewrite import load_embedder, rewrite
from safeguard.train.unidetox.tuning import tune

try:
    from accelerate import PartialState
except ImportError as exc:
    raise MissingExtra(exc.name or "accelerate", "train") from exc

if TYPE_CHECKING:
    from safeguard.train.unidetox.rewrite import Toxicity

log = logging.getLogger(__name__)

Stage = Literal["toxic", "distil", "apply"]
STAGES: tuple[Stage, ...] = ("toxic", "distil", "apply")


def unidetox(
    config: UniDetoxConfig,
    data: Path,
    out: Path,
    *,
    stages: Sequence[Stage] = STAGES,
    toxicity: Toxicity | None = None,
) -> dict[str, Any]:
    """Runs the stages asked for into `toxic/`, `texts.jsonl` and `detox-<texts>/`; gives all their metrics.

    Interrupted, it goes on where it was. data: folder of the data pack, or any that holds the recipe's files.
    toxicity: judge of the rewritings, needed by the method hspd alone.
    """
    out.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, Any] = {}
    if "toxic" in stages:
        metrics["toxic"] = make_toxic(config, data, out)
    if "distil" in stages:
        metrics["distil"] = make_texts(config, data, out, toxicity=toxicity)
    if "apply" in stages:
        for name in config.texts:
            metrics[folder_of(name)] = apply_texts(config, data, out, name)
    return metrics


def folder_of(texts: str) -> str:
    """Name of the folder of the model that was trained on these texts."""
    return f"detox-{Path(texts).name.split('.')[0]}"


def make_toxic(config: UniDetoxConfig, data: Path, out: Path) -> dict[str, Any]:
    """Stage 1: the base model fine-tuned on toxic text, in `toxic/`."""
    texts, digests = toxic_texts(config.corpus, data)
    source = {"name": "toxic corpus", "count": len(texts), "sha256": digest_of_texts(texts)}
    return _tuned(config, "toxic", config.base, config.toxic, texts, source, digests, out / "toxic")


def apply_texts(config: UniDetoxConfig, data: Path, out: Path, name: str) -> dict[str, Any]:
    """Stage 3: the target model fine-tuned on distilled texts, in `detox-<texts>/`."""
    path = texts_file(name, data, out / "texts.jsonl")
    texts = read_texts(path)
    source = {"name": name, "count": len(texts), "sha256": digest_of_texts(texts)}
    digests = {path.name: sha256_of(path)}
    target = config.target or config.base
    return _tuned(config, "apply", target, config.apply, texts, source, digests, out / folder_of(name))


def _tuned(
    config: UniDetoxConfig,
    stage: str,
    name: str,
    settings: Tuning,
    texts: Sequence[str],
    source: Mapping[str, Any],
    digests: Mapping[str, str],
    folder: Path,
) -> dict[str, Any]:
    identity = {
        "stage": stage,
        "model": digest_of_model(name),
        "start": config.start,
        "unmasked_padding": config.compat.unmasked_padding,
    }
    asked = {**identity, "settings": settings.model_dump(mode="json"), "texts": source["sha256"]}
    done = _finished(folder / "metrics.json", canonical_digest(asked))
    if done is not None:
        return done
    log.info("stage %s: %d texts into %s", stage, len(texts), folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_lm(name, dtype=settings.weights)
    result = tune(
        model,
        tokenizer,
        texts,
        settings,
        folder,
        start=training_start(tokenizer, config.start),
        unmasked_padding=config.compat.unmasked_padding,
        identity=identity,
        title=stage,
        name=public_name(name),
    )
    state = PartialState()
    metrics = {
        "stage": stage,
        "run": canonical_digest(asked),
        "model": public_name(name),
        "model_digest": identity["model"],
        "start": config.start,
        "settings": settings.model_dump(mode="json"),
        "compat": config.compat.model_dump(mode="json"),
        "preset": config.preset,
        "reduced": config.reduced,
        "texts": dict(source),
        "data": dict(digests),
        "steps": result.steps,
        "loss_first": _mean(result.losses[:10]),
        "loss_last": _mean(result.losses[-10:]),
        "losses": [round(loss, 4) for loss in result.losses],
        "seconds": round(result.seconds, 1),
        "processes": result.processes,
        "device": str(state.device),
        "versions": versions("torch", "transformers", "accelerate"),
    }
    if state.is_main_process:
        result.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_card(folder, metrics)  # last: its metrics say that the stage is finished
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    state.wait_for_everyone()
    gc.collect()
    return metrics


def make_texts(
    config: UniDetoxConfig, data: Path, out: Path, *, toxicity: Toxicity | None = None
) -> dict[str, Any]:
    """Stage 2: `texts.jsonl`, distilled or, by the method hspd, rewritten, and `distil.json` about it."""
    toxic_folder = out / "toxic"
    if not (toxic_folder / "metrics.json").is_file():
        raise FileNotFoundError(2, "no toxic model yet; run the stage toxic first", str(toxic_folder))
    hspd = config.distil.method == "hspd"
    rewriter = (config.rewriting.rewriter or config.base) if hspd else config.base
    identity = {"base": digest_of_model(rewriter), "toxic": digest_of_model(str(toxic_folder))}
    asked = {
        **identity,
        "start": config.start,
        "settings": config.distil.model_dump(mode="json"),
        "rewriting": config.rewriting.model_dump(mode="json") if hspd else None,
        "shared_cache": config.compat.shared_cache,
    }
    done = _finished(out / "distil.json", canonical_digest(asked))
    if done is not None and (out / "texts.jsonl").is_file():
        return done
    began = time.monotonic()
    state = PartialState()
    dtype, device = config.distil.weights, str(state.device)
    base, tokenizer = load_lm(rewriter, dtype=dtype, device=device)
    toxic, _ = load_lm(str(toxic_folder), dtype=dtype, device=device)
    if hspd:
        journal, count = _rewritten(config, data, out, base, toxic, tokenizer, toxicity, identity, device)
    else:
        count = config.distil.texts
        journal = distil(
            base,
            toxic,
            tokenizer,
            config.distil,
            out,
            start=config.start,
            compat=config.compat,
            identity=identity,
            process=(state.process_index, state.num_processes),
        )
    state.wait_for_everyone()
    metrics: dict[str, Any] = {}
    if state.is_main_process:
        metrics = {
            "stage": "distil",
            "run": canonical_digest(asked),
            **asked,
            "preset": config.preset,
            "reduced": config.reduced,
            "seconds": round(time.monotonic() - began, 1),
            **finish(journal, out, count, drop_degenerate=config.distil.drop_degenerate),
            "device": device,
            "versions": versions("torch", "transformers"),
        }
        write_whole(out / "distil.json", json.dumps(metrics, indent=1) + "\n")
    state.wait_for_everyone()
    return metrics


def _rewritten(
    config: UniDetoxConfig,
    data: Path,
    out: Path,
    base: Any,
    toxic: Any,
    tokenizer: Any,
    toxicity: Toxicity | None,
    identity: Mapping[str, Any],
    device: str,
) -> tuple[Any, int]:
    if toxicity is None:
        raise ValueError("the method hspd chooses among rewritings by a toxicity judge; give one (--teacher)")
    if PartialState().num_processes > 1:
        raise ValueError("the method hspd runs in one process")
    texts, _ = toxic_texts(config.corpus, data)
    texts = texts[: config.rewriting.texts]
    name = config.rewriting.embedder
    journal = rewrite(
        base,
        toxic,
        tokenizer,
        texts,
        config.rewriting,
        out,
        toxicity=toxicity,
        embed=None if name is None else load_embedder(name, device),
        seed=config.distil.seed,
        identity=identity,
    )
    return journal, len(texts)


def _finished(path: Path, run: str) -> dict[str, Any] | None:
    """Metrics of the finished stage. Raises PackError where they are of another run."""
    if not path.is_file():
        return None
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if metrics.get("run") != run:
        raise PackError(f"{path} is of other settings, texts or models; give a new folder or delete that one")
    return metrics


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
