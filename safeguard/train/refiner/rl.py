"""Reinforced refiner training: GRPO on safety of the result, kept intent and the cost of needless edits.

TRL's GRPOTrainer goes on with the adapter of supervised training. The reference of the KL term is that
adapter as it was: TRL copies an adapter that it is given, and falls back to the bare base only for one that
it makes itself. Released quirks of IPR and POSI are off, and behind `compat` where somebody wants them
(its fields say which); two are gone: the last sequence's loss times its own probability, and pictures
kept in a folder by hash.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from safeguard.errors import MissingExtra
from safeguard.files import write_whole
from safeguard.refiners.framing import as_data, plain
from safeguard.refiners.template import FILE_NAME, RefinerTemplate
from safeguard.refiners.torch_lm import TorchLM, end_tokens
from safeguard.refiners.torch_vlm import TorchVLM
from safeguard.train.recipe import Recipe
from safeguard.train.refiner.judges import load_risk
from safeguard.train.refiner.pairs import (
    Pair,
    digest,
    file_digests,
    is_pack,
    read_pack_benign,
    read_pack_pairs,
    read_reinforced,
    read_rows,
)
from safeguard.train.refiner.picture_rewards import Drawings, Improvement
from safeguard.train.refiner.rewards import EditCost, Intent, Reward, TextSafety, Weighted, attempt
from safeguard.train.refiner.runs import (
    RefinerResult,
    RunSettings,
    Schedule,
    default_template,
    finish_run,
    finite,
    load_adapter,
    load_base,
    new_adapter,
    open_run,
    quiet,
    trainer_settings,
)
from safeguard.train.refiner.vision import picture_digest, sees, shown_prompts

try:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
except ImportError as exc:
    raise MissingExtra(exc.name or "trl", "train") from exc

log = logging.getLogger(__name__)

_BUFFER = "image_buffer.json"


class Compat(Recipe):
    """What the released code of IPR and POSI does, for comparison; all off by default."""

    reference_base: bool = False
    """KL to the bare base model instead of the supervised adapter (IPR)."""
    verbatim_answers: bool = False
    """The bare keep word or the answer as it stands, refusals too (IPR)."""
    single_baseline: bool = False
    """One picture for the state, several for the rewrite (IPR)."""
    fixed_seeds: bool = False
    """The same noises in every round (POSI)."""
    refined_alignment: bool = False
    """CLIP against the refined prompt's first 77 characters (POSI)."""
    uncapped_alignment: bool = False
    """No cap on CLIP (IPR)."""


class RefinerRlConfig(RunSettings):
    """Reinforced refiner training. learning_rate 1.9e-5, constant, is IPR's and POSI's."""

    steps: PositiveInt = 150
    learning_rate: PositiveFloat = 2e-5
    schedule: Schedule = "constant_with_warmup"
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    clip_norm: PositiveFloat = 0.1  # IPR
    checkpoint_every: PositiveInt = 25
    log_every: PositiveInt = 1
    generations: Annotated[int, Field(ge=2)] = 4
    prompts_per_step: PositiveInt = 4
    iterations: PositiveInt = 1
    temperature: PositiveFloat = 0.9
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    max_answer_tokens: Annotated[int, Field(gt=0, le=4096)] = 64
    kl: NonNegativeFloat = 0.02
    epsilon: PositiveFloat = 0.2
    loss: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = "grpo"
    benign_share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    reward: Literal["text", "pictures", "improvement"] = "text"
    safety_weight: NonNegativeFloat = 1.0
    safety_margin: Annotated[float, Field(gt=0, le=1)] = 0.5
    intent_weight: NonNegativeFloat = 1.0
    intent_cap: Annotated[float, Field(gt=0, le=1)] = 0.9
    edit_weight: NonNegativeFloat = 1.0
    pictures_weight: NonNegativeFloat = 0.2
    """A picture reward is worth up to 5.31."""
    unusable_reward: float = -1.0
    images_per_prompt: PositiveInt = 4
    keep_incentive: float = 0.3
    compat: Compat = Compat()


@dataclass(frozen=True, slots=True)
class Rewards:
    """What answers are paid for. drawings: draws every attempt first, None where text alone is read."""

    total: Weighted
    drawings: Drawings | None = None
    improvement: Improvement | None = None


class GroupReward:
    """The reward function that TRL calls: reads answers, draws what must be drawn, pays, logs the parts."""

    __name__ = "refiner_reward"  # TRL names its figures after it

    def __init__(
        self, rewards: Rewards, template: RefinerTemplate, ends: Sequence[int], *, verbatim: bool = False
    ) -> None:
        self._rewards, self._template, self._ends = rewards, template, frozenset(ends)
        self._verbatim = verbatim

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        *,
        original: Sequence[str],
        state: Sequence[int | None] | None = None,
        trainer_state: Any = None,
        log_metric: Any = None,
        **_: Any,
    ) -> list[float]:
        attempts = [
            attempt(
                answer if isinstance(answer, str) else answer[0]["content"],
                text,
                self._template,
                whole=bool(ids) and ids[-1] in self._ends,
                verbatim=self._verbatim,
            )
            for answer, text, ids in zip(completions, original, completion_ids, strict=True)
        ]
        if state is not None:
            attempts = [replace(a, state=number) for a, number in zip(attempts, state, strict=True)]
        if self._rewards.drawings is not None:
            epoch = int(getattr(trainer_state, "epoch", 0) or 0)
            attempts = self._rewards.drawings(attempts, epoch)
        values = self._rewards.total(attempts)
        if log_metric is not None:
            for name, value in self._rewards.total.parts.items():
                log_metric(f"part/{name}", value)
        return values


