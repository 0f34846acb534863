"""Model Surgery: finds the direction of a behaviour and how far a model's gates may be moved along it.

A linear probe on the mean of the last hidden states tells texts of the behaviour from others; its weight row
is the direction. The rows of all MLP gates that point away from it most are moved, as far as the perplexity
on harmless text allows. Source: Wang et al. 2024. No gradient ever reaches the model.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from safeguard.decoding.surgery import WeightEdit, strongest
from safeguard.errors import MissingExtra
from safeguard.evaluate.metrics import auroc
from safeguard.train.recipe import Recipe, versions
from safeguard.train.text_data import read_jsonl, sha256_of

try:
    import torch
    from torch import Tensor, nn
    from tqdm import tqdm
except ImportError as exc:
    raise MissingExtra(exc.name or "torch", "train") from exc

log = logging.getLogger(__name__)


class SurgeryConfig(Recipe):
    """Everything that decides the edit, but the texts."""

    model: str = "smollm2-135m-instruct"
    """Folder or hub name of a model with gated MLPs, or the embedded one."""
    seed: int = 0
    texts: PositiveInt = 4000
    """Labelled texts for the probe, at most, half of each label."""
    neutral_texts: PositiveInt = 200
    max_tokens: PositiveInt = 128
    batch: PositiveInt = 16
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    epochs: PositiveInt = 20
    learning_rate: PositiveFloat = 1e-4
    rows: PositiveInt | None = None
    """Rows that are moved; None for four times the hidden size, as in the paper."""
    alpha: PositiveFloat | None = None
    """How far; None for as far as the budget allows. The paper has 1.08 for LLaMA2-7B."""
    most_alpha: PositiveFloat = 16.0
    perplexity_budget: Annotated[float, Field(ge=1)] = 1.1
    """Times the perplexity of the model as it was."""
    bisection_steps: Annotated[int, Field(ge=1, le=40)] = 8


@dataclass(frozen=True, slots=True)
class SurgeryResult:
    """The edit, where it lies, and what was measured."""

    edit: WeightEdit
    folder: Path
    metrics: Mapping[str, Any]


def train_surgery(
    config: SurgeryConfig,
    labelled: Path,
    neutral: Path,
    out: Path,
    *,
    language_model: tuple[Any, Any],
    progress: bool | None = None,
) -> SurgeryResult:
    """Writes edit.safetensors and metrics.json; the model is as it was when this returns.

    labelled: JSON lines with `text` and `label` (1 for the behaviour, else 0); others are left out.
    neutral: JSON lines with `text`, for the perplexity. Raises ValueError for files without such rows, and
    for a model that has no gates.
    """
    started = time.monotonic()
    model, tokenizer = language_model
    out.mkdir(parents=True, exist_ok=True)
    texts, labels = _labelled(labelled, config)
    states = pooled_states(model, tokenizer, texts, config, progress=progress)
    cut = max(1, round(len(texts) * config.held_out))
    direction, bias = fit_probe(states[cut:], labels[cut:], config)
    count = config.rows or 4 * states.shape[1]
    edit = WeightEdit.select(model, direction, count)
    plain = [row["text"] for row in read_jsonl(neutral) if str(row.get("text") or "").strip()]
    if not plain:
        raise ValueError(f"{neutral.name} has no rows with a 'text'")
    random.Random(f"{config.seed}/neutral").shuffle(plain)
    plain = plain[: config.neutral_texts]

    def cost(tried: WeightEdit) -> float:
        with tried.applied(model):
            found: float = perplexity(model, tokenizer, plain, config)
        log.info("alpha %.4f perplexity %.4f", tried.alpha, found)
        return found

    before = cost(edit)
    alpha = config.alpha
    if alpha is None:
        budget = before * config.perplexity_budget
        alpha = strongest(edit, cost, budget, most=config.most_alpha, steps=config.bisection_steps)
    if alpha == 0:
        log.warning("no edit stays within the perplexity budget of %.4g", config.perplexity_budget)
    edit = edit.at(alpha)
    metrics = {
        "config": config.model_dump(mode="json") | {"model": Path(config.model).name},
        "data": {labelled.name: sha256_of(labelled), neutral.name: sha256_of(neutral)},
        "texts": len(texts),
        "probe_auroc": _probe_auroc(states[:cut], labels[:cut], direction, bias),
        "rows": edit.count,
        "gates": {name: len(rows) for name, rows in edit.rows.items()},
        "alpha": alpha,
        "perplexity": {"before": before, "after": cost(edit)},
        "versions": versions("torch", "transformers", "numpy"),
        "wall_s": round(time.monotonic() - started, 1),
    }
    edit.save(out / "edit.safetensors")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return SurgeryResult(edit, out, metrics)


def _labelled(path: Path, config: SurgeryConfig) -> tuple[list[str], Tensor]:
    """As many texts of each label as there are of both, in random order; labels (text,)."""
    found: dict[int, list[str]] = {0: [], 1: []}
    for row in read_jsonl(path):
        if row.get("label") in (0, 1) and str(row.get("text") or "").strip():
            found[int(row["label"])].append(row["text"])
    rng = random.Random(f"{config.seed}/labelled")
    size = min(len(found[0]), len(found[1]), max(1, config.texts // 2))
    if size < 2:
        raise ValueError(f"{path.name} needs rows with a 'text' and a 'label' of 0 and of 1, two of each")
    rows = [(text, label) for label in (0, 1) for text in rng.sample(found[label], size)]
    rng.shuffle(rows)
    return [text for text, _ in rows], torch.tensor([label for _, label in rows])


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def pooled_states(
    model: Any, tokenizer: Any, texts: Sequence[str], config: SurgeryConfig, *, progress: bool | None = None
) -> Tensor:
    """Mean of the last layer's hidden states over each text's tokens: (text, hidden), float32, on the CPU."""
    model.eval()
    parts = []
    disable = None if progress is None else not progress
    for i in tqdm(range(0, len(texts), config.batch), disable=disable, desc="states"):
        ids, mask = _padded(tokenizer, texts[i : i + config.batch], config.max_tokens, model.device)
        out = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden, weight = out.last_hidden_state.float(), mask.unsqueeze(-1)
        parts.append(((hidden * weight).sum(1) / weight.sum(1)).cpu())
    return torch.cat(parts)


def _padded(tokenizer: Any, texts: Sequence[str], most: int, device: Any) -> tuple[Tensor, Tensor]:
    """Tokens and mask (text, token), padded on the right, where causal models need no positions for it."""
    rows = [tokenizer(text)["input_ids"][:most] or [tokenizer.eos_token_id or 0] for text in texts]
    ids, mask = torch.zeros(2, len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


def fit_probe(states: Tensor, labels: Tensor, config: SurgeryConfig) -> tuple[Tensor, Tensor]:
    """A linear probe's weight row of the behaviour (hidden,), and that row's bias, a scalar."""
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        probe = nn.Linear(states.shape[1], 2)
    optimizer = torch.optim.Adam(probe.parameters(), lr=config.learning_rate)
    for _ in range(config.epochs):
        for chosen in torch.randperm(len(states), generator=generator).split(config.batch):
            loss = nn.functional.cross_entropy(probe(states[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return probe.weight[1].detach().clone(), probe.bias[1].detach().clone()


def _probe_auroc(states: Tensor, labels: Tensor, direction: Tensor, bias: Tensor) -> float | None:
    """How well the direction alone ranks held-out texts."""
    truth = labels.numpy() == 1
    if not 0 < truth.sum() < len(truth):
        return None
    scores = (states @ direction + bias).numpy().astype(np.float64)
    return round(float(auroc(truth, scores)), 4)


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def perplexity(model: Any, tokenizer: Any, texts: Sequence[str], config: SurgeryConfig) -> float:
    """Exponential of the mean negative log-likelihood per token, the first of each text left out."""
    model.eval()
    total, tokens = 0.0, 0
    for i in range(0, len(texts), config.batch):
        ids, mask = _padded(tokenizer, texts[i : i + config.batch], config.max_tokens, model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        said = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        total -= float((said * mask[:, 1:]).sum())
        tokens += int(mask[:, 1:].sum())
    if not tokens:
        raise ValueError("the neutral texts have no second token, so there is no perplexity")
    mean = total / tokens
    return math.exp(mean) if mean < 700 else math.inf
