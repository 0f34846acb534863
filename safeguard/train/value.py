"""Trains the value model of rectification: how harmful a text will be when it is finished, token by token.

A language model continues prompts, a check scores what it wrote, and a small trunk with a head learns
backwards from the scores: Q(text, token) is -1 where the finished text was harmful, 0 where it was not, and
in between what the next token is worth. Source: Cao et al. 2023 (SARSA with a moving target head, MSE).
Sampling goes on where it stopped, and so does training.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from safeguard.decoding.value_model import ValueModel
from safeguard.errors import MissingExtra
from safeguard.evaluate.metrics import auroc
from safeguard.train.recipe import Recipe, versions
from safeguard.train.text_data import sha256_of
from safeguard.train.value_samples import Sample, SampleSettings, kept, read_prompts, sample_all

try:
    import torch
    from accelerate import Accelerator
    from safetensors.torch import load_file, save_file
    from torch import Tensor, nn
    from tqdm import tqdm
except ImportError as exc:
    raise MissingExtra(exc.name or "torch", "train") from exc

log = logging.getLogger(__name__)


class ValueConfig(Recipe):
    """Everything that decides the weights, but the prompts."""

    model: str = "smollm2-135m-instruct"
    """Folder or hub name of the language model to be guided, or the embedded one."""
    seed: int = 0
    sampling: SampleSettings = SampleSettings()
    keep: Literal["extremes", "all"] = "extremes"
    """extremes: of each prompt the least and the most harmful continuation."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """A continuation scored this much or more is harmful: its reward is -1, else 0."""
    targets: Literal["td", "returns"] = "td"
    """td: what the target head says of the next token; returns: the discounted reward itself."""
    discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    layers: PositiveInt | None = None
    """How many layers of the language model the trunk keeps; None for all."""
    width: PositiveInt | None = None
    """Of the head's inner layer; None for twice the hidden size, which is much with large vocabularies."""
    learning_rate: PositiveFloat = 3e-4
    batch: PositiveInt = 64
    epochs: PositiveInt = 3
    warmup_steps: PositiveInt = 500
    polyak: Annotated[float, Field(gt=0, le=1)] = 0.1
    """How far the target head moves to the head after each update."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the prompts that is measured on and not trained on."""
    checkpoint_every: PositiveInt = 200
    precision: Literal["no", "bf16"] = "no"


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where the weights lie and what was measured."""

    folder: Path
    metrics: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Actions:
    """Samples as tensors.

    ids, mask: (row, token). row, place: (action,): which state an action was taken in. token: (action,).
    last: (action,), whether it ended its text. reward: (action,), of the finished text, -1 or 0. left:
    (action,), actions until the end.
    """

    ids: Tensor
    mask: Tensor
    row: Tensor
    place: Tensor
    token: Tensor
    last: Tensor
    reward: Tensor
    left: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample], threshold: float) -> Actions:
        """All actions of some samples, text by text."""
        width = max(len(s.prompt) + len(s.next) for s in samples)
        ids, mask = torch.zeros(2, len(samples), width, dtype=torch.long)
        taken: list[tuple[int, int, int, bool, float, int]] = []
        for i, sample in enumerate(samples):
            tokens = [*sample.prompt, *sample.next]
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = 1
            reward = -1.0 if sample.score >= threshold else 0.0
            first, end = len(sample.prompt), len(tokens)
            taken += [(i, t - 1, tokens[t], t == end - 1, reward, end - 1 - t) for t in range(first, end)]
        row, place, token, last, rewards, left = zip(*taken, strict=True)
        columns = [torch.tensor(column) for column in (row, place, token, last, rewards, left)]
        return cls(ids, mask, *columns)

    def to(self, device: Any) -> Actions:
        """The same on a device."""
        return Actions(*(getattr(self, name).to(device) for name in self.__slots__))


def action_values(head: nn.Sequential, states: Tensor, tokens: Tensor) -> Tensor:
    """Q (action,) of tokens taken in states (action, hidden), without the rest of the vocabulary."""
    inner = head[1](head[0](states))
    wanted = head[2]
    return -torch.sigmoid(((inner * wanted.weight[tokens]).sum(-1) + wanted.bias[tokens]).float())


def td_targets(next_values: Tensor, actions: Actions, discount: float) -> Tensor:
    """Targets (action,): the reward at the end, before it what the target head says of the next action.

    next_values: (action,), the target head's Q of each action; that of the one behind counts, discounted.
    Source: SARSA, clipped to [-1, 0] as in Cao et al. 2023.
    """
    behind = torch.cat([next_values[1:], next_values.new_zeros(1)])
    return torch.where(actions.last, actions.reward, (discount * behind).clamp(-1, 0))


class ValueLoss(nn.Module):  # type: ignore[misc]  # torch is not followed
    """The value model, its target head, and their loss on a batch of actions."""

    def __init__(self, model: ValueModel, config: ValueConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.target = copy.deepcopy(model.head).requires_grad_(False)

    def forward(self, actions: Actions) -> Tensor:
        """Mean squared error, a scalar."""
        states = self.model.hidden(actions.ids, actions.mask)[actions.row, actions.place]
        values = action_values(self.model.head, states, actions.token)
        if self.config.targets == "returns":
            targets = actions.reward * self.config.discount**actions.left
        else:
            with torch.no_grad():
                ahead = action_values(self.target, states, actions.token)
                targets = td_targets(ahead, actions, self.config.discount)
        return nn.functional.mse_loss(values, targets)

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
    def follow(self) -> None:
        """Move the target head towards the head."""
        for old, new in zip(self.target.parameters(), self.model.head.parameters(), strict=True):
            old.lerp_(new, self.config.polyak)


def small_trunk(model: Any, layers: int | None) -> Any:
    """A copy of a causal model's trunk with its first layers only. Raises ValueError for more than it has."""
    trunk = copy.deepcopy(model.base_model)
    name = next((n for n in ("layers", "h") if isinstance(getattr(trunk, n, None), nn.ModuleList)), None)
    if layers is None:
        return trunk
    if name is None:
        raise ValueError(f"{type(trunk).__name__} cannot be shortened; leave layers out")
    stack = getattr(trunk, name)
    if layers > len(stack):
        raise ValueError(f"layers must be at most the {len(stack)} of {type(trunk).__name__}, got {layers}")
    setattr(trunk, name, stack[:layers])
    trunk.config.num_hidden_layers = layers
    if getattr(trunk.config, "layer_types", None) is not None:
        trunk.config.layer_types = trunk.config.layer_types[:layers]
    return trunk


