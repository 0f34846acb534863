"""`python -m safeguard.cli`: the same as the script `safeguard`."""

from __future__ import annotations

from safeguard.cli import main

main()
