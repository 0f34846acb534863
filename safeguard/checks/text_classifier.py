"""TextClassifier: a text model of any size over whole texts, in windows, the worst of which counts."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from safeguard.backends import Backend, default_threads
from safeguard.checks.opening import open_model
from safeguard.checks.readout import Readout
from safeguard.checks.tokens import TokenCutter, Tokens
from safeguard.errors import PackError
from safeguard.manifest import Window
from safeguard.packs import Pack, resolve
from safeguard.runtime.buckets import Buckets, Run, plan_runs
from safeguard.runtime.tokenising import tokenise_once
from safeguard.text import windows
from safeguard.types import Coverage, Finding, Modality, Scores, Span

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOKENIZER_NAME = "tokenizer.json"
SPAN_FROM = 0.5
"""Score from which the worst window of a text with several is named as a span."""
_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids"})
GPU_TOKENS = 16_384
"""Largest run on a GPU; text-embeddings-inference uses the same."""
SMALL_TOKENS = 128
"""Largest shared run of an int8 model on the CPU: beyond it activations leave the caches and gain is lost."""
_STEP = 4  # tokens: texts of 17 to 20 share runs
_CHARACTERS_PER_TOKEN = 16  # more than any real text has; longer input is refused before it is tokenised


@dataclass(frozen=True, slots=True)
class _Piece:
    text: int  # index in the batch
    start: int  # first token
    end: int


class TextClassifier:
    """Scores texts with one trunk and any number of labels.

    A text longer than the window is cut into overlapping ones and the largest score of each label counts;
    nothing is truncated. Windows of similar length share a run, padded to the longest among them, or with
    `buckets` to one of a few shapes, so that a GPU's graphs are made once and used again. With `isolated`
    each window has a run of its own, without padding: dynamically quantised models (int8) scale activations
    over the whole run, so neighbours would change each other's scores. Where a pack says that they do not
    (`separate_rows`), windows share a run only when they are padded to the same length alone as well, so what
    else was in the run changes a score by rounding at most. `workers` runs go side by side.

    inputs: names of the backend's inputs, of input_ids, attention_mask, token_type_ids. output: the name of
    its logits (window, column). max_windows: a text with more raises ValueError. max_tokens: largest run,
    with padding.
    """

    modality: Modality = "text"

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        readout: Readout,
        window: Window,
        *,
        name: str = "text_classifier",
        inputs: Sequence[str] = ("input_ids", "attention_mask"),
        output: str = "logits",
        digest: str | None = None,
        operating_points: Mapping[str, Scores] | None = None,
        isolated: bool = False,
        workers: int = 1,
        max_windows: int = 512,
        max_tokens: int = 4096,
        buckets: Buckets | None = None,
    ) -> None:
        unknown = sorted(set(inputs) - _INPUTS)
        if unknown:
            raise ValueError(f"inputs must be among {', '.join(sorted(_INPUTS))}, got {', '.join(unknown)}")
        self.name = name
        self.digest = digest
        self.labels = readout.labels
        self.operating_points = {point: dict(scores) for point, scores in (operating_points or {}).items()}
        self._backend, self._readout = backend, readout
        self._cut = TokenCutter(tokenizer)
        self._size = window.tokens - self._cut.special_tokens
        self._overlap = min(window.overlap, self._size // 2)
        self._inputs, self._output = tuple(inputs), output
        self._workers = workers
        self._max_windows, self._max_tokens = max_windows, 0 if isolated else max_tokens
        self._buckets = None if isolated or buckets is None else buckets.up_to(window.tokens)
        self.settings = (
            f"window={window.tokens},{self._overlap} max_windows={max_windows} labels={self.labels}"
        )

    @classmethod
    def load(
        cls,
        pack: str | Path | Pack,
        *,
        device: str = "cpu",
        threads: int | None = None,
        max_windows: int = 512,
    ) -> TextClassifier:
        """The classifier in a model pack of kind text_classifier; see `safeguard.packs.resolve` for names."""
        found = (pack if isinstance(pack, Pack) else resolve(pack)).expect("text_classifier")
        manifest = found.manifest
        if manifest.window is None:  # the manifest's own validation has seen to that
            raise PackError(f"pack {manifest.name!r} has no window")
        small = manifest.precision.startswith("int8") and device == "cpu"
        isolated = small and not manifest.separate_rows
        buckets = None if device == "cpu" else Buckets()
        if small and not isolated:
            buckets = Buckets.fine(_STEP, manifest.window.tokens, SMALL_TOKENS // _STEP)
        backend = open_model(
            found,
            device,
            1 if small else threads,  # small runs gain more from going side by side
        )
        return cls(
            backend,
            read_tokenizer(found.path(TOKENIZER_NAME), found.read(TOKENIZER_NAME)),
            Readout.of(manifest),
            manifest.window,
            name=manifest.name,
            inputs=manifest.model.inputs,
            output=manifest.model.outputs[0],
            digest=found.digest,
            operating_points=manifest.operating_points,
            isolated=isolated,
            workers=(threads or default_threads()) if small else 1,
            max_windows=max_windows,
            max_tokens=SMALL_TOKENS if small else 4096 if device == "cpu" else GPU_TOKENS,
            buckets=buckets,
        )

    def __call__(self, batch: Sequence[str], /) -> list[Finding]:
        """One finding per text, in order. Neighbours change the scores of a text by rounding at most.

        Raises TypeError for what is not text and ValueError for a text of more than `max_windows` windows.
        """
        self._refuse(batch)
        tokens = tokenise_once(batch, self._cut.digest, self._cut)
        cut = [self._pieces(i, len(t.ids)) for i, t in enumerate(tokens)]
        pieces = [piece for one in cut for piece in one]
        scores = self._scores(pieces, tokens)
        findings = []
        end = 0
        for t, own in zip(tokens, cut, strict=True):
            start, end = end, end + len(own)
            findings.append(self._finding(t, own, scores[start:end]))
        return findings

    @property
    def lanes(self) -> int:
        """How many runs go on side by side at most."""
        return self._workers

    def in_one_lane(self) -> TextClassifier:
        """The same check, whose runs follow one another: for callers that make many calls at a time."""
        narrow = copy(self)
        narrow._workers = 1
        return narrow

    def warmup(self) -> None:
        """Run every shape that texts can come in once, so that no caller waits for a graph or a kernel.

        Without buckets that is the shortest and the longest window.
        """
        special = self._cut.special_tokens
        shapes = [(1, special + 1), (1, self._size + special)]
        if self._buckets is not None:
            shapes = self._buckets.shapes(self._size + special, self._max_tokens)
        for rows, length in shapes:
            ids = np.full((rows, length), self._cut.pad_id, np.int64)
            self._run(ids, np.ones_like(ids))

    def _refuse(self, batch: Sequence[str]) -> None:
        if isinstance(batch, str):
            raise TypeError("a check takes a batch: a list of texts, got one text")
        most = self._max_windows * self._size * _CHARACTERS_PER_TOKEN
        for i, text in enumerate(batch):
            if not isinstance(text, str):
                raise TypeError(f"item {i} of the batch must be text, got {type(text).__name__}")
            if len(text) > most:
                raise ValueError(
                    f"item {i} of the batch has {len(text)} characters, more than "
                    f"max_windows={self._max_windows} "
                    f"windows of {self._size} tokens can hold; raise max_windows or send less text"
                )

    def _pieces(self, text: int, length: int) -> list[_Piece]:
        found = windows(length, self._size, self._overlap) if length else [(0, 0)]
        if len(found) > self._max_windows:
            raise ValueError(
                f"item {text} of the batch needs {len(found)} windows of {self._size} tokens, more than "
                f"max_windows={self._max_windows}; raise max_windows or send less text"
            )
        return [_Piece(text, start, end) for start, end in found]

    def _scores(self, pieces: Sequence[_Piece], tokens: Sequence[Tokens]) -> NDArray[np.float64]:
        lengths = [p.end - p.start + self._cut.special_tokens for p in pieces]
        if len(pieces) == 1:  # most calls: one short text
            return self._score(plan_runs(lengths, self._max_tokens, self._buckets)[0], pieces, tokens)
        scores = np.empty((len(pieces), len(self.labels)))
        runs = plan_runs(lengths, self._budget(lengths), self._buckets)

        def fill(run: Run) -> None:
            scores[list(run.indices)] = self._score(run, [pieces[i] for i in run.indices], tokens)

        if self._workers > 1 and len(runs) > 1:
            with ThreadPoolExecutor(min(self._workers, len(runs))) as pool:
                deque(pool.map(fill, runs), maxlen=0)  # raises what a run raised
        else:
            for run in runs:
                fill(run)
        return scores

    def _budget(self, lengths: Sequence[int]) -> int:
        """Tokens of one run: as many as may be, or fewer so that every worker has some."""
        if self._workers == 1 or self._buckets is None:
            return self._max_tokens
        whole = sum(self._buckets.length(length) for length in lengths)
        return min(self._max_tokens, -(-whole // self._workers))

    def _score(self, run: Run, pieces: Sequence[_Piece], tokens: Sequence[Tokens]) -> NDArray[np.float64]:
        prefix, suffix = self._cut.prefix, self._cut.suffix
        ids = np.full((run.rows, run.length), self._cut.pad_id, np.int64)  # (window, token)
        mask = np.zeros_like(ids)
        for row, piece in enumerate(pieces):
            body = tokens[piece.text].ids[piece.start : piece.end]
            end = len(prefix) + len(body)
            size = end + len(suffix)
            ids[row, : len(prefix)] = prefix
            ids[row, len(prefix) : end] = body
            ids[row, end:size] = suffix
            mask[row, :size] = 1
        mask[len(pieces) :] = 1  # rows that only fill the bucket: a row without any token would give NaN
        logits = self._run(ids, mask)
        if len(logits) == run.rows:
            logits = logits[: len(pieces)]
        return self._readout(logits, len(pieces))

    def _run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[Any]:
        arrays = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self._inputs:
            arrays["token_type_ids"] = np.zeros_like(ids)
        return self._backend({name: arrays[name] for name in self._inputs})[self._output]

    def _finding(self, tokens: Tokens, pieces: Sequence[_Piece], scores: NDArray[np.float64]) -> Finding:
        worst = scores.max(axis=0)  # keeps NaN
        count = len(tokens.ids)
        return Finding(
            dict(zip(self.labels, worst.tolist(), strict=True)),
            spans=self._spans(tokens, pieces, scores) if len(pieces) > 1 else (),
            coverage=Coverage("tokens", count, count, len(pieces)),
        )

    def _spans(
        self, tokens: Tokens, pieces: Sequence[_Piece], scores: NDArray[np.float64]
    ) -> tuple[Span, ...]:
        spans = []
        for column, label in enumerate(self.labels):
            row = int(scores[:, column].argmax())
            score = float(scores[row, column])
            if score >= SPAN_FROM:
                start, end = tokens.offsets[pieces[row].start : pieces[row].end][[0, -1], [0, 1]].tolist()
                spans.append(Span(start, end, label, score))
        return tuple(spans)


def read_tokenizer(path: Path, content: bytes | None = None) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`. Raises PackError when it cannot be read.

    content: what the file holds, where it was read already.
    """
    try:
        made = Tokenizer.from_str((path.read_bytes() if content is None else content).decode())
        made.encode("a")  # a vocabulary without the unknown token only fails here
    except Exception as exc:  # the Rust side raises plain Exception
        raise PackError(
            f"{path.name} is no tokenizer that this version of tokenizers can read: {exc}"
        ) from exc
    return made
