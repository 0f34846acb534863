"""Stage 2 of UniDetox: texts sampled from the base model against its toxic twin, resumable text by text."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safeguard.errors import MissingExtra, PackError
from safeguard.files import write_whole
from safeguard.packs import canonical_digest
from safeguard.train.unidetox.config import Compat, Distil
from safeguard.train.unidetox.contrast import Twins, contrast, draw, sample
from safeguard.train.unidetox.corpus import digest_of, digest_of_texts
from safeguard.train.unidetox.models import end_tokens, start_token

try:
    import torch
    from tqdm import tqdm
except ImportError as exc:
    raise MissingExtra(exc.name or "torch", "train") from exc

log = logging.getLogger(__name__)

Row = dict[str, Any]


class Journal:
    """Finished texts, one JSON line each, on the disk as soon as they are there; one file per process.

    A line that a crash cut in two is taken away and its text is made anew. Raises PackError where the folder
    holds texts of other settings or models.
    """

    def __init__(self, out: Path, identity: str, *, process: int = 0) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.path = out / f"texts.part-{process}.jsonl"
        head = out / "texts.part.json"
        if head.is_file() and json.loads(head.read_text(encoding="utf-8"))["identity"] != identity:
            raise PackError(f"{out} holds texts of other settings or models; give a new folder")
        write_whole(head, json.dumps({"identity": identity}) + "\n")
        self._mend()

    def rows(self) -> dict[int, Row]:
        """Number of the text -> its row, of all processes."""
        found: dict[int, Row] = {}
        for path in sorted(self.out.glob("texts.part-*.jsonl")):
            for line in path.read_text(encoding="utf-8").split("\n"):
                if line:
                    row = json.loads(line)
                    found[int(row["index"])] = row
        return found

    def add(self, row: Row) -> None:
        """Writes one row down."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _mend(self) -> None:
        if not self.path.is_file():
            return
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if whole != raw:
            write_whole(self.path, whole)


def distil(
    base: Any,
    toxic: Any,
    tokenizer: Any,
    settings: Distil,
    out: Path,
    *,
    start: str | None = None,
    compat: Compat | None = None,
    identity: Mapping[str, Any] | None = None,
    process: tuple[int, int] = (0, 1),
) -> Journal:
    """Samples the texts that are not there yet and writes each down when it is finished.

    process: number of this process and how many there are; each takes whole batches in turn. A batch of which
    a text is missing is sampled with all its rows, so its numbers come out as they would have.
    """
    compat = compat or Compat()
    # `drop_degenerate` chooses among finished texts, so it does not make them other texts
    decides = {**settings.model_dump(mode="json", exclude={"drop_degenerate"}), "start": start}
    journal = Journal(
        out,
        canonical_digest({**decides, "shared_cache": compat.shared_cache, **(identity or {})}),
        process=process[0],
    )
    done = journal.rows()
    size = settings.batch_size
    batches = [range(at, min(at + size, settings.texts)) for at in range(0, settings.texts, size)]
    mine = [batch for batch in batches[process[0] :: process[1]] if any(i not in done for i in batch)]
    left = sum(i not in done for batch in mine for i in batch)
    with tqdm(total=left, desc="distil", unit="text", mininterval=2, disable=process[0] > 0) as bar:
        for batch in mine:
            for row in _sample_batch(batch, base, toxic, tokenizer, settings, start, compat):
                if row["index"] not in done:
                    journal.add(row)
                    bar.update()
    return journal


def _sample_batch(
    batch: range, base: Any, toxic: Any, tokenizer: Any, settings: Distil, start: str | None, compat: Compat
) -> Iterator[Row]:
    twins = Twins(base, toxic, shared_cache=compat.shared_cache)
    ids = torch.full((len(batch), 1), start_token(tokenizer, start), dtype=torch.long)
    new = settings.tokens - 1  # the start token is counted
    beta = math.inf if settings.beta == "difference" else settings.beta
    for row, tokens, ended in sample(
        twins,
        ids,
        torch.ones_like(ids),
        torch.stack([draw(settings.seed, i, new) for i in batch]),
        lambda b, t: contrast(b, t, alpha=settings.alpha, beta=beta),
        ends=end_tokens(tokenizer, start),
        temperature=settings.temperature,
        top_k=settings.top_k,
        min_tokens=settings.min_tokens,
    ):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        yield {
            "index": batch[row],
            "text": text,
            "tokens": len(tokens),
            "ended": ended,
            "sha256": digest_of(text),
        }


def finish(journal: Journal, out: Path, texts: int, *, drop_degenerate: bool = False) -> dict[str, Any]:
    """Writes `texts.jsonl`, in the order of the numbers, and gives the report on its texts.

    Raises ValueError while texts are missing, or when dropping leaves none.
    """
    found = journal.rows()
    missing = [i for i in range(texts) if i not in found]
    if missing:
        raise ValueError(f"{len(missing)} of {texts} texts are not sampled yet")
    rows = [found[i] for i in range(texts)]
    report = report_on([row["text"] for row in rows])
    bad = {i for numbers in report["degenerate"].values() for i in numbers} | set(report["duplicates"])
    kept = [row for i, row in enumerate(rows) if not (drop_degenerate and i in bad)]
    if not kept:
        raise ValueError("every text is degenerate; look at the toxic model, alpha and temperature")
    write_whole(out / "texts.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
    lengths = [int(row["tokens"]) for row in kept]
    report |= {
        "texts": len(kept),
        "dropped": len(rows) - len(kept),
        "sha256": digest_of_texts([row["text"] for row in kept]),
        "tokens": {"all": sum(lengths), "mean": sum(lengths) / len(lengths), "least": min(lengths)},
        "ended": sum(bool(row["ended"]) for row in kept),
    }
    log.info("%d texts, %d duplicates, %d degenerate", len(kept), len(report["duplicates"]), len(bad))
    return report


def report_on(texts: Sequence[str]) -> dict[str, Any]:
    """Numbers of the texts that repeat an earlier one (but for case and spaces) and that are degenerate."""
    seen: dict[str, int] = {}
    duplicates = []
    degenerate: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        plain = " ".join(text.casefold().split())
        if plain in seen:
            duplicates.append(i)
        seen.setdefault(plain, i)
        fault = fault_of(text)
        if fault is not None:
            degenerate.setdefault(fault, []).append(i)
    return {"duplicates": duplicates, "degenerate": degenerate}


def fault_of(text: str) -> str | None:
    """Why a text is no use to learn from: empty, short, repetitive or garbled; None where it is."""
    words = text.split()
    if not words:
        return "empty"
    if len(words) < 10:
        return "short"
    threes = list(zip(words, words[1:], words[2:], strict=False))
    if len(set(threes)) < 0.5 * len(threes) or max(Counter(words).values()) > 0.3 * len(words):
        return "repetitive"
    if sum(c.isalpha() or c.isspace() for c in text) < 0.7 * len(text):
        return "garbled"
    return None
