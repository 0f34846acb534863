"""`safeguard train refiner-sft` and `refiner-rl`: train a prompt refiner from a recipe file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Data = Annotated[Path, typer.Option(help="Folder of the data pack, or a file of pairs (JSONL).")]
Out = Annotated[Path, typer.Option(help="Folder for adapter, metrics and card.")]
Encoder = Annotated[Path | None, typer.Option(help="Folder of a sentence encoder; the installed one.")]
Base = Annotated[str | None, typer.Option(help="Base model in place of the recipe's.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps in place of the recipe's.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in the folder.")]
Merge = Annotated[bool, typer.Option("--merge", help="Also write the model with the adapter merged in.")]


def register(app: typer.Typer) -> None:
    """Adds both commands to `safeguard train`."""
    app.command("refiner-sft")(refiner_sft)
    app.command("refiner-rl")(refiner_rl)


def refiner_sft(
    config: Annotated[Path, typer.Option(help="Recipe file (TOML).")],
    data: Data,
    out: Out,
    encoder: Encoder = None,
    base: Base = None,
    steps: Steps = None,
    resume: Resume = False,
    merge: Merge = False,
) -> None:
    """Train a refiner on pairs of prompts and safe rewrites, and on prompts that stay."""
    from safeguard.train.refiner.sft import RefinerSftConfig, train_refiner_sft

    recipe = _changed(RefinerSftConfig.read(config), base, steps)
    result = train_refiner_sft(recipe, _there(data), out, encoder=encoder, resume=resume, merge=merge)
    typer.echo(str(result.folder))


def refiner_rl(
    config: Annotated[Path, typer.Option(help="Recipe file (TOML).")],
    data: Data,
    out: Out,
    adapter: Annotated[Path | None, typer.Option(help="Folder of the supervised run; the bare base.")] = None,
    pipeline: Annotated[str | None, typer.Option(help="Diffusers pipeline, for picture rewards.")] = None,
    q16: Annotated[str | None, typer.Option(help="Image check for them: pack or kind:argument.")] = None,
    q16_label: Annotated[str, typer.Option(help="The label of it that counts.")] = "inappropriate",
    clip: Annotated[str | None, typer.Option(help="CLIP model for them.")] = None,
    encoder: Encoder = None,
    base: Base = None,
    steps: Steps = None,
    resume: Resume = False,
    merge: Merge = False,
) -> None:
    """Train a refiner on by reward: safety, kept intent, no needless edits."""
    from safeguard.train.refiner.rl import RefinerRlConfig, load_rewards, train_refiner_rl

    recipe = _changed(RefinerRlConfig.read(config), base, steps)
    pictures = None
    if recipe.reward != "text":
        if pipeline is None or q16 is None or clip is None:
            raise ValueError(f"reward {recipe.reward!r} needs --pipeline, --q16 and --clip")
        pictures = _pictures(pipeline, q16, q16_label, clip)
    rewards = load_rewards(recipe, encoder=encoder, pictures=pictures)
    result = train_refiner_rl(
        recipe, _there(data), out, adapter=adapter, rewards=rewards, resume=resume, merge=merge
    )
    typer.echo(str(result.folder))


def _pictures(pipeline: str, q16: str, label: str, clip: str) -> Any:
    import diffusers
    import transformers

    from safeguard.checks.loading import load_check
    from safeguard.train.refiner.pictures import (
        PictureModels,
        check_inappropriate,
        clip_alignment,
        pipeline_draw,
    )

    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    model = transformers.CLIPModel.from_pretrained(clip, use_safetensors=True).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip)
    check = load_check(str(Path(q16).resolve()) if Path(q16).is_dir() else q16)
    return PictureModels(
        pipeline_draw(pipe), check_inappropriate(check, label), clip_alignment(model, processor)
    )


def _changed(recipe: Any, base: str | None, steps: int | None) -> Any:
    """The recipe with what the command line says in place of it, checked again as a whole."""
    changes = {key: value for key, value in (("base", base), ("steps", steps)) if value is not None}
    return type(recipe).model_validate({**recipe.model_dump(), **changes})


def _there(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(2, "no such folder or file", str(path))
    return path
