"""Our contenders, each made in a process of its own by `worker.py`: options in, a callable out."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safeguard.checks.text_classifier import TextClassifier
    from safeguard.runtime.checks import BatchedCheck

Payload = dict[str, Any]
Work = Callable[[Any], Any]


def text_pack(options: dict[str, Any]) -> Work:
    """A text pack through TextClassifier. options: pack. Payload: texts, a list that is one call."""
    check = _loaded(options["pack"])
    return lambda payload: check(payload["texts"])


def text_torch(options: dict[str, Any]) -> Work:
    """The same check on a torch module of transformers. options: source, a folder."""
    from safeguard.backends.torch import ModuleBackend
    from safeguard.checks.readout import Readout
    from safeguard.checks.text_classifier import TextClassifier
    from safeguard.exporters.text_classifier import read_text_model

    model = read_text_model(options["source"])
    backend = ModuleBackend(model.model.eval(), inputs=("input_ids", "attention_mask"), outputs=("logits",))
    check = TextClassifier(
        backend, model.tokenizer, Readout(model.labels, activation=model.activation), model.window
    )
    return lambda payload: check(payload["texts"])


def clip_pack(options: dict[str, Any]) -> Work:
    """A pack of a CLIP tower with its heads through ClipHeads. Payload: pictures, their seeds."""
    from safeguard.checks.clip_heads import ClipHeads

    return _OnPictures(ClipHeads.load(Path(options["pack"])))


def trivial_guard(options: dict[str, Any]) -> Work:
    """A guarded function with one check that does nothing. Payload: text and calls."""
    from safeguard import Guard
    from safeguard.types import Modality

    class Trivial:
        name = "trivial"
        modality: Modality = "text"

        def __call__(self, batch: Sequence[str], /) -> list[dict[str, float]]:
            return [{"nothing": 0.0} for _ in batch]

    def echo(prompt: str) -> str:
        return prompt

    guarded = Guard(inputs=[Trivial()])(echo)

    def work(payload: Payload) -> None:
        for _ in range(payload["calls"]):
            guarded(payload["text"])

    return work


def concurrent(options: dict[str, Any]) -> Work:
    """A text pack under many callers. options: pack.

    Payload: texts, one a call; callers; each, calls that a caller makes; way, "threads" or "tasks"; batched,
    with the micro-batcher. Gives seconds, from when all were ready, and the latency of every call.
    """
    from safeguard.runtime.checks import BatchedCheck

    check = _loaded(options["pack"])
    batched = BatchedCheck(check)

    def work(payload: Payload) -> dict[str, Any]:
        texts = payload["texts"]
        plans = [
            [texts[(caller * payload["each"] + i) % len(texts)] for i in range(payload["each"])]
            for caller in range(payload["callers"])
        ]
        if payload["way"] == "tasks":
            return _tasks(_awaitable(check, batched, on=payload["batched"]), plans)
        return _threads(batched if payload["batched"] else check, plans)

    return work


class _OnPictures:
    """Pictures are made before the clock starts."""

    def __init__(self, check: Work) -> None:
        self._check = check

    def prepare(self, payload: Payload) -> list[Any]:
        return pictures(payload)

    def __call__(self, made: list[Any]) -> None:
        self._check(made)


def pictures(payload: Payload) -> list[Any]:
    """Pictures of 512 x 512, as a pipeline gives them: smooth colours from seeds. Payload: pictures."""
    import numpy as np
    from PIL import Image

    found = []
    for seed in payload["pictures"]:
        coarse = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
        found.append(Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC))
    return found


def _loaded(pack: str) -> TextClassifier:
    from safeguard.checks.text_classifier import TextClassifier

    check = TextClassifier.load(Path(pack) if Path(pack).is_dir() else pack)
    check.warmup()
    return check


def _threads(check: Callable[[list[str]], Any], plans: list[list[str]]) -> dict[str, Any]:
    ready = threading.Barrier(len(plans) + 1)
    latencies: list[list[float]] = [[] for _ in plans]
    errors: list[BaseException] = []

    def caller(number: int) -> None:
        ready.wait()
        try:
            for text in plans[number]:
                start = time.perf_counter()
                check([text])
                latencies[number].append(time.perf_counter() - start)
        except Exception as exc:
            errors.append(exc)

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(len(plans))]
    for thread in threads:
        thread.start()
    ready.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if errors:
        raise errors[0]
    return {"seconds": seconds, "latencies": [t for own in latencies for t in own]}


def _awaitable(
    check: TextClassifier, batched: BatchedCheck, *, on: bool
) -> Callable[[list[str]], Coroutine[Any, Any, Any]]:
    return batched.acall if on else lambda texts: asyncio.to_thread(check, texts)


def _tasks(check: Callable[[list[str]], Coroutine[Any, Any, Any]], plans: list[list[str]]) -> dict[str, Any]:
    latencies: list[float] = []

    async def caller(texts: list[str]) -> None:
        for text in texts:
            start = time.perf_counter()
            await check([text])
            latencies.append(time.perf_counter() - start)

    async def everybody() -> float:
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for texts in plans:
                group.create_task(caller(texts))
        return time.perf_counter() - start

    with asyncio.Runner() as runner:
        seconds = runner.run(everybody())
    return {"seconds": seconds, "latencies": latencies}
