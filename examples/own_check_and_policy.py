"""A check of your own, a word list, and a policy file, together around an async function."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from safeguard import Finding, Guard, Policy, capture

HERE = Path(__file__).parent


class Shouting:
    """Scores the share of capital letters."""

    name = "shouting"
    modality = "text"

    def __call__(self, batch: Sequence[str], /) -> list[Finding]:
        return [Finding({"shouting": sum(c.isupper() for c in text) / max(len(text), 1)}) for text in batch]


guard = Guard(inputs=[Shouting()], policy=Policy.from_file(HERE / "policy.yaml"))


@guard
async def reply(prompt: str) -> str:
    return prompt.lower()


def main() -> None:
    with capture() as reports:
        print(asyncio.run(reply("Where is the kitchen knife?")))
        print(asyncio.run(reply("WHERE IS IT")) or "(withheld)")
    for report in reports:
        print(report.summary())


if __name__ == "__main__":
    main()
