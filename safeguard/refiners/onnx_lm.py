"""Exported causal language models with a key-value cache, run by onnxruntime; no torch is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safeguard.backends import Backend, open_backend
from safeguard.errors import BackendError, PackError
from safeguard.packs import Pack, read_pack
from safeguard.refiners.file_tokens import FileTokens, end_ids
from safeguard.refiners.language_model import Answer, Stop, Turns, cut, give_up

LAYOUT_NAME = "decoder.json"
Positive = Annotated[int, Field(gt=0)]


class DecoderLayout(BaseModel):
    """What `decoder.json` says of a graph that the graph's caller must know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: tuple[str, ...]
    """Inputs but the cache: input_ids, attention_mask and, where the model takes them, position_ids."""
    layers: Annotated[tuple[tuple[Positive, Positive, Positive], ...], Field(min_length=1)]
    """Of each layer: heads in the cache, width of a key, width of a value."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the cache; logits are float32 always."""
    window: Annotated[int, Field(ge=0)] = 0
    vocabulary: Positive
    ends: tuple[int, ...] = ()

    @property
    def past(self) -> tuple[str, ...]:
        """Names of the cache inputs, in order."""
        return tuple(f"past_key_values.{n}.{part}" for n in range(len(self.layers)) for part in _PARTS)

    @property
    def present(self) -> tuple[str, ...]:
        """Names of the cache outputs, in order."""
        return tuple(f"present.{n}.{part}" for n in range(len(self.layers)) for part in _PARTS)

    def empty(self, batch: int, past: int = 0) -> dict[str, NDArray[Any]]:
        """A cache that holds nothing, or `past` zeros: (batch, heads, past, width) each."""
        sizes = [(heads, width) for heads, *widths in self.layers for width in widths]
        return {
            name: np.zeros((batch, heads, past, width), dtype=self.dtype)
            for name, (heads, width) in zip(self.past, sizes, strict=True)
        }

    @classmethod
    def read(cls, path: Path) -> DecoderLayout:
        """The layout in a JSON file. Raises PackError naming the file when it is none."""
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, ValidationError) as exc:
            raise PackError(f"{path.name} is no decoder layout: {exc}") from exc


_PARTS = ("key", "value")


class OnnxLM:
    """One graph for prompt and next token; rows of a call run as one left-padded batch."""

    def __init__(self, backend: Backend, tokens: FileTokens, layout: DecoderLayout) -> None:
        self.backend, self._tokens, self._layout = backend, tokens, layout
        self._ends = end_ids(layout.ends or None, tokens)

    @classmethod
    def load(cls, folder: Path, *, device: str = "cpu", threads: int | None = None) -> OnnxLM:
        """From an exported pack, its digests checked. Raises PackError, BackendError and MissingExtra."""
        pack = read_pack(folder).expect("refiner").verify().alone()
        layout = DecoderLayout.read(pack.path(LAYOUT_NAME))
        found = cls(open_decoder(pack, device, threads), FileTokens.load(folder), layout)
        pack.verify()  # read by path, so proven again now that all is read
        return found

    @property
    def window(self) -> int:
        """Tokens of prompt and answer together; 0 where no limit is known."""
        return self._layout.window

    @property
    def special(self) -> re.Pattern[str] | None:
        """Special and bracketed tokens of the tokenizer."""
        return self._tokens.special

    def encode(self, text: str, /, *, framed: bool = False) -> list[int]:
        """Token ids; framed: with the tokenizer's own special tokens around them."""
        return self._tokens.encode(text, framed=framed)

    def render(self, turns: Turns, /) -> str | None:
        """The conversation with the generation prompt; None without a chat template."""
        return self._tokens.render(turns)

    def generate(
        self, rows: Sequence[Sequence[int]], limits: Sequence[int], /, *, stop: Stop | None = None
    ) -> list[Answer]:
        """Greedy answers of one batch. Raises RefinerError when stopped, BackendError when a run fails."""
        longest = max(map(len, rows))
        ids = np.array([[0] * (longest - len(row)) + list(row) for row in rows], dtype=np.int64)
        mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=np.int64)
        cache = self._layout.empty(len(rows))
        made: list[list[int]] = [[] for _ in rows]
        for _ in range(max(limits)):
            if stop is not None and stop():
                raise give_up()
            found = self.backend({**feeds(self._layout, ids, mask), **cache})
            chosen = _best(found["logits"])
            for row, token in zip(made, chosen.tolist(), strict=True):
                row.append(token)
            if all(
                len(row) >= limit or not self._ends.isdisjoint(row)
                for row, limit in zip(made, limits, strict=True)
            ):
                break
            cache = dict(zip(self._layout.past, (found[name] for name in self._layout.present), strict=True))
            ids = chosen[:, None]  # (batch, 1)
            mask = np.concatenate([mask, np.ones((len(rows), 1), dtype=np.int64)], axis=1)
        answers = (cut(row, self._ends, limit) for row, limit in zip(made, limits, strict=True))
        return [Answer(self._tokens.decode(kept), whole) for kept, whole in answers]


def open_decoder(pack: Pack, device: str = "cpu", threads: int | None = None) -> Backend:
    """The backend of an exported decoder."""
    model = pack.manifest.model
    return open_backend(
        pack.model,
        inputs=model.inputs,
        outputs=model.outputs,
        device=device,
        threads=threads,
        external=tuple(pack.manifest.files),
    )


def feeds(layout: DecoderLayout, ids: NDArray[Any], mask: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Inputs besides the cache. ids: (batch, time); mask: (batch, past + time), 0 where padded."""
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -ids.shape[1] :]
    known = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: known[name] for name in layout.inputs}


def _best(logits: NDArray[Any]) -> NDArray[np.int64]:
    """The likeliest next token of each row. Raises BackendError for logits that are not numbers."""
    last = logits[:, -1]  # (batch, vocabulary)
    if np.isnan(last).any():
        raise BackendError("the model gave logits that are not numbers")
    best: NDArray[np.int64] = last.argmax(axis=-1).astype(np.int64)
    return best
