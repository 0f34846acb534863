"""The second half of the demo: a pipeline makes each picture unguarded, then guarded, from one seed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from safeguard.demo.results import Prompt, Result
from safeguard.errors import Blocked, CheckFailed, MissingExtra
from safeguard.guards import Guard, capture


def load(name: str | None, *, device: str = "cpu") -> tuple[Any, str]:
    """A text-to-image pipeline and what to call it: the embedded stand-in, or a hub name or folder."""
    from safeguard.demo.emoji_pipeline import TITLE, EmojiPipeline

    if name is None:
        return EmojiPipeline.embedded().to(device), TITLE
    try:
        from diffusers import DiffusionPipeline
    except ImportError as exc:
        raise MissingExtra("diffusers", extra="diffusers") from exc
    return DiffusionPipeline.from_pretrained(name, use_safetensors=True).to(device), name


def paint(pipe: Any, guard: Guard, prompts: Sequence[Prompt]) -> Iterator[Result]:
    """All pictures unguarded; then the pipeline is guarded in place, and all again. A result per prompt."""
    before = [_image(pipe(prompt.text, generator=_generator(prompt))) for prompt in prompts]
    guard(pipe)
    if before:  # the first run of a model file is slower than all others
        guard.check_input(["a tree"], task="t2i")
        guard.check_output([before[0]], modality="image")
    for prompt, picture in zip(prompts, before, strict=True):
        yield _paint(pipe, prompt, picture)


def _paint(pipe: Any, prompt: Prompt, before: Any) -> Result:
    generator = _generator(prompt)
    after = None
    started = time.perf_counter()
    with capture() as reports:
        try:
            after = _image(pipe(prompt.text, generator=generator))
        except (Blocked, CheckFailed):
            after = None
    took_ms = (time.perf_counter() - started) * 1000
    report = reports[-1]
    return Result(
        prompt,
        report,
        max(took_ms - report.latency_ms, 0.0),
        before=before,
        after=None if report.blocked else after,
    )


def _generator(prompt: Prompt) -> Any:
    import torch

    return torch.Generator("cpu").manual_seed(prompt.seed)


def _image(output: Any) -> Any:
    images = getattr(output, "images", None)
    if not images:
        raise TypeError(
            f"the demo shows pictures, but the pipeline gave a {type(output).__name__} without images; "
            "name a text-to-image pipeline"
        )
    return images[0]