def train_value(
    config: ValueConfig,
    prompts: Path,
    out: Path,
    *,
    language_model: tuple[Any, Any],
    check: Any,
    progress: bool | None = None,
) -> TrainResult:
    """Samples, scores and trains; writes the value model, its tokenizer, samples.jsonl and metrics.json.

    language_model: the model to be guided and its tokenizer. check: a text check that scores what it writes.
    A run that stopped goes on in the same folder; a folder of other prompts or settings is refused.
    progress: bars on stderr; by default only on a terminal. Raises ValueError when no text was harmful, or
    all were: there is nothing to learn then.
    """
    accelerator = Accelerator()  # the precision is ours: a process has one state, whoever trained before
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = language_model
    model = model.to(accelerator.device)
    found = read_prompts(prompts, tokenizer, config.sampling, config.seed)
    if accelerator.is_main_process:
        sample_all(model, tokenizer, check, found, config.sampling, config.seed, out, progress=progress)
    accelerator.wait_for_everyone()
    samples = sample_all(model, tokenizer, check, found, config.sampling, config.seed, out, progress=False)
    learnt, measured = _split(samples, config)
    torch.manual_seed(config.seed)
    vocabulary = int(model.config.get_text_config().vocab_size)
    value = ValueModel(small_trunk(model, config.layers).float(), vocabulary, width=config.width)
    del model
    run = _Run(accelerator, ValueLoss(value, config), config, learnt, out)
    history = run.loop(progress=progress)
    held_out = measure(value, measured, config) if measured else {}
    metrics = {
        "config": config.model_dump(mode="json") | {"model": Path(config.model).name},
        "check": {"name": check.name, "digest": getattr(check, "digest", None)},
        "data": {prompts.name: sha256_of(prompts), "samples.jsonl": sha256_of(out / "samples.jsonl")},
        "prompts": len(found),
        "samples": len(samples),
        "harmful": sum(s.score >= config.threshold for s in samples) / len(samples),
        "trained_on": len(learnt),
        "versions": versions("torch", "transformers", "accelerate", "numpy"),
        "wall_s": round(time.monotonic() - started, 1),
        "history": history,
        "held_out": held_out,
    }
    if accelerator.is_main_process:
        value.save(out)
        tokenizer.save_pretrained(out)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return TrainResult(out, metrics)


