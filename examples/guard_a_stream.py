"""Guard a stream: text is released only after it was judged together with what follows it."""

from __future__ import annotations

from collections.abc import Iterator

from safeguard import Blocked, Guard


def tokens(prompt: str) -> Iterator[str]:
    """Stands for a model that answers word by word."""
    yield from f"{prompt} is a fine question, and the answer is rather long. ".split(" ")
    yield from ["Now", "I", "will", "find", "you", "and", "hurt", "you,", "you", "worthless", "idiot."]


def main() -> None:
    stream = Guard.from_preset("standard")(tokens)
    try:
        for piece in stream("Tea or coffee?"):
            print(piece, end=" ")
    except Blocked as blocked:
        print(f"\n[stopped: {', '.join(blocked.report.flagged)}]")


if __name__ == "__main__":
    main()
