"""Supervised refiner training: (unsafe prompt, safe rewrite) pairs, and safe prompts that stay.

TRL's SFTTrainer with a LoRA adapter. Loss on the answer only; `whole_sequence_loss` gives the loss of the
papers' released code, which spends most of its weight on the constant instruction (IPR's recipe).
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, PositiveInt

from safeguard.errors import MissingExtra
from safeguard.refiners.template import RefinerTemplate
from safeguard.refiners.torch_lm import TorchLM
from safeguard.train.refiner.examples import answer_end, examples
from safeguard.train.refiner.ordering import batch_order
from safeguard.train.refiner.pairs import (
    Pair,
    digest,
    file_digests,
    filter_pairs,
    is_pack,
    mix,
    read_pack_benign,
    read_pack_pairs,
    read_rows,
    restyled,
)
from safeguard.train.refiner.runs import (
    RefinerResult,
    RunSettings,
    default_template,
    finish_run,
    finite,
    load_base,
    new_adapter,
    open_run,
    quiet,
    score_answers_alone,
    trainer_settings,
)
from safeguard.train.refiner.vision import picture_digest, sees, vision_examples

try:
    from accelerate import PartialState
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
except ImportError as exc:
    raise MissingExtra(exc.name or "trl", "train") from exc

log = logging.getLogger(__name__)


class RefinerSftConfig(RunSettings):
    """Supervised refiner training."""

    batch_size: PositiveInt = 8
    max_tokens: Annotated[int, Field(ge=32, le=8192)] = 384
    """Longest example; longer ones are left out."""
    whole_sequence_loss: bool = False
    """The papers' loss on instruction and prompt too."""
    keep_share: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of examples whose answer is "keep"."""
    hard_texts: bool = True
    """Whether our own harmless look-alikes are among those."""
    minimum_similarity: Annotated[float, Field(ge=-1, le=1)] | None = 0.6
    """Of a rewrite to its prompt; None asks for none and needs no sentence encoder."""
    drop_flagged: bool = True
    """Whether rewrites that the check flags are left out."""
    repeats: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Source -> how often its rows come; 1 where absent."""
    restyle_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of pairs that change between caption and sentence, see `restyled`."""
    validation_rows: Annotated[int, Field(ge=0)] = 200
    template: RefinerTemplate | None = None
    """Instruction in place of the package's. A trained model needs few words; each costs in every call."""


def read_data(data: Path, split: str, config: RefinerSftConfig) -> tuple[list[Pair], list[Pair]]:
    """Pairs to rewrite and pairs that stay: of the pack in a folder, or of one file with both in it.

    A folder without the pack's files is a data set in ToxiClean-IT's form.
    """
    if is_pack(data):
        detox = config.repeats.get("paradetox", 0.0) > 0
        return (
            read_pack_pairs(data, split, detox=detox),
            read_pack_benign(data, split, hard=config.hard_texts),
        )
    rows = [pair for pair in read_rows(data) if pair.split == split]
    return [row for row in rows if row.target is not None], [row for row in rows if row.target is None]


def select(
    rewritten: Sequence[Pair], config: RefinerSftConfig, *, encoder: Path | None = None
) -> tuple[list[Pair], dict[str, int]]:
    """The pairs that pass the recipe's filters; loads the sentence encoder and the check where it has any."""
    options: dict[str, Any] = {}
    if config.minimum_similarity is not None and rewritten:
        from safeguard.train.refiner.similarity import SentenceSimilarity

        options.update(similarity=SentenceSimilarity.load(encoder), minimum=config.minimum_similarity)
    if config.drop_flagged and rewritten:
        from safeguard.train.refiner.judges import load_risk

        risk = load_risk(config.check, config.label, config.threshold)
        options.update(risk=risk, maximum=risk.threshold)
    return filter_pairs(rewritten, **options)


