"""What a benchmark is run with."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from safeguard.bench.texts import Texts

SECTIONS = ("text", "image", "concurrency", "growth")
PEERS = ("llm-guard", "openai-guardrails", "guardrails-ai", "nemoguardrails")
"""Folders with virtual environments that `--peers` may hold; detoxify lives in that of llm-guard."""
FEWEST_REPEATS = 20


@dataclass(frozen=True)
class Settings:
    """How much of what is measured. work: folder for models and logs. tiny: small models, to try it all out.

    peers: folder of virtual environments, named as in PEERS. tower: "ViT-B/32" or "ViT-L/14".
    """

    work: Path
    repeats: int = FEWEST_REPEATS
    texts: Texts = field(default_factory=Texts)
    peers: Path | None = None
    tower: str = "ViT-B/32"
    tiny: bool = False
    seed: int = 0
    say: Callable[[str], None] = field(default=lambda _: None, repr=False)

    def __post_init__(self) -> None:
        if self.repeats < FEWEST_REPEATS and not self.tiny:
            raise ValueError(f"a median here takes {FEWEST_REPEATS} runs or more, got {self.repeats}")
        if self.peers is not None and not self.peers.is_dir():
            raise FileNotFoundError(2, "no such folder of environments", str(self.peers))

    def python_of(self, peer: str) -> str | None:
        """The interpreter of a peer's environment, None where there is none."""
        if self.peers is None:
            return None
        place = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
        python = self.peers.joinpath(peer, *place)
        return str(python.absolute()) if python.exists() else None