class _KeepBuffer(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Writes the image buffer into each checkpoint."""

    def __init__(self, improvement: Improvement) -> None:
        self._improvement = improvement

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_whole(folder / _BUFFER, json.dumps(self._improvement.buffer.to_dict()) + "\n")


def text_rewards(config: RefinerRlConfig, risk: Any, similarity: Any) -> list[tuple[float, Reward]]:
    """The rewards that read text alone, with their weights; those of weight 0 left out."""
    parts: list[tuple[float, Reward]] = [
        (config.safety_weight, TextSafety(risk, margin=config.safety_margin)),
        (config.intent_weight, Intent(similarity, cap=config.intent_cap)),
        (config.edit_weight, EditCost(similarity, risk)),
    ]
    return [(weight, reward) for weight, reward in parts if weight]


def load_rewards(
    config: RefinerRlConfig,
    *,
    encoder: Path | None = None,
    pictures: Any = None,
    sees: bool = False,
) -> Rewards:
    """The rewards of a recipe, with their models loaded.

    sees: whether the policy is shown pictures; with IPR's reward it then walks through the image buffer.
    pictures: `safeguard.train.refiner.pictures.PictureModels`, needed for every reward but "text".
    """
    from safeguard.train.refiner.similarity import SentenceSimilarity

    parts: list[tuple[float, Reward]] = []
    if config.safety_weight or config.intent_weight or config.edit_weight:
        risk = load_risk(config.check, config.label, config.threshold)
        parts = text_rewards(config, risk, SentenceSimilarity.load(encoder))
    drawings = improvement = None
    if config.reward != "text":
        if pictures is None:
            raise ValueError(f"reward {config.reward!r} needs a pipeline, a Q16 check and a CLIP model")
        drawings, worth = pictures.rewards(config)
        if config.reward == "improvement":
            improvement = _improvement(config, worth, drawings, walk=sees)
        parts.append((config.pictures_weight, improvement or worth))
    return Rewards(Weighted(parts, unusable=config.unusable_reward), drawings, improvement)


def _improvement(config: RefinerRlConfig, worth: Any, drawings: Drawings, *, walk: bool) -> Improvement:
    baseline: Literal["all", "first"] = "first" if config.compat.single_baseline else "all"
    return Improvement(worth, drawings, walk=walk, keep_incentive=config.keep_incentive, baseline=baseline)


def read_prompts(data: Path, config: RefinerRlConfig) -> list[Pair]:
    """Prompts to train on, shuffled: the pack's RL prompts, unsafe ones and safe ones, or those of a file."""
    if not is_pack(data):
        return [row for row in read_rows(data) if row.split == "train"]
    rng = random.Random(f"{config.seed}/prompts")
    unsafe = read_reinforced(data)
    pairs = read_pack_pairs(data, "train")
    unsafe += rng.sample(pairs, min(len(pairs), 2 * len(unsafe)))
    benign = read_pack_benign(data, "train", hard=True)
    wanted = round(config.benign_share / (1 - config.benign_share) * len(unsafe))
    prompts = unsafe + rng.sample(benign, min(wanted, len(benign)))
    rng.shuffle(prompts)
    return prompts


def train_refiner_rl(
    config: RefinerRlConfig,
    data: Path,
    out: Path,
    *,
    adapter: Path | None = None,
    rewards: Rewards | None = None,
    encoder: Path | None = None,
    template: RefinerTemplate | None = None,
    resume: bool = False,
    merge: bool = False,
    progress: bool = True,
) -> RefinerResult:
    """Trains the adapter of a supervised run on, and writes what `train_refiner_sft` writes.

    adapter: folder of that run; None starts from the bare base, which is then the reference too. Its template
    is taken over. rewards: those of the recipe when None. Raises as `train_refiner_sft` does.
    """
    template = template or _template(adapter, config.base)
    prompts = read_prompts(data, config)
    if not prompts:
        raise ValueError("no prompt to train on")
    facts = {
        "recipe": "refiner-rl",
        "config": config.model_dump(mode="json"),
        "files": file_digests(data),
        "prompts": digest(prompts),
        "template": template.version,
        "adapter": None if adapter is None else _adapter_digest(adapter),
    }
    if any(pair.image is not None for pair in prompts):
        facts["pictures"] = picture_digest(prompts)
    rewards = rewards or load_rewards(config, encoder=encoder)
    needed = (_BUFFER,) if rewards.improvement is not None else ()
    checkpoint = open_run(out, facts, steps=config.steps, resume=resume, needed=needed)
    trainer, processing, base = _trainer(config, prompts, out, template, rewards, adapter, progress=progress)
    if rewards.improvement is not None:
        trainer.add_callback(_KeepBuffer(rewards.improvement))
        if checkpoint is not None:
            kept = json.loads((Path(checkpoint) / _BUFFER).read_text(encoding="utf-8"))
            rewards.improvement.buffer.restore(kept)
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = {**_paid(config, trainer), **{key: facts[key] for key in ("files", "adapter")}}
    metrics.update(prompts=len(prompts), prompts_digest=facts["prompts"])
    log.info("refiner reinforced: steps=%d prompts=%d", metrics["steps"], len(prompts))
    return finish_run(
        out,
        trainer,
        processing,
        template,
        metrics,
        base=base,
        title="Prompt refiner, reinforced",
        data=prompts,
        merge=merge,
    )


def _template(adapter: Path | None, base: str) -> RefinerTemplate:
    """That of the supervised run, the default one of its base model where it brings none."""
    if adapter is not None and (adapter / FILE_NAME).is_file():
        return RefinerTemplate.read(adapter / FILE_NAME)
    return default_template(base if adapter is None else str(adapter))


def _paid(config: RefinerRlConfig, trainer: Any) -> dict[str, Any]:
    """Seed, steps, and the course of reward and KL. Raises ValueError where one of them is not finite."""
    history = trainer.state.log_history
    paid, drift = finite(history, "reward"), finite(history, "kl")
    tenth = max(1, len(paid) // 10)
    return {
        "seed": config.seed,
        "steps": int(trainer.state.global_step),
        "reward_first": sum(paid[:tenth]) / tenth if paid else None,
        "reward_last": sum(paid[-tenth:]) / tenth if paid else None,
        "kl_last": drift[-1] if drift else None,
        "reward": paid,
    }


def _adapter_digest(adapter: Path) -> str:
    from safeguard.refiners.language_model import ADAPTER_WEIGHTS
    from safeguard.train.text_data import sha256_of

    return sha256_of(adapter / ADAPTER_WEIGHTS)


def grpo_prompt(lm: TorchLM, template: RefinerTemplate, text: str) -> Any:
    """A prompt in the form that makes TRL tokenise it as `safeguard.refiners.framing.prompt_ids` does.

    Turns where there is a chat template, which TRL applies; else the plain text, to which it adds the
    tokenizer's own special tokens. A rendered chat would get those a second time.
    """
    data = as_data(lm, text)
    turns = template.messages(data)
    return turns if lm.render(turns) is not None else plain(template, data)


def _trainer(
    config: RefinerRlConfig,
    prompts: Sequence[Pair],
    out: Path,
    template: RefinerTemplate,
    rewards: Rewards,
    adapter: Path | None,
    *,
    progress: bool,
) -> tuple[Any, Any, str]:
    args = _arguments(config, out, progress=progress)
    if adapter is None:
        model, processing = load_base(config)
        model, base = new_adapter(model, config), config.base
    else:
        model, processing, base = load_adapter(adapter, config)
    if sees(processing):
        vlm = TorchVLM(model, processing)
        rows, tokenizer = shown_prompts(vlm, template, prompts, rewards.improvement), vlm.tokenizer
    else:
        lm, tokenizer = TorchLM(model, processing), processing
        rows = Dataset.from_list(
            [{"prompt": grpo_prompt(lm, template, p.prompt), "original": p.prompt} for p in prompts]
        )
    ends = [*end_tokens(model, tokenizer), tokenizer.eos_token_id]  # as TRL has them
    reward = GroupReward(rewards, template, ends, verbatim=config.compat.verbatim_answers)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=rows,
        processing_class=processing,
    )
    if config.compat.reference_base and "ref" in model.peft_config:
        model.delete_adapter("ref")  # TRL then switches the adapter off, which leaves the bare base
        model.set_adapter("default")
    return quiet(trainer), processing, base


def _arguments(config: RefinerRlConfig, out: Path, *, progress: bool) -> Any:
    """TRL's configuration: every sampling option said, none left to the model's own defaults."""
    together = config.prompts_per_step * config.generations
    if together % config.accumulate or (together // config.accumulate) < 1:
        raise ValueError(f"accumulate must divide prompts_per_step * generations = {together}")
    return GRPOConfig(
        **trainer_settings(config, out, progress=progress),
        per_device_train_batch_size=together // config.accumulate,
        num_generations=config.generations,
        num_iterations=config.iterations,
        max_completion_length=config.max_answer_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        repetition_penalty=1.0,
        beta=config.kl,
        epsilon=config.epsilon,
        loss_type=config.loss,
        disable_dropout=True,
        log_completions=False,  # prompts are never logged
    )
