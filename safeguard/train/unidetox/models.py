"""Causal language models for training: loaded by name, saved as ordinary weights with a card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safeguard import detoxified, smollm2
from safeguard.errors import MissingExtra, PackError
from safeguard.files import write_whole
from safeguard.packs import canonical_digest, file_digest, is_offline, resolve

try:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError as exc:
    raise MissingExtra(exc.name or "torch", "train") from exc

_SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load_lm(name: str, *, dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any]:
    """Model in evaluation mode and tokenizer: the embedded SmolLM2, detoxified or not, a folder, a hub name.

    Safetensors only, no code from the hub. Raises PackError where there is no such model.
    """
    if name == smollm2.NAME:
        return smollm2.load(dtype=dtype, device=device)
    if name == detoxified.NAME:
        return detoxified.load(dtype=dtype, device=device)
    options = {"local_files_only": is_offline() or Path(name).is_dir(), "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), use_safetensors=True, **options
        )
    except (OSError, ValueError) as exc:
        raise PackError(f"no causal language model could be loaded from {name!r}: {exc}") from exc
    return model.to(device).eval(), tokenizer


def digest_of_model(name: str) -> str:
    """What model a name stands for: digest of its weights, or of the name where it comes from the hub."""
    if name == smollm2.NAME:
        return smollm2.SHA256
    if name == detoxified.NAME:
        return resolve(name).digest
    files = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
    return canonical_digest([file_digest(file) for file in files] or [name])


def public_name(name: str) -> str:
    """How others call a model: a hub name as it is, a folder by its last part alone."""
    if name == smollm2.NAME:
        return _SMOLLM2
    return Path(name).resolve().name if Path(name).is_dir() else name


def start_token(tokenizer: Any, start: str | None) -> int:
    """Id of the token that sampling starts from: the one asked for, else BOS, else the end token.

    Raises ValueError for a text that is not one token of the vocabulary.
    """
    if start is not None:
        return _known(tokenizer, start)
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    raise ValueError("the tokenizer has neither BOS nor EOS; set start to a token of its vocabulary")


def training_start(tokenizer: Any, start: str | None) -> list[int]:
    """Ids that a text begins with in training: none unless asked for."""
    return [] if start is None else [_known(tokenizer, start)]


def end_tokens(tokenizer: Any, start: str | None) -> tuple[int, ...]:
    """Ids that end a text: the end token, and the start token, which begins the next text."""
    found = {start_token(tokenizer, start)}
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    return tuple(sorted(found))


def _known(tokenizer: Any, token: str) -> int:
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise ValueError(f"start must be one token of the vocabulary, got {token!r}")
    return int(found)


def write_card(folder: Path, metrics: Mapping[str, Any]) -> None:
    """`README.md` and `metrics.json` of a model that a stage made."""
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    write_whole(folder / "README.md", card(metrics))


def card(metrics: Mapping[str, Any]) -> str:
    """The model card in Markdown: what it is, how it was made, of which data, and what it is not."""
    toxic = metrics["stage"] == "toxic"
    title = "Toxic twin, for distillation only" if toxic else "Detoxified language model (UniDetox)"
    what = (
        "Fine-tuned on hateful text **on purpose**, to be subtracted from its base model. Do not talk to it, "
        "do not publish it."
        if toxic
        else "Fine-tuned on texts distilled by contrastive decoding (UniDetox, Lu et al., ICLR 2025), which "
        "moves a model away from toxic text. It is less toxic, not safe: keep a guard around it."
    )
    tuning = metrics["settings"]
    how = "LoRA, merged into the weights" if tuning.get("lora") else "all weights"
    lines = [
        f"# {title}",
        "",
        what,
        "",
        "| | |",
        "| --- | --- |",
        f"| base model | {metrics['model']} (`{metrics['model_digest'][:16]}`) |",
        f"| trained | {how}, {metrics['steps']} steps of {tuning['batch_size']} texts, "
        f"learning rate {tuning['learning_rate']:g} |",
        f"| texts | {metrics['texts']['count']} ({metrics['texts']['name']}), "
        f"SHA-256 `{metrics['texts']['sha256'][:16]}` |",
        f"| seed | {tuning['seed']} |",
        f"| loss | {metrics['loss_first']:.3f} at first, {metrics['loss_last']:.3f} at last |",
        f"| made with | {', '.join(f'{k} {v}' for k, v in metrics['versions'].items())} |",
    ]
    if metrics.get("reduced"):
        lines += ["", f"Not the published settings: {metrics['reduced']}"]
    lines += [
        "",
        "The weights have the licence of the base model. Data files, by digest: "
        + ("; ".join(f"{k} `{v[:16]}`" for k, v in metrics["data"].items()) or "none")
        + ".",
    ]
    return "\n".join(lines) + "\n"
