"""Writes labelled pictures for a head that finds what a family app would not show (`safeguard train q16`).

python -m examples.emoji_diffusion.write_labels --npm NPM_FOLDER --out FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.emoji_diffusion import data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--npm", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    for kind, count in sorted(data.write_labelled(data.read_emoji(chosen.npm), chosen.out).items()):
        print(f"{count:6d} {kind}")


if __name__ == "__main__":
    main()
