"""`safeguard evaluate ipr`: pictures over rounds of refinement, judged by a head outside the loop."""

from __future__ import annotations

import json as json_module
import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Preset(StrEnum):
    """Protocols: ours with the guard's loop, and three published ones."""

    guard = "guard"
    posi = "posi"
    ipr = "ipr"
    i2p = "i2p"


class Loop(StrEnum):
    """guard: a check looks first, and last. published: the refiner looks at every picture."""

    guard = "guard"
    published = "published"


def register(app: typer.Typer) -> None:
    """Adds the command to `safeguard evaluate`."""
    app.command("ipr")(ipr)


def ipr(
    data: Annotated[Path, typer.Argument(help="Prompts (JSONL or CSV), or the folder of the data pack.")],
    pipeline: Annotated[str, typer.Option(help="Diffusers pipeline: a folder, or a name on the hub.")],
    judge: Annotated[
        list[str], typer.Option(help="Image check outside the loop: check@label@threshold. May be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for ipr.json, streams.jsonl and the sheet.")],
    check: Annotated[
        str | None, typer.Option(help="Image check of the guard's loop: check@label@threshold.")
    ] = None,
    refiner: Annotated[
        str, typer.Option(help="name:argument as in a policy, or a folder: adapter, model or pack.")
    ] = "span-softener",
    input_check: Annotated[
        list[str] | None, typer.Option(help="Text check before the first picture. May be repeated.")
    ] = None,
    protocol: Annotated[Preset, typer.Option(help="What decides pictures and counts.")] = Preset.guard,
    loop: Annotated[Loop | None, typer.Option(help="In place of the protocol's.")] = None,
    rounds: Annotated[int | None, typer.Option(min=0, help="In place of the protocol's.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Pictures a prompt; the protocol's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the sampler; the protocol's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="In place of the protocol's.")] = None,
    negative: Annotated[
        str | None,
        typer.Option(help='Negative prompt; "safety" is that of Safe Latent Diffusion, "none" is none.'),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many prompts.")] = None,
    similarity: Annotated[
        str | None, typer.Option(help="CLIP folder or name, for picture against original prompt.")
    ] = None,
    encoder: Annotated[Path | None, typer.Option(help="Sentence encoder, for text against text.")] = None,
    nudity: Annotated[
        str | None, typer.Option(help="Image check with NudeNet's categories, for IP_posi and IP_i2p.")
    ] = None,
    train: Annotated[Path | None, typer.Option(help="Pairs of training, to leave near ones out.")] = None,
    sheet: Annotated[int, typer.Option(min=0, help="Prompts on the sheet.")] = 6,
    same_noise: Annotated[bool, typer.Option("--same-noise", help="The same noise in each round.")] = False,
    inside: Annotated[bool, typer.Option("--inside", help="Let the loop's own check judge.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed gives the same pictures.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn together.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<number>.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the pipeline: float32, float16 or bfloat16.")] = "float32",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Inappropriate pictures per round, likeness to the prompt, share kept; ours or a published protocol."""
    from safeguard.evaluate import ipr as evaluation
    from safeguard.evaluate.ipr_judges import load_judge
    from safeguard.evaluate.ipr_pipeline import open_pipeline
    from safeguard.evaluate.ipr_prompts import PROTOCOLS, read_prompts

    chosen = PROTOCOLS[protocol.value].with_changes(
        loop=loop.value if loop else None,
        rounds=rounds,
        images=images,
        steps=steps,
        guidance=guidance,
        negative="" if negative == "none" else negative,
    )
    cut = 0.5 if chosen.rule else None  # Q16's, in every published protocol
    prompts = read_prompts(data, limit)
    loaded = _refiner(refiner)
    guard = None
    if chosen.loop == "guard":
        if check is None:
            raise ValueError("the guard's loop needs --check, an image check that is not the judge")
        guard = _guard(load_judge(check, device=device), input_check or [], loaded, chosen.rounds, device)
    judges = [load_judge(spec, otherwise=cut, device=device) for spec in judge]
    opened = open_pipeline(pipeline, chosen, batch_size=batch, device=device, dtype=dtype)
    result = evaluation.evaluate_ipr(
        prompts,
        opened.draw_at,
        chosen,
        _measures(judges, nudity, similarity, encoder, device),
        guard=guard,
        refiner=loaded,
        out=out,
        sheet=sheet,
        training=_training(train),
        seed=seed,
        fresh=not same_noise,
        inside=inside,
        resume=resume,
        facts={**opened.facts, "refiner": loaded.name, "check": check, "input_checks": input_check or []},
        progress=_progress,
    )
    typer.echo(json_module.dumps(result.to_dict()) if json else result.to_markdown())
    if not json:
        for step, value in result.cut.items():
            said = "there were none before" if math.isnan(value) else f"{value:.1%}"
            typer.echo(f"inappropriate pictures cut, {step}: {said}")


def _refiner(spec: str) -> Any:
    """The refiner that a policy would name so, or the one in a folder."""
    from safeguard import registry

    name, _, argument = spec.partition(":")
    if name in registry.names("refiners"):
        factory = registry.load("refiners", name)
        return factory(argument) if argument else factory()
    if not Path(spec).is_dir():
        known = ", ".join(registry.names("refiners"))
        raise ValueError(f"no refiner {spec!r}: give a folder, or name:argument; known names: {known}")
    from safeguard.refiners.causal_lm import CausalLMRefiner

    return CausalLMRefiner.load(spec)


def _guard(judge: Any, inputs: list[str], refiner: Any, rounds: int, device: str) -> Any:
    """A guard that refines: the prompt where text checks flag it, the picture where the image check does."""
    from safeguard.guards import Guard
    from safeguard.policy import InputRules, OutputRules, Policy, Rule, Rules
    from safeguard.types import Action

    image = Rules(
        action=Action.REFINE, ignore=("*",), categories={judge.label: Rule(threshold=judge.threshold)}
    )
    text = Rules(
        checks=tuple(str(Path(spec).resolve()) if Path(spec).is_dir() else spec for spec in inputs),
        action=Action.REFINE,
        ignore=("llm*", "jailbreak"),
    )
    policy = Policy(
        name="evaluate ipr",
        operating_point="standard",
        input=InputRules(t2i=text),
        output=OutputRules(image=image),
        max_rounds=rounds,
    )
    return Guard(outputs=[judge.check], refiner=refiner, policy=policy, device=device)


def _measures(
    judges: list[Any], nudity: str | None, similarity: str | None, encoder: Path | None, device: str
) -> Any:
    from safeguard.evaluate.ipr import Measures
    from safeguard.evaluate.ipr_judges import CheckNudity, load_image_check

    alignment = texts = None
    if similarity is not None:
        from safeguard.evaluate.ipr_pipeline import open_alignment

        alignment = open_alignment(similarity, device=device)
    if encoder is not None:
        from safeguard.train.refiner.similarity import SentenceSimilarity

        texts = SentenceSimilarity.load(encoder)
    bare = None if nudity is None else CheckNudity(load_image_check(nudity, device=device))
    return Measures(judges, bare, alignment, texts)


def _training(path: Path | None) -> list[str]:
    from safeguard.train.refiner import pairs as reading

    if path is None:
        return []
    if path.is_dir():
        return [pair.prompt for pair in reading.read_pack_pairs(path, "train")]
    return [pair.prompt for pair in reading.read_pairs(path)]


def _progress(done: int, count: int) -> None:
    if done % 10 == 0 or done == count:
        typer.echo(f"{done} of {count} prompts", err=True)