def train_refiner_sft(
    config: RefinerSftConfig,
    data: Path,
    out: Path,
    *,
    encoder: Path | None = None,
    template: RefinerTemplate | None = None,
    resume: bool = False,
    merge: bool = False,
    progress: bool = True,
) -> RefinerResult:
    """Trains an adapter on the data pack in a folder, or on one file of pairs, and writes it to `out`.

    Writes the adapter, `refiner_template.json`, `run.json`, `metrics.json`, a card, `checkpoints/`, and
    `merged/` on request. encoder: folder of the sentence encoder, the installed carrier when None.
    Raises ValueError for data without a pair, a folder that holds another run, and a loss that diverged.
    """
    template = template or config.template or default_template(config.base)
    rewritten, kept = read_data(data, "train", config)
    with PartialState().main_process_first():
        rewritten, dropped = select(rewritten, config, encoder=encoder)
    pairs = mix(rewritten, kept, keep_share=config.keep_share, repeats=config.repeats, seed=config.seed)
    pairs = restyled(pairs, config.restyle_share, seed=config.seed)
    held = _held_out(data, config)
    facts = {
        "recipe": "refiner-sft",
        "config": config.model_dump(mode="json"),
        "files": file_digests(data),
        "pairs": digest(pairs),
        "template": template.version,
    }
    if any(pair.image is not None for pair in pairs):
        facts["pictures"] = picture_digest(pairs)
    checkpoint = open_run(out, facts, steps=config.steps, resume=resume)
    trainer, tokenizer, rows = _trainer(config, pairs, held, out, template, progress=progress)
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = _measured(config, trainer, pairs, len(rows), evaluate=bool(held))
    metrics.update(files=facts["files"], pairs_digest=facts["pairs"], dropped=dropped)
    log.info("refiner trained: steps=%d examples=%d", metrics["steps"], metrics["examples"])
    return finish_run(
        out,
        trainer,
        tokenizer,
        template,
        metrics,
        base=config.base,
        title="Prompt refiner, supervised",
        data=pairs,
        merge=merge,
    )


def _measured(
    config: RefinerSftConfig, trainer: Any, pairs: Sequence[Pair], rows: int, *, evaluate: bool
) -> dict[str, Any]:
    """Seed, counts and losses. rows: examples made of the pairs. evaluate: on held-out pairs as well."""
    losses = finite(trainer.state.log_history, "loss")
    metrics: dict[str, Any] = {
        "seed": config.seed,
        "steps": int(trainer.state.global_step),
        "examples": rows,
        "examples_too_long": len(pairs) - rows,
        "kept": sum(pair.target is None for pair in pairs),
        "sources": dict(sorted(Counter(pair.source for pair in pairs).items())),
        "loss_last": losses[-1] if losses else None,
    }
    if evaluate:
        found = trainer.evaluate()
        metrics["validation_loss"] = float(found["eval_loss"])
        metrics["validation_token_accuracy"] = float(found["eval_mean_token_accuracy"])
    return metrics


def _held_out(data: Path, config: RefinerSftConfig) -> list[Pair]:
    """Validation pairs in the mixture of training, unfiltered."""
    rewritten, kept = read_data(data, "validation", config)
    pairs = mix(rewritten, kept, keep_share=config.keep_share, seed=config.seed)
    return random.Random(config.seed).sample(pairs, min(config.validation_rows, len(pairs)))


def _trainer(
    config: RefinerSftConfig,
    pairs: Sequence[Pair],
    held: Sequence[Pair],
    out: Path,
    template: RefinerTemplate,
    *,
    progress: bool,
) -> tuple[Any, Any, list[dict[str, Any]]]:
    """The trainer, the tokenizer or processor, and the examples."""
    settings = trainer_settings(config, out, progress=progress)
    args = SFTConfig(
        **settings,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        max_length=None,  # examples are made to size
        train_sampling_strategy="sequential",  # the order is ours, see `batch_order`
        dataset_kwargs={"skip_prepare_dataset": True},  # token ids and labels are ours, as served
        remove_unused_columns=False,
        prediction_loss_only=True,
    )
    score_answers_alone()
    model, processing = load_base(config)
    whole = config.whole_sequence_loss
    if sees(processing):
        rows, checked, collate = vision_examples(
            model, processing, template, pairs, held, longest=config.max_tokens, whole=whole
        )
    else:
        lm, collate = TorchLM(model, processing), None
        end = answer_end(lm, model, processing, template)
        rows = examples(lm, template, pairs, end, longest=config.max_tokens, whole=whole)
        checked = examples(lm, template, held, end, longest=config.max_tokens) if held else []
    if not rows:
        raise ValueError(f"no pair of at most {config.max_tokens} tokens to train on, of {len(pairs)}")
    trainer = SFTTrainer(
        model=new_adapter(model, config),
        args=args,
        data_collator=collate,
        train_dataset=_in_order(rows, config),
        eval_dataset=_dataset(checked) if checked else None,
        processing_class=processing,
    )
    return quiet(trainer), processing, rows


def _in_order(rows: Sequence[dict[str, Any]], config: RefinerSftConfig) -> Any:
    """The examples in the order of training, as often as all steps take them."""
    order = batch_order(
        [row["length"] for row in rows],
        [row["kept"] for row in rows],
        size=config.batch_size,
        batches=config.steps * config.accumulate * PartialState().num_processes,
        seed=config.seed,
    )
    return _dataset(rows).select(order)


def _dataset(rows: Sequence[dict[str, Any]]) -> Any:
    """What a batch is made of, without the marks that order it."""
    return Dataset.from_list(
        [{name: value for name, value in row.items() if name not in ("kept", "length")} for row in rows]
    )