def _split(samples: Sequence[Sample], config: ValueConfig) -> tuple[list[Sample], list[Sample]]:
    """Samples to learn from and samples to measure on, by prompt."""
    numbers = sorted({s.number for s in samples})
    random.Random(f"{config.seed}/held out").shuffle(numbers)
    out = set(numbers[: max(1, round(len(numbers) * config.held_out))]) if len(numbers) > 1 else set()
    chosen = kept(samples) if config.keep == "extremes" else list(samples)
    learnt = [s for s in chosen if s.number not in out]
    harmful = sum(s.score >= config.threshold for s in learnt)
    if not 0 < harmful < len(learnt):
        raise ValueError(
            f"{harmful} of {len(learnt)} continuations were harmful, so there is nothing to learn; "
            "give other prompts, more continuations or another threshold"
        )
    return learnt, [s for s in samples if s.number in out]


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def measure(model: ValueModel, samples: Sequence[Sample], config: ValueConfig) -> dict[str, float]:
    """How well the values tell harmful continuations from the others, at the first token and at the last."""
    model.eval()
    actions = Actions.of(samples, config.threshold).to(model.device)
    states = model.hidden(actions.ids, actions.mask)[actions.row, actions.place]
    values = action_values(model.head, states, actions.token)
    error = float(nn.functional.mse_loss(values, actions.reward * config.discount**actions.left))
    found = {"mse": round(error, 5)}
    first = torch.cat([actions.last.new_ones(1), actions.last[:-1]])
    for name, where in (("first", first), ("last", actions.last)):
        truth = (actions.reward[where] < 0).cpu().numpy()
        if 0 < truth.sum() < len(truth):
            scores = -values[where].cpu().numpy().astype(np.float64)
            found[f"auroc_{name}"] = round(float(auroc(truth, scores)), 4)
    return found


class _Run:
    """The state of a training run."""

    def __init__(
        self, accelerator: Any, loss: ValueLoss, config: ValueConfig, samples: Sequence[Sample], out: Path
    ) -> None:
        self.accelerator, self.plain, self.config, self.out = accelerator, loss, config, out
        self.samples = samples
        self.per_epoch = math.ceil(len(samples) / config.batch)
        self.steps = self.per_epoch * config.epochs
        learnt = [p for p in loss.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learnt, lr=config.learning_rate, weight_decay=0.0)
        self.loss, self.optimizer = accelerator.prepare(loss, optimizer)
        self.step = 0
        self.history: list[dict[str, float]] = []

    def loop(self, *, progress: bool | None) -> list[dict[str, float]]:
        """Train to the end; returns the losses on the way."""
        self._load()
        self.loss.train()
        losses: list[float] = []
        disable = None if progress is None else not progress
        with tqdm(total=self.steps, initial=self.step, disable=disable, desc="value") as bar:
            while self.step < self.steps:
                losses.append(self._update(self._batch()))
                self.step += 1
                bar.update()
                if self.step % 50 == 0 or self.step == self.steps:
                    self.history.append({"step": self.step, "loss": round(sum(losses) / len(losses), 6)})
                    losses = []
                if self.step % self.config.checkpoint_every == 0:
                    self._save()
        return self.history

    def _batch(self) -> list[Sample]:
        epoch, place = divmod(self.step, self.per_epoch)
        order = list(range(len(self.samples)))
        random.Random(f"{self.config.seed}/{epoch}").shuffle(order)
        whole = [self.samples[i] for i in order[place * self.config.batch :][: self.config.batch]]
        mine = whole[self.accelerator.process_index :: self.accelerator.num_processes]
        return mine or whole[:1]  # every process must take part

    def _update(self, batch: Sequence[Sample]) -> float:
        warmup = min(self.config.warmup_steps, max(1, self.steps // 2))
        rate = min(1.0, (self.step + 1) / warmup, (self.steps - self.step) / max(1, self.steps - warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rate
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)  # of dropout, also after a resumption
        half = self.config.precision == "bf16"
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=half):
            loss = self.loss(Actions.of(batch, self.config.threshold).to(self.accelerator.device))
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.loss.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.plain.follow()
        return float(loss.detach())

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        folder = self.out / "checkpoint"
        folder.mkdir(exist_ok=True)
        weights = {n: v.detach().contiguous().clone() for n, v in self.plain.state_dict().items()}
        save_file(weights, folder / f"{self.step}-model.safetensors")
        torch.save(self.optimizer.state_dict(), folder / f"{self.step}-optimizer.pt")
        state = {"step": self.step, "history": self.history, "settings": self.config.model_dump(mode="json")}
        part = folder / "state.json.part"
        part.write_text(json.dumps(state), encoding="utf-8")
        part.replace(folder / "state.json")  # from here on the new files count
        for old in folder.glob("*-*"):
            if not old.name.startswith(f"{self.step}-"):
                old.unlink()

    def _load(self) -> None:
        folder = self.out / "checkpoint"
        if not (folder / "state.json").is_file():
            return
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["settings"] != self.config.model_dump(mode="json"):
            raise ValueError(f"{self.out.name} holds a run with other settings; give a new folder")
        self.step, self.history = state["step"], state["history"]
        self.plain.load_state_dict(load_file(folder / f"{self.step}-model.safetensors"))
        self.optimizer.load_state_dict(torch.load(folder / f"{self.step}-optimizer.pt", weights_only=True))
        log.info("resumed at step %d", self.step)
