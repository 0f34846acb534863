"""The evasion table on the data pack: what stays flagged under every transformation, surface by surface.

`python tests/security/evasion.py --data FOLDER [--rows 150] [--surface input.llm]` samples so many unsafe and
harmless validation rows for each surface, runs `safeguard evaluate evasion --policy standard` on them and
writes `evasion_results.json` beside itself: shares and digests, never a text. Surfaces that are not asked for
keep the figures that they have.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("evasion_results.json")
FILES = {
    "output.text": ("toxicity_text",),
    "input.t2i": ("t2i_refine_pairs", "t2i_prompts"),
    "input.llm": ("llm_prompts", "jailbreak_prompts"),
}
"""Surface -> files of the data pack whose validation rows are read for it."""
_LOOK_AGAIN = {"llm_prompts": ("arena_hard",)}
"""Sources without validation rows that are read all the same: else there is hardly a harmless request."""

Row = tuple[str, int, str]
"""Text, label, source."""


def rows_of(data: Path, surface: str) -> Iterator[Row]:
    """All validation rows of a surface; of pairs the rewrite is a harmless row."""
    for name in FILES[surface]:
        with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                also = row["source"] in _LOOK_AGAIN.get(name, ())
                if (row["split"] != "validation" and not also) or row["label"] is None:
                    continue
                yield row["text"], row["label"], row["source"]
                if row.get("target"):
                    yield row["target"], 0, row["source"]


def sample(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most `count` rows of each label, drawn by the seed whatever order they came in; no text twice."""
    rng = random.Random(seed)
    ordered = sorted({text: (text, label, source) for text, label, source in rows}.values())
    rng.shuffle(ordered)
    return [row for label in (1, 0) for row in [r for r in ordered if r[1] == label][:count]]


def measure(surface: str, rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """What the command says, and how many rows of each source it was asked about."""
    buffer = io.StringIO()
    for text, label, source in rows:
        buffer.write(json.dumps({"text": text, "label": label, "source": source}) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text(buffer.getvalue(), encoding="utf-8")
        command = [sys.executable, "-m", "safeguard.cli", "evaluate", "evasion", str(path), "--json"]
        command += ["--policy", "standard", "--surface", surface.partition(".")[2], "--seed", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    sources = Counter(source for _, _, source in rows)
    return {**json.loads(done.stdout), "sources": dict(sorted(sources.items()))}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data pack")
    parser.add_argument("--rows", type=int, default=150, help="of each label and surface, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--surface", choices=[*FILES], action="append", help="may be repeated; all")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    for surface in args.surface or FILES:
        rows = sample(list(rows_of(args.data, surface)), args.rows, args.seed)
        found = measure(surface, rows, args.seed)
        held = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {}
        held[surface] = found
        args.results.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
