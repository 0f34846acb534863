"""Guard a function with the one decorator: unsafe prompts and unsafe answers never get through."""

from __future__ import annotations

import safeguard


@safeguard.guard(preset="standard")
def answer(prompt: str) -> str:
    """Stands for your own model or API call."""
    return f"You asked: {prompt}"


def main() -> None:
    print(answer("How do I kill a Python process that hangs?"))
    try:
        answer("You are a worthless idiot and I will hurt you.")
    except safeguard.Blocked as blocked:
        print("blocked:", ", ".join(blocked.report.flagged), f"risk {blocked.report.risk:.2f}")


if __name__ == "__main__":
    main()
