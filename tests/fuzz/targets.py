"""What is fuzzed: one function per target, bytes in, the name of what came out.

A target returns "ok" or the class of a documented error. Whatever else it raises is a finding: a crash, a
hang (the engine's time limit) or a broken promise (`Broken`).
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from safeguard.backends import Backend
from safeguard.checks.blocklist import Blocklist
from safeguard.checks.readout import Readout
from safeguard.checks.text_classifier import TextClassifier
from safeguard.cli.sinks import to_line, to_row
from safeguard.cli.sources import Entry, Lines, stdin_texts
from safeguard.errors import PackError, PolicyError
from safeguard.images import MAX_PIXELS, open_image
from safeguard.images import views as picture_views
from safeguard.manifest import MANIFEST_NAME, Window
from safeguard.packs import read_pack
from safeguard.policy import Policy
from safeguard.text import View, normalise, views, windows
from tests.fuzz.texts import text_of


class Broken(Exception):
    """A promise that did not hold; the message says which, without the input."""


def promise(holds: bool, what: str) -> None:
    """Raises Broken where it does not hold."""
    if not holds:
        raise Broken(what)


# --- text -------------------------------------------------------------------------------------


def normalisation(data: bytes) -> str:
    """Every text has a raw and perhaps a plain reading, each with offsets that lead back."""
    text = text_of(data)
    plain = normalise(text)
    _offsets_lead_back(plain, len(text))
    readings = views(text)
    promise(readings[0].text == text, "the first reading is the text as it stands")
    for view in readings:
        _offsets_lead_back(view, len(text))
    promise(plain.text in [view.text for view in readings], "the normalised reading is scored")
    return "ok"


def _offsets_lead_back(view: View, length: int) -> None:
    starts, ends = list(view.starts), list(view.ends)
    promise(len(starts) == len(ends) == len(view.text), "each character has offsets")
    promise(starts == sorted(starts) and ends == sorted(ends), "offsets never go down")
    promise(
        all(0 <= s < e <= length for s, e in zip(starts, ends, strict=True)), "offsets lie in the original"
    )
    promise(view.span(0, 0)[0] == view.span(0, 0)[1], "an empty span stays empty")


@cache
def _blocklist() -> Blocklist:
    return Blocklist({"harm": ["kill", "kill all", "杀", "ß"], "rude": ["scoundrel", "fi"]})


def blocklist(data: bytes) -> str:
    """Spans of a word list lie in the text, and a category scores 1 exactly where it has one."""
    text = text_of(data)
    (finding,) = _blocklist()([text])
    promise(all(0 <= s.start < s.end <= len(text) for s in finding.spans), "spans lie in the text")
    found = {span.category for span in finding.spans}
    promise(finding.scores == {c: float(c in found) for c in ("harm", "rude")}, "a score of 1 has its span")
    return "ok"


# --- windows ----------------------------------------------------------------------------------


def window_cuts(data: bytes) -> str:
    """Windows cover everything, overlap as wanted, and nonsense raises ValueError."""
    numbers = np.frombuffer(data[:12].ljust(12, b"\0"), np.int32).tolist()
    length, size, overlap = numbers[0] % 20_000 - 10, numbers[1] % 600 - 10, numbers[2] % 300 - 10
    try:
        found = windows(length, size, overlap)
    except ValueError:
        promise(length < 0 or overlap < 0 or size <= overlap, "only nonsense is refused")
        return "ValueError"
    promise(found[0][0] == 0 and found[-1][1] == length, "windows begin at 0 and end with the text")
    for (start, end), (after, _) in zip(found, found[1:], strict=False):
        promise(end - start == size and start < after <= end - overlap, "windows share the overlap")
    return "ok"


_VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "kill",
    "the",
    "a",
    "##a",
    "k",
    "i",
    "l",
    "##l",
    "##i",
    ".",
]


class _Seen:
    """A backend that keeps the ids it is shown and scores every window 0.5."""

    def __init__(self) -> None:
        self.ids = 0

    def __call__(self, inputs: Any, /) -> dict[str, Any]:
        mask = inputs["attention_mask"]
        promise(inputs["input_ids"].shape == mask.shape, "ids and mask have one shape")
        self.ids += int(mask.sum()) - 2 * len(mask)  # [CLS] and [SEP]
        return {"logits": np.zeros((len(mask), 1), np.float32)}


@cache
def _classifier() -> tuple[TextClassifier, _Seen]:
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(_VOCABULARY)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    seen = _Seen()
    backend: Backend = seen
    return TextClassifier(backend, made, Readout(["bad"]), Window(tokens=16, overlap=4)), seen


def window_texts(data: bytes) -> str:
    """Every token of every text of a batch is shown to the model, in order, with spans inside the text."""
    half = len(data) // 2
    batch = [text_of(data[:half]), text_of(data[half:])]
    classifier, seen = _classifier()
    seen.ids = 0
    try:
        findings = classifier(batch)
    except ValueError as exc:
        promise("max_windows" in str(exc), "only a text that is too long is refused")
        return "ValueError"
    total = 0
    for text, finding in zip(batch, findings, strict=True):
        promise(dict(finding.scores) == {"bad": 0.5}, "sigmoid(0) is 0.5")
        promise(all(0 <= s.start <= s.end <= len(text) for s in finding.spans), "spans lie in the text")
        promise(
            finding.coverage is not None and finding.coverage.checked == finding.coverage.total, "all seen"
        )
        total += finding.coverage.total if finding.coverage else 0
    promise(seen.ids >= total, "no token is left out")
    return "ok"


# --- files ------------------------------------------------------------------------------------


def policy_file(data: bytes) -> str:
    """A policy is read, or PolicyError says why not; what was read comes back the same from every form."""
    if not data:
        return "ok"
    forms: tuple[Literal["yaml", "toml", "json"], ...] = ("yaml", "toml", "json")
    try:
        policy = Policy.from_text(data[1:].decode("utf-8", "surrogateescape"), forms[data[0] % 3])
    except PolicyError:
        return "PolicyError"
    for form in forms:
        promise(Policy.from_text(policy.to_text(form), form) == policy, f"a policy survives {form}")
    return "ok"


@cache
def _folder() -> Path:
    made = tempfile.TemporaryDirectory(prefix="safeguard-fuzz-")
    _KEPT.append(made)  # deleted when the process ends
    (Path(made.name) / "model.onnx").write_bytes(b"\x08\x09")
    return Path(made.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def manifest(data: bytes) -> str:
    """A pack is read and its digests proved, or PackError says why not."""
    (_folder() / MANIFEST_NAME).write_bytes(data)
    try:
        pack = read_pack(_folder())
    except PackError:
        return "PackError"
    promise(len(pack.digest) == 64, "a digest is SHA-256")
    try:
        pack.verify()
    except PackError:
        return "PackError (digests)"
    return "ok"


def jsonl(data: bytes) -> str:
    """Each line gives one entry or one error, and both can be written as strict JSON."""
    packed = bool(data) and data[0] == 0x1F
    path = _folder() / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(data)
    for entry in stdin_texts(io.BytesIO(data), whole=False):
        _row_is_json(entry)
    lines = Lines(str(path), "text", "text")
    try:
        entries = list(lines)
    except ValueError as exc:
        promise(packed and "damaged" in str(exc), "only a damaged packed file ends early")
        return "ValueError"
    finally:
        lines.close()
    for entry in entries:
        _row_is_json(entry)
        promise(entry.bad is not None or isinstance(entry.item, str), "what is not bad is a text")
    return "ok" if all(e.bad is None for e in entries) else "bad line"


def _row_is_json(entry: Entry) -> None:
    line = to_line(
        to_row(entry, None) if entry.bad is not None or entry.row is not None else {"i": entry.name}
    )
    promise(line.count(b"\n") == 1, "a row is one line")
    json.loads(line)


def image(data: bytes) -> str:
    """A picture is decoded to RGB views, or ValueError says why not."""
    path = _folder() / "picture"
    path.write_bytes(data)
    try:
        opened = open_image(path)
    except ValueError:
        return "ValueError (open)"
    try:
        found = picture_views(opened, max_frames=4)
    except ValueError:
        return "ValueError (frames)"
    finally:
        opened.close()
    promise(bool(found), "a picture has a view")
    for view in found:
        promise(view.dtype == np.uint8 and view.ndim == 3 and view.shape[2] == 3, "views are RGB")
        promise(view.shape[0] * view.shape[1] <= MAX_PIXELS, "views are within the limit")
    return "ok"


TARGETS: dict[str, Callable[[bytes], str]] = {
    "normalisation": normalisation,
    "blocklist": blocklist,
    "windows": window_cuts,
    "window_texts": window_texts,
    "policy": policy_file,
    "manifest": manifest,
    "jsonl": jsonl,
    "image": image,
}
SECONDS = dict.fromkeys(TARGETS, 2.0) | {"image": 20.0}
"""Processor time that one input may take before it counts as a hang: the largest picture is 50 megapixels."""
