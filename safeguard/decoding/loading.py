"""From the policy's `decoding` part to the logits processor of each call."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from safeguard.decoding.contrastive import ContrastiveProcessor
from safeguard.decoding.rectification import RectificationProcessor
from safeguard.decoding.value_model import ValueModel
from safeguard.errors import MissingExtra, PackNotFound
from safeguard.policy import DecodingRules

try:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList
except ImportError as exc:
    raise MissingExtra(exc.name or "transformers", extra="torch") from exc

_PLAUSIBILITY = 0.1  # of UniDetox and contrastive decoding
_TOP_P = 0.9  # of DExperts


class Decoder:
    """The models that a policy guides a language model by, shared between calls; caches belong to a call."""

    def __init__(self, rules: DecodingRules, models: Mapping[str, Any], vocabulary: int | None) -> None:
        self.method = rules.method
        self._rules, self._models, self._vocabulary = rules, dict(models), vocabulary
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls, rules: DecodingRules, model: Any, tokenizer: Any, *, beside: Path | None = None
    ) -> Self | None:
        """The decoder of a policy for this model, None where the policy has none.

        beside: folder in which models that the policy names are looked for first. They are put on the model's
        device, in its precision. Raises PackNotFound for a model that is not there, ValueError for one of
        another vocabulary.
        """
        if rules.method == "none":
            return None
        named = {
            kind: name
            for kind in ("anti_expert", "expert", "value_model")
            if (name := getattr(rules, kind)) is not None
        }
        models = {kind: _load(kind, name, model, tokenizer, beside) for kind, name in named.items()}
        sizes = {kind: _size(other) for kind, other in models.items()}
        own, known = _size(model), len(tokenizer)
        if all(size == own for size in sizes.values()):
            return cls(rules, models, None)
        for kind, size in sizes.items():
            if size < known:
                raise ValueError(
                    f"the {kind} {named[kind]!r} has {size} tokens, the tokenizer of the guarded model "
                    f"{known}; it must have the same vocabulary"
                )
        return cls(rules, models, known)

    def guiding(self, generate: Callable[..., Any], model: Any) -> Callable[..., Any]:
        """`generate` with a processor of its own in every call, after those of the caller."""

        @functools.wraps(generate, assigned=())
        def guided(**named: Any) -> Any:
            self._follow(model.device)
            processors = LogitsProcessorList(named.get("logits_processor") or ())
            processors.append(self.processor(_prompt_mask(named, model)))
            return generate(**{**named, "logits_processor": processors})

        return guided

    def processor(self, attention_mask: Any = None) -> LogitsProcessor:
        """A processor for one call whose prompts have this mask."""
        rules, models = self._rules, self._models
        common = {"attention_mask": attention_mask, "vocabulary": self._vocabulary}
        if rules.method == "rectify":
            return RectificationProcessor(
                models["value_model"], epsilon=rules.epsilon, top_k=rules.top_k, **common
            )
        plausibility, top_p = rules.plausibility, rules.top_p
        if rules.method == "contrastive" and plausibility is None:
            plausibility = _PLAUSIBILITY
        if rules.method == "dexperts" and top_p is None:
            top_p = _TOP_P
        return ContrastiveProcessor(
            models["anti_expert"],
            models.get("expert"),
            strength=rules.strength,
            plausibility=plausibility,
            top_p=top_p,
            **common,
        )

    def _follow(self, device: torch.device) -> None:
        """The guarded model may have been moved since."""
        with self._lock:
            for other in self._models.values():
                if other.device != device:
                    other.to(device)


def _load(kind: str, name: str, model: Any, tokenizer: Any, beside: Path | None) -> Any:
    places = [Path(name)] if beside is None else [beside / name, Path(name)]
    folder = next((place for place in places if place.is_dir()), None)
    if kind == "value_model":
        if folder is None:
            raise PackNotFound(name, [str(p) for p in places], "decoding.value_model takes a folder")
        _same_words(kind, name, folder, tokenizer)
        return ValueModel.load(folder, device=model.device)
    source = folder if folder is not None else name
    try:
        other = AutoModelForCausalLM.from_pretrained(
            source, dtype=model.dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as exc:
        looked = [*(str(place) for place in places), "the hub's cache"]
        hint = f"decoding.{kind} takes the folder of a causal model ({type(exc).__name__})"
        raise PackNotFound(name, looked, hint) from exc
    _same_words(kind, name, source, tokenizer)
    return other.to(model.device).eval()


def _same_words(kind: str, name: str, source: str | Path, tokenizer: Any) -> None:
    """Where a model came with a tokenizer, its tokens must mean the same."""
    if isinstance(source, Path) and not (source / "tokenizer_config.json").is_file():
        return
    try:
        other = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return  # none came with it
    known = tokenizer.get_vocab()
    wrong = sum(known.get(word) != i for word, i in other.get_vocab().items() if i < len(tokenizer))
    if wrong:
        raise ValueError(
            f"the {kind} {name!r} has another vocabulary: {wrong} tokens mean something else than in the "
            "guarded model"
        )


def _size(model: Any) -> int:
    return int(getattr(model, "vocabulary", 0) or model.config.get_text_config().vocab_size)


def _prompt_mask(named: Mapping[str, Any], model: Any) -> Any:
    """The prompts' mask, as generate() itself would have it."""
    ids = named.get("input_ids")
    ids = named.get("inputs") if ids is None else ids
    mask = named.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return mask
    config = named.get("generation_config") or model.generation_config
    pad, eos = (named.get(n, getattr(config, n, None)) for n in ("pad_token_id", "eos_token_id"))
    ends = eos if isinstance(eos, list | tuple) else [eos]
    if ids is None or not isinstance(pad, int) or pad in ends or not bool((ids == pad).any()):
        return None
    return (ids != pad).long()
