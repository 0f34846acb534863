"""Fine-tunes a causal language model on texts: the loop that makes the toxic twin and the detoxified model.

Runs under `accelerate` (data parallel): every process takes its share of each batch, and the loss is a mean
over the tokens of the whole batch. The order of the texts and every step's random numbers follow from the
seed and the step, so a run that stopped goes on from its checkpoint as if it had not.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeguard.errors import MissingExtra, PackError
from safeguard.packs import canonical_digest
from safeguard.train.unidetox.config import Lora, Tuning

try:
    import torch
    from accelerate import Accelerator
    from safetensors.torch import load_file, save_file
    from torch import Tensor
    from tqdm import tqdm
except ImportError as exc:
    raise MissingExtra(exc.name or "torch", "train") from exc

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of positions that are not learned."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """A finished run: the plain model in evaluation mode, and the mean loss per token of each step."""

    model: Any
    losses: Sequence[float]
    steps: int
    seconds: float
    processes: int


def encode(
    tokenizer: Any,
    texts: Sequence[str],
    max_tokens: int,
    *,
    start: Sequence[int] = (),
    append_end: bool = False,
) -> list[list[int]]:
    """Token ids of each text, `start` before it, cut to max_tokens; the end token only after uncut texts.

    Texts of fewer than two tokens teach nothing and are left out. Raises ValueError when none is left.
    """
    rows = []
    for text in texts:
        ids = [*start, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        if append_end and tokenizer.eos_token_id is not None:
            ids.append(int(tokenizer.eos_token_id))
        rows.append(ids[:max_tokens])
    kept = [row for row in rows if len(row) > 1]
    if not kept:
        raise ValueError("there must be texts of two tokens or more to train on, got none")
    return kept


def collate(
    rows: Sequence[Sequence[int]], pad: int, *, width: int | None = None, unmasked_padding: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask, labels, each (row, token), padded on the right to the longest row or to width.

    Padding is not learned. unmasked_padding: its labels are the pad token, as in the released code, which so
    teaches to end early.
    """
    width = max(map(len, rows)) if width is None else width
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    labels = ids.clone() if unmasked_padding else ids.masked_fill(mask == 0, IGNORED)
    return ids, mask, labels


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods of every known label given what stands before it.

    logits: (row, token, vocabulary). labels: (row, token), IGNORED where not learned.
    """
    flat = logits[:, :-1].float().flatten(0, 1)  # (row x token, vocabulary)
    return torch.nn.functional.cross_entropy(
        flat, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def rate_at(step: int, steps: int, settings: Tuning) -> float:
    """Learning rate of a step, from 0: linear warm-up, then linear decay that ends at 0."""
    warmup = int(settings.warmup_fraction * steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * (steps - step) / max(1, steps - warmup)


def order(count: int, seed: int) -> Iterator[int]:
    """Numbers of texts without end: each epoch a permutation of its own, which follows from the seed."""
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        yield from torch.randperm(count, generator=generator).tolist()
        epoch += 1


def steps_of(settings: Tuning, count: int) -> int:
    """Number of optimiser steps for so many texts."""
    if settings.steps is not None:
        return settings.steps
    return max(1, math.ceil(float(settings.epochs or 0) * count / settings.batch_size))


def add_lora(model: Any, settings: Lora) -> Any:
    """The model with low-rank matrices, the only weights that are trained."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as exc:
        raise MissingExtra("peft", "peft") from exc
    modules = settings.modules if isinstance(settings.modules, str) else list(settings.modules)
    return get_peft_model(
        model,
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=modules,
            task_type="CAUSAL_LM",
        ),
    )


def tune(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    settings: Tuning,
    out: Path,
    *,
    start: Sequence[int] = (),
    unmasked_padding: bool = False,
    identity: Mapping[str, Any] | None = None,
    title: str = "training",
    name: str = "",
) -> Tuned:
    """Trains on the texts and gives back the plain model, adapters merged.

    out: folder of the checkpoint (and of `adapter/`, `step-<n>/`); an unfinished run in it goes on. identity:
    what else decides the run; a checkpoint of another one raises PackError. name: of the model, which the
    adapter's configuration refers to.
    """
    began = time.monotonic()
    accelerator = Accelerator()
    torch.manual_seed(settings.seed)  # of the fresh adapters, the same in every process
    if settings.gradient_checkpointing:
        # the newer name first, the older one is deprecated where both are there
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable()
        model.enable_input_require_grads()
    if settings.lora is not None:
        model = add_lora(model, settings.lora)
    rows = encode(tokenizer, texts, settings.max_tokens, start=start, append_end=settings.append_end)
    loop = _Loop(model, tokenizer, rows, settings, accelerator, out, unmasked_padding)
    loop.identity = canonical_digest(
        {"settings": settings.model_dump(mode="json"), "rows": canonical_digest(rows), **(identity or {})}
    )
    loop.run(title)
    plain = accelerator.unwrap_model(loop.model).eval()
    if settings.lora is not None:
        if accelerator.is_main_process:
            save_adapter(plain, out / "adapter", name)
        plain = plain.merge_and_unload()
    return Tuned(plain, loop.losses, loop.steps, time.monotonic() - began, accelerator.num_processes)


