"""`safeguard demo`: the main job on real models, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    model: Annotated[
        str | None, typer.Option(help="Hub name or folder of a causal language model, for the embedded one.")
    ] = None,
    pipeline: Annotated[
        str | None, typer.Option(help="Hub name or folder of a text-to-image pipeline, for the embedded one.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the sheet of pictures and the report.")] = Path(
        "demo_output"
    ),
    preset: Annotated[
        str | None, typer.Option(help="monitor, lenient, standard or strict; standard if no policy is given.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="A policy file instead of a preset.")] = None,
    texts: Annotated[bool, typer.Option("--texts/--no-texts", help="Ask the language model.")] = True,
    images: Annotated[bool, typer.Option("--images/--no-images", help="Run the picture pipeline.")] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answers.")] = 48,
    detoxified: Annotated[
        bool, typer.Option("--detoxified", help="Ask the embedded model with its detoxifying adapter.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<number>.")] = "cpu",
) -> None:
    """Guard a chat model and a diffusion pipeline on prompts from harmless to hostile; show the results."""
    from safeguard.demo import run
    from safeguard.guards import Guard
    from safeguard.policy import Policy

    if preset is not None and policy is not None:
        raise ValueError("give --preset or --policy, not both")
    if detoxified and model is not None:
        raise ValueError("give --detoxified or --model, not both; the adapter is for the embedded model")
    chosen = Policy.from_file(policy) if policy is not None else Policy.preset(preset or "standard")
    run(
        output,
        model=model,
        pipeline=pipeline,
        guard=Guard(policy=chosen, device=device, folder=policy.parent if policy is not None else None),
        texts=texts,
        images=images,
        device=device,
        max_new_tokens=max_new_tokens,
        is_detoxified=detoxified,
    )
