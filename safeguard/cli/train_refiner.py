"""`safeguard train refiner-sft`, `refiner-rl`, `refiner-data`: prompt refiners, and data with pictures."""

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
    """Adds the commands to `safeguard train`."""
    app.command("refiner-sft")(refiner_sft)
    app.command("refiner-rl")(refiner_rl)
    app.command("refiner-data")(refiner_data)


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
    from safeguard.train.refiner.runs import sees_pictures

    recipe = _changed(RefinerRlConfig.read(config), base, steps)
    pictures = None
    if recipe.reward != "text":
        if pipeline is None or q16 is None or clip is None:
            raise ValueError(f"reward {recipe.reward!r} needs --pipeline, --q16 and --clip")
        pictures = _pictures(pipeline, q16, q16_label, clip)
    sees = sees_pictures(recipe.base if adapter is None else str(_there(adapter)))
    rewards = load_rewards(recipe, encoder=encoder, pictures=pictures, sees=sees)
    result = train_refiner_rl(
        recipe, _there(data), out, adapter=adapter, rewards=rewards, resume=resume, merge=merge
    )
    typer.echo(str(result.folder))


def refiner_data(
    prompts: Annotated[Path, typer.Option(help="Data pack, JSONL or text file with a prompt a line.")],
    pipeline: Annotated[str, typer.Option(help="Diffusers pipeline that draws them.")],
    image_check: Annotated[str, typer.Option(help="Image check: pack or kind:argument.")],
    refiner: Annotated[
        str, typer.Option(help="What rewrites, as in a policy: vlm:FOLDER, causal-lm:FOLDER.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for metadata.jsonl and images.")],
    image_label: Annotated[str, typer.Option(help="The label of the image check.")] = "inappropriate",
    config: Annotated[Path | None, typer.Option(help="Settings (TOML); the defaults.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Only so many prompts.")] = None,
    encoder: Encoder = None,
    resume: Resume = False,
) -> None:
    """Build image-text training data (image, query, response or keep) in ToxiClean-IT's form."""
    from safeguard import registry
    from safeguard.train.refiner.judges import load_risk
    from safeguard.train.refiner.pictures import check_inappropriate, pipeline_draw
    from safeguard.train.refiner.similarity import SentenceSimilarity
    from safeguard.train.refiner.toxiclean import Labellers, ToxicleanConfig, build_toxiclean, read_texts

    recipe = ToxicleanConfig() if config is None else ToxicleanConfig.read(config)
    texts = read_texts(_there(prompts), recipe)[:count]
    check, kind, _, argument = _image_check(image_check), *refiner.partition(":")
    risk = load_risk(recipe.check, recipe.label, recipe.threshold)
    labellers = Labellers(
        pipeline_draw(_pipeline(pipeline), steps=recipe.inference_steps, guidance=recipe.guidance),
        check_inappropriate(check, image_label),
        risk,
        SentenceSimilarity.load(encoder),
        registry.load("refiners", kind)(*([argument] if argument else [])),
        {
            "pipeline": Path(pipeline).name,
            "image check": _named(check.name, check),
            "text check": _named(risk.name, risk),
            "refiner": f"{kind}:{Path(argument).name}" if argument else kind,
        },
    )
    measured = build_toxiclean(recipe, texts, out, labellers, resume=resume)
    typer.echo(f"{out}: {measured['rows']} rows, {measured['kept']} kept")


def _named(name: str, model: Any) -> str:
    """Name and digest, where the model has one."""
    digest = getattr(model, "digest", None)
    return f"{name} {digest[:12]}" if digest else name


def _image_check(spec: str) -> Any:
    from safeguard.checks.loading import load_check

    return load_check(str(Path(spec).resolve()) if Path(spec).is_dir() else spec)


def _pipeline(name: str) -> Any:
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(name, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _pictures(pipeline: str, q16: str, label: str, clip: str) -> Any:
    import transformers

    from safeguard.train.refiner.pictures import (
        PictureModels,
        check_inappropriate,
        clip_alignment,
        pipeline_draw,
    )

    pipe = _pipeline(pipeline)
    model = transformers.CLIPModel.from_pretrained(clip, use_safetensors=True).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip)
    return PictureModels(
        pipeline_draw(pipe),
        check_inappropriate(_image_check(q16), label),
        clip_alignment(model, processor),
    )


def _changed(recipe: Any, base: str | None, steps: int | None) -> Any:
    """The recipe with what the command line says in place of it, checked again as a whole."""
    changes = {key: value for key, value in (("base", base), ("steps", steps)) if value is not None}
    return type(recipe).model_validate({**recipe.model_dump(), **changes})


def _there(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(2, "no such folder or file", str(path))
    return path
