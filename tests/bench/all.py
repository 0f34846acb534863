"""The whole proof in one go: every section of `safeguard bench`, as JSON, as a picture and as tables.

Run on a quiet machine: python tests/bench/all.py --out tests/bench/results/ [--peers DIR] [--texts FILE]
[--work DIR]. DIR of --peers is what tests/bench/peers/install.sh makes; without it the peers' code paths are
run instead of the packages. Nothing here asserts: goals that are not reached are shown as such.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from safeguard.bench.report import lines
from safeguard.bench.run import run_bench, write
from safeguard.bench.settings import SECTIONS, Settings
from safeguard.bench.texts import Texts, read_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--work", type=Path, help="keeps the random models, so that the next run is shorter")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tower", default="ViT-B/32", choices=("ViT-B/32", "ViT-L/14"))
    parser.add_argument("--quick", action="store_true", help="tiny models, 2 repeats: whether it works")
    options = parser.parse_args()
    started = time.monotonic()

    def say(what: str) -> None:
        sys.stderr.write(f"{time.monotonic() - started:6.0f} s  {what}\n")

    with tempfile.TemporaryDirectory() as scratch:
        settings = Settings(
            work=options.work or Path(scratch),
            repeats=2 if options.quick else options.repeats,
            texts=read_texts(options.texts) if options.texts else Texts(),
            peers=options.peers,
            tower=options.tower,
            tiny=options.quick,
            say=say,
        )
        found = run_bench(settings, options.sections or SECTIONS)
    write(found, options.out)
    sys.stdout.write("\n".join(lines(found)) + "\n")


if __name__ == "__main__":
    main()