class _Loop:
    """The state of a run."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        rows: Sequence[Sequence[int]],
        settings: Tuning,
        accelerator: Accelerator,
        out: Path,
        unmasked_padding: bool,
    ) -> None:
        if settings.batch_size < accelerator.num_processes:
            raise ValueError(
                f"batch_size must be at least the number of processes, got {settings.batch_size} "
                f"for {accelerator.num_processes}"
            )
        self.settings, self.accelerator, self.out, self.rows = settings, accelerator, out, rows
        self.tokenizer, self.unmasked_padding = tokenizer, unmasked_padding
        end = tokenizer.eos_token_id
        pad = end if unmasked_padding or tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.pad = int(pad if pad is not None else 0)
        self.width = max(map(len, rows)) if unmasked_padding else None
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=accelerator.device.type in ("cpu", "cuda"),  # else a step is many passes over all weights
        )
        self.model, self.optimizer = accelerator.prepare(model.train(), optimizer)
        self.steps = steps_of(settings, len(rows))
        self.losses: list[float] = []
        self.identity = ""

    def run(self, title: str) -> None:
        """Trains to the last step."""
        self.load()
        size, first = self.settings.batch_size, len(self.losses)
        numbers = order(len(self.rows), self.settings.seed)
        for _ in range(first * size):
            next(numbers)
        bar = tqdm(
            total=self.steps,
            initial=first,
            desc=title,
            unit="step",
            mininterval=2,
            disable=not self.accelerator.is_main_process,
        )
        with bar:
            for step in range(first, self.steps):
                self.losses.append(self.train_step(step, [self.rows[next(numbers)] for _ in range(size)]))
                bar.update()
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
                self.keep(step + 1)

    def keep(self, step: int) -> None:
        """Saves what is to be saved after so many steps."""
        if step % self.settings.checkpoint_every == 0 or step == self.steps:
            self.save()
        if step in self.settings.keep_at and step != self.steps and self.accelerator.is_main_process:
            save_snapshot(
                self.accelerator.unwrap_model(self.model), self.tokenizer, self.out / f"step-{step}"
            )

    def train_step(self, step: int, batch: Sequence[Sequence[int]]) -> float:
        """One step of the optimiser; the mean loss per token over all processes."""
        acc, settings = self.accelerator, self.settings
        torch.manual_seed((settings.seed * 1_000_003 + step) * 1009 + acc.process_index)  # of dropout
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(step, self.steps, settings)
        tokens = sum((self.width or len(row)) - 1 for row in batch)
        mine = sorted(batch[acc.process_index :: acc.num_processes], key=len)  # so that little is padded
        size = settings.micro_batch_size or len(mine)
        total = torch.zeros((), device=acc.device)
        for at in range(0, len(mine), size):
            ids, mask, labels = collate(
                mine[at : at + size], self.pad, width=self.width, unmasked_padding=self.unmasked_padding
            )
            with torch.autocast(acc.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                logits = self.model(
                    input_ids=ids.to(acc.device), attention_mask=mask.to(acc.device), use_cache=False
                ).logits
            loss = token_loss(logits, labels.to(acc.device)) / tokens
            acc.backward(loss * acc.num_processes)  # data parallelism takes the mean over processes
            total += loss.detach()
        acc.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        found = float(acc.reduce(total, "sum"))
        if not math.isfinite(found):
            raise ValueError(f"the loss is {found} at step {step}; use a lower learning_rate")
        return found

    def save(self) -> None:
        """Trained weights and the optimiser's state, written aside and moved into place."""
        if not self.accelerator.is_main_process:
            return
        part, folder = self.out / "checkpoint.part", self.out / "checkpoint"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        plain = self.accelerator.unwrap_model(self.model)
        trained = {n: p.detach().contiguous() for n, p in plain.named_parameters() if p.requires_grad}
        save_file(trained, part / "model.safetensors")
        torch.save(self.optimizer.state_dict(), part / "optimizer.pt")
        state = {"identity": self.identity, "losses": self.losses}
        (part / "state.json").write_text(json.dumps(state), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)

    def load(self) -> None:
        """Goes back to the checkpoint in `out`, if there is one."""
        folder = self.out / "checkpoint"
        if not (folder / "state.json").is_file():
            return
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["identity"] != self.identity:
            raise PackError(
                f"the checkpoint in {self.out} is of other settings, texts or models; give a new folder"
            )
        plain = self.accelerator.unwrap_model(self.model)
        saved = load_file(folder / "model.safetensors")
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(saved[name])
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        self.losses = list(state["losses"])
        log.info("resumed at step %d of %d", len(self.losses), self.steps)


def save_adapter(model: Any, folder: Path, name: str) -> None:
    """The low-rank matrices alone, in bfloat16, with their configuration: what `PeftModel` loads."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model)
    small = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in state.items()}
    save_file(small, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = copy.deepcopy(model.peft_config["default"])
    settings.base_model_name_or_path = name  # in place of the folder that it was loaded from
    settings.inference_mode = True
    settings.save_pretrained(folder)


def save_snapshot(model: Any, tokenizer: Any, folder: Path) -> None:
    """The model as it is in the middle of a run, as ordinary weights; the run is not changed."""
    plain = copy.deepcopy(model)
    if hasattr(plain, "merge_and_unload"):
        plain = plain.merge_and_unload()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
