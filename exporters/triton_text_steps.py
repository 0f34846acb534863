"""The two steps around a text model inside Triton: texts to windows of tokens, logits to scores.

Same readings, tokens, windows, padding and readout as `safeguard.checks.text_classifier`, by the same code.
They run only there, where there is a module `triton_python_backend_utils`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from safeguard.checks.tokens import TokenCutter
from safeguard.exporters.triton_calls import (
    Arrays,
    ModelCalls,
    StepPack,
    answered,
    answered_at_once,
    backend_utils,
    readout_of,
    tensor_of,
    worst_rows,
)
from safeguard.runtime.buckets import Buckets, plan_runs
from safeguard.text import views, windows

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHARACTERS_PER_TOKEN = 16  # as in safeguard.checks.text_classifier


class TextTokens:
    """TEXT (text,) bytes in UTF-8 to the windows of all their readings, one behind the other.

    INPUT_IDS (token,) with special tokens; LENGTHS (window,); OWNERS (window,): the text of each window;
    COUNT (1,): how many texts there were.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        self._utils, pack = backend_utils(), StepPack.open(args)
        self._cut = TokenCutter(Tokenizer.from_str(pack.read("tokenizer.json").decode()))
        self._views, self._max_windows = pack.flag("views"), pack.number("max_windows")
        window = pack.manifest["window"]
        self._size = window["tokens"] - self._cut.special_tokens
        self._overlap = min(window["overlap"], self._size // 2)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return answered(self._utils, requests, self._tokens)

    def _tokens(self, request: Any) -> Arrays:
        texts = [raw.decode("utf-8") for raw in tensor_of(self._utils, request, "TEXT").reshape(-1)]
        rows: list[list[int]] = []
        owners: list[int] = []
        for i, text in enumerate(texts):
            found = self._rows(text)
            rows += found
            owners += [i] * len(found)
        return {
            "INPUT_IDS": np.array([token for row in rows for token in row], np.int64),
            "LENGTHS": np.array([len(row) for row in rows], np.int32),
            "OWNERS": np.array(owners, np.int32),
            "COUNT": np.array([len(texts)], np.int32),
        }

    def _rows(self, text: str) -> list[list[int]]:
        """The windows of every reading of one text, each with the model's special tokens."""
        self._refuse(len(text) > self._max_windows * self._size * _CHARACTERS_PER_TOKEN)
        readings = dict.fromkeys([text, *(v.text for v in views(text))]) if self._views else {text: None}
        prefix, suffix = self._cut.prefix, self._cut.suffix
        rows = []
        for tokens in self._cut(list(readings)):
            spans = windows(len(tokens.ids), self._size, self._overlap) if len(tokens.ids) else [(0, 0)]
            self._refuse(len(spans) > self._max_windows)
            rows += [[*prefix, *tokens.ids[start:end].tolist(), *suffix] for start, end in spans]
        return rows

    def _refuse(self, is_too_long: bool) -> None:
        if is_too_long:
            raise ValueError(
                f"the text needs more than max_windows {self._max_windows} windows of {self._size} tokens; "
                "send less text, or raise max_windows in config.pbtxt"
            )


class TextScores:
    """What TextTokens gave to SCORES (text, label): runs the model on the windows, the worst counts."""

    def initialize(self, args: Mapping[str, str]) -> None:
        self._utils, pack = backend_utils(), StepPack.open(args)
        self._model = ModelCalls(self._utils, pack)
        manifest = pack.manifest
        self._readout = readout_of(manifest)
        self._inputs = manifest["model"]["inputs"]
        self._pad_id = TokenCutter(Tokenizer.from_str(pack.read("tokenizer.json").decode())).pad_id
        most = pack.number("max_rows")
        self._max_tokens = 0 if pack.flag("isolated") else most * manifest["window"]["tokens"]
        lengths = tuple(int(size) for size in pack.parameters["lengths"].split(",") if size)
        rows = tuple(dict.fromkeys([*(2**i for i in range(most.bit_length()) if 2**i < most), most]))
        self._buckets = Buckets(lengths, rows) if lengths else None

    async def execute(self, requests: Sequence[Any]) -> list[Any]:
        return await answered_at_once(self._utils, requests, self._worst)

    async def _worst(self, request: Any) -> Arrays:
        names = ("INPUT_IDS", "LENGTHS", "OWNERS", "COUNT")
        ids, lengths, owners, count = (tensor_of(self._utils, request, name) for name in names)
        scores = await self._scores(np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else [])
        return {"SCORES": worst_rows(scores, owners, int(count[0]))}

    async def _scores(self, rows: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
        runs = plan_runs([len(row) for row in rows], self._max_tokens, self._buckets)
        logits = await self._model([self._arrays([rows[i] for i in r.indices], r.length) for r in runs])
        scores = np.empty((len(rows), len(self._readout.labels)))
        for run, found in zip(runs, logits, strict=True):
            scores[list(run.indices)] = self._readout(found, len(run.indices))
        return scores

    def _arrays(self, rows: Sequence[NDArray[np.int64]], length: int) -> dict[str, NDArray[np.int64]]:
        ids = np.full((len(rows), length), self._pad_id, np.int64)  # (window, token)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return {name: arrays[name] for name in self._inputs}
