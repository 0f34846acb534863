"""Rewrites prompts with a model that sees what they drew: the policy of iterative prompt refinement (IPR).

The model gets the user's original prompt, the prompt that drew the picture, and the picture, and answers
`keep` or a rewrite. Before anything is drawn it gets the text alone. Closed by construction: a rewrite is
only a proposal, which the flow judges before and after drawing; an answer of no use is a failure, never a
"keep". Source: ku-dmlab/IPR (EMNLP 2025), without its quirks: answers are read as in `causal_lm`, and the
last picture is judged too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from safeguard.errors import RefinerError
from safeguard.images import views
from safeguard.locks import ForkLock
from safeguard.refiners.clean import Reading, end_at_word, read
from safeguard.refiners.framing import as_data
from safeguard.refiners.language_model import Answer, Stop
from safeguard.refiners.template import FILE_NAME, RefinerTemplate
from safeguard.types import Refiner, RefineRequest

log = logging.getLogger(__name__)

SIZE_PX = 1024
"""Longest side of a picture as it is handed to the model; larger ones are made smaller."""
_MOST_VIEWS = 9


class ImageTextModel(Protocol):
    """What this refiner asks of a model; `torch_vlm.TorchVLM` is one. Safe to call from several threads."""

    @property
    def window(self) -> int: ...
    @property
    def special(self) -> Any: ...
    def encode(self, text: str) -> list[int]: ...
    def render(self, turns: Sequence[dict[str, str]], *, picture: bool) -> str: ...
    def answer(
        self, text: str, picture: Any | None, limit: int, *, stop: Stop | None = None
    ) -> Answer | None: ...


class VLMRefiner:
    """An image-text model as a refiner: greedy, one request at a time, one generation at a time.

    always_judge: it is asked about every picture, as in the paper, and not about those alone that a check
    flags; then "keep" lets a picture go, and a failure is a picture that could not be judged. fallback: asked
    in place of a failed answer, but never about a picture that no check flags. timeout_s: as of
    `causal_lm.CausalLMRefiner`.
    """

    def __init__(
        self,
        model: ImageTextModel,
        template: RefinerTemplate | None = None,
        *,
        always_judge: bool = False,
        fallback: Refiner | None = None,
        timeout_s: float | None = None,
        name: str = "vlm",
    ) -> None:
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, got {timeout_s}")
        self._model = model
        self.template = template or RefinerTemplate.for_pictures()
        self.always_judge = always_judge
        self._fallback = fallback
        self._timeout_s = timeout_s
        self.name = name if fallback is None else f"{name}+{fallback.name}"
        self._lock = ForkLock()

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        device: str = "cpu",
        dtype: Any = "auto",
        template: RefinerTemplate | None = None,
        always_judge: bool = False,
        fallback: Refiner | None = None,
        timeout_s: float | None = None,
    ) -> VLMRefiner:
        """A refiner from a folder, a hub name or a PEFT adapter of an image-text model.

        template: None takes `refiner_template.json` beside the weights, or the one in the package where there
        is none. Raises MissingExtra, PackError for weights that are not safetensors and of no image-text
        model.
        """
        from safeguard.refiners.torch_vlm import TorchVLM, load_vlm

        if template is None and (Path(name) / FILE_NAME).is_file():
            template = RefinerTemplate.read(Path(name) / FILE_NAME)
        model, processor = load_vlm(name, dtype=dtype)
        return cls(
            TorchVLM(model.to(device).eval(), processor),
            template,
            always_judge=always_judge,
            fallback=fallback,
            timeout_s=timeout_s,
        )

    @classmethod
    def load_always(cls, name: str | Path) -> VLMRefiner:
        """`load` with `always_judge`: the factory behind the refiner name `vlm-always`."""
        return cls.load(name, always_judge=True)

    def __call__(self, requests: Sequence[RefineRequest], /) -> list[str]:
        """A rewrite per request, the original prompt for "keep", an empty text where the answer is of no use.

        Raises RefinerError when a fall-back gives another number of texts than asked for.
        """
        found = self.readings(requests)
        texts = [r.prompt if f.why == "keep" else f.text for r, f in zip(requests, found, strict=True)]
        failed = [i for i, f in enumerate(found) if f.why not in ("", "keep")]
        for i in failed:
            log.info("no usable rewrite: refiner=%s why=%s", self.name, found[i].why)
        asked = [i for i in failed if requests[i].flagged or not requests[i].round]
        if self._fallback is not None and asked:
            others = self._fallback([requests[i] for i in asked])
            if isinstance(others, str) or len(others) != len(asked):
                raise RefinerError(
                    f"refiner {self._fallback.name!r} gave {len(others)} texts for {len(asked)} prompts"
                )
            for i, text in zip(asked, others, strict=True):
                texts[i] = text
        return texts

    def readings(self, requests: Sequence[RefineRequest], /) -> list[Reading]:
        """What the model's answer to each request comes to; an echo of the prompt counts as "keep".

        A flagged result that cannot be shown is answered from the text alone; one that is not flagged is
        "empty", since nobody would have looked at it.
        """
        with self._lock:
            end = None if self._timeout_s is None else time.monotonic() + self._timeout_s
            stop = None if end is None else (lambda: time.monotonic() > end)
            return [self._reading(request, stop) for request in requests]

    def _reading(self, request: RefineRequest, stop: Stop | None) -> Reading:
        picture = shown(request)
        if picture is None and request.round and not request.flagged:
            return Reading("", "empty")
        answer = self._answer(request, picture, stop)
        found = read(answer, request.prompt, keep=self.template.keep, stop=self.template.stop)
        return Reading("", "keep") if found.why == "unchanged" else found

    def _answer(self, request: RefineRequest, picture: Any | None, stop: Stop | None) -> str:
        """What the model says; empty for a prompt that does not fit into its window."""
        model = self._model
        current = request.prompt if request.current is None else request.current
        if model.window and len(request.prompt) + len(current) > 64 * model.window:
            return ""  # no token of a real vocabulary is longer: do not tokenise megabytes to find that out
        prompt, current = (as_data(model, text) for text in (request.prompt, current))
        if not prompt.strip():
            return ""
        text = model.render(self.template.messages(prompt, current), picture=picture is not None)
        limit = self.template.limit(len(model.encode(prompt)))
        said = model.answer(text, picture, limit, stop=stop)
        if said is None:
            log.info("prompt and picture are too long for the refiner: refiner=%s", self.name)
            return ""
        return said.text if said.whole else end_at_word(said.text)


def shown(request: RefineRequest) -> Image.Image | None:
    """The picture to show of a request's result; None for text, nothing, and what cannot be looked at."""
    pictures = request.views or ((request.result,) if request.result is not None else ())
    if not pictures or any(isinstance(picture, str) for picture in pictures):
        return None
    try:
        arrays = [
            view for picture in pictures[:_MOST_VIEWS] for view in views(picture, max_frames=_MOST_VIEWS)
        ]
    except (ValueError, TypeError) as exc:
        log.warning("result cannot be shown to the refiner: error=%s", type(exc).__name__)
        return None
    return sheet([Image.fromarray(array) for array in arrays[:_MOST_VIEWS]])


def sheet(pictures: Sequence[Image.Image], *, size_px: int = SIZE_PX) -> Image.Image:
    """One picture as it is; several (frames, with and without transparency) side by side in a grid.

    The longest side of the result is at most `size_px`.
    """
    columns = int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    cell = size_px // max(columns, rows)
    small = [picture.convert("RGB") for picture in pictures]
    for picture in small:
        picture.thumbnail((cell, cell))
    if len(small) == 1:
        return small[0]
    width, height = max(p.width for p in small), max(p.height for p in small)
    whole = Image.new("RGB", (columns * width, rows * height))
    for i, picture in enumerate(small):
        whole.paste(picture, (i % columns * width, i // columns * height))
    return whole
