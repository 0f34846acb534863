"""The arithmetic of the learned prompts: logits of pictures, the fit, and calibration inside the prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from safeguard.errors import MissingExtra

try:
    import torch
except ImportError as exc:
    raise MissingExtra("torch", extra="train") from exc

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from safeguard.train.q16 import Q16Config

_RIDGE = 1e-3  # as in safeguard.calibrate: keeps the gain of separable data finite
_GAINS = (1e-2, 1e2)


@dataclass(frozen=True, eq=False)
class Sample:
    """Embedded pictures of one part.

    rows: (view, dimension), unit. index: (picture, view) places in rows. truth: (picture,), whether it is
    inappropriate.
    """

    rows: NDArray[np.float32] = field(repr=False)
    index: NDArray[np.int64] = field(repr=False)
    truth: NDArray[np.bool_] = field(repr=False)

    def with_more(self, other: Sample) -> Sample:
        """The pictures of both."""
        wide = max(self.index.shape[1], other.index.shape[1])
        index = np.concatenate([_widened(self.index, wide), _widened(other.index, wide) + len(self.rows)])
        rows = np.concatenate([self.rows, other.rows])
        return Sample(rows, index, np.concatenate([self.truth, other.truth]))

    def take(self, which: NDArray[np.bool_]) -> Sample:
        """Some of the pictures; rows that none of them has stay, unused."""
        return Sample(self.rows, self.index[which], self.truth[which])


@dataclass(frozen=True, eq=False)
class Fit:
    """Unit prompts (2, dimension) with the least validation loss, of the epoch `best`; 0 is the beginning."""

    prompts: NDArray[np.float64]
    epochs: int
    best: int
    losses: list[float]


def logits_of(prompts: NDArray[np.float64], sample: Sample, scale: float) -> NDArray[np.float64]:
    """Logits: scale * (cosine to harmful - cosine to harmless) of a picture's worst view (picture,).

    prompts: (2, dimension), unit, rows harmless, harmful.
    """
    if not len(sample.truth):
        return np.zeros(0)
    every = scale * (sample.rows.astype(np.float64) @ (prompts[1] - prompts[0]))  # (view,)
    worst: NDArray[np.float64] = every[sample.index].max(axis=1)
    return worst


def unit_rows(rows: NDArray[Any]) -> NDArray[np.float64]:
    """Rows of length 1 (row, dimension), in float64."""
    wide = rows.astype(np.float64)
    unit: NDArray[np.float64] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit


def class_means(sample: Sample) -> NDArray[np.float64]:
    """Unit prompts (2, dimension): where the views of harmless and of inappropriate pictures lie."""
    means = [sample.rows[np.unique(sample.index[sample.truth == unsafe])].mean(axis=0) for unsafe in (0, 1)]
    return unit_rows(np.stack(means))


def fit_prompts(first: NDArray[np.float64], train: Sample, validation: Sample, config: Q16Config) -> Fit:
    """Adam on the cross-entropy, from the prompts `first`, until the validation loss no longer falls."""
    prompts = torch.tensor(first, dtype=torch.float32, requires_grad=True)
    rows, index = torch.from_numpy(train.rows), torch.from_numpy(train.index)
    truth = torch.from_numpy(train.truth.astype(np.float32))
    weights = _weights(train.truth) if config.balanced else np.ones(len(train.truth))
    weight = torch.from_numpy(weights.astype(np.float32))
    optimizer = torch.optim.Adam([prompts], lr=config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    losses = [_loss(first, validation, config)]
    best, found = 0, first
    for epoch in range(1, config.epochs + 1):
        for chosen in torch.randperm(len(truth), generator=generator).split(config.batch):
            harmless, harmful = torch.nn.functional.normalize(prompts, dim=1)
            views = rows[index[chosen]]  # (picture, view, dimension)
            logits = config.scale * (views @ (harmful - harmless)).amax(dim=1)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, truth[chosen], weight=weight[chosen]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        now = torch.nn.functional.normalize(prompts.detach().double(), dim=1).numpy()
        losses.append(_loss(now, validation, config))
        if losses[-1] < losses[best]:
            best, found = epoch, now
        elif epoch - best >= config.patience:
            break
    if not all(math.isfinite(loss) for loss in losses):
        raise ValueError("the validation loss is not finite; lower learning_rate or scale")
    return Fit(found, len(losses) - 1, best, [round(loss, 6) for loss in losses])


def gain_of(logits: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """The factor on the logits that makes the truth most likely: one over the temperature.

    Source: Guo et al. 2017. A small pull towards 1 keeps it finite where a threshold parts the labels.
    """
    low, high = (math.log(gain) for gain in _GAINS)

    def cost(log_gain: float) -> float:
        gain = math.exp(log_gain)
        return _entropy(gain * logits, truth, np.ones(len(truth))) + _RIDGE * (gain - 1) ** 2

    for _ in range(100):  # the cost is convex in the gain, so it has one valley in its logarithm too
        third = (high - low) / 3
        if cost(low + third) < cost(high - third):
            high -= third
        else:
            low += third
    return math.exp((low + high) / 2)


def with_gain(prompts: NDArray[np.float64], gain: float) -> tuple[NDArray[np.float64], float]:
    """Unit prompts whose logits are `gain` times those of these unit prompts, and the gain that was possible.

    So a temperature needs no number of its own, and prompts of the released form can be calibrated: the pair
    is opened or closed in its own plane. Two unit vectors are at most 2 apart, which bounds the gain.
    """
    away, middle = prompts[1] - prompts[0], prompts[0] + prompts[1]
    distance, length = float(np.linalg.norm(away)), float(np.linalg.norm(middle))
    if distance == 0:
        return prompts, 1.0
    if length < 1e-9:  # opposite to one another: any direction between them will do
        middle = _across(away)
        length = float(np.linalg.norm(middle))
    possible = min(gain, 2.0 / distance)
    half = away * possible / 2  # a right angle to the middle, since both prompts are as long
    rest = math.sqrt(max(0.0, 1.0 - float(half @ half)))
    centre = middle / length * rest
    return np.stack([centre - half, centre + half]), possible


def _across(direction: NDArray[np.float64]) -> NDArray[np.float64]:
    """A direction at a right angle to this one (dimension,), of two dimensions or more."""
    axis = np.zeros(len(direction))
    axis[int(np.abs(direction).argmin())] = 1.0
    found: NDArray[np.float64] = axis - direction * (axis @ direction) / (direction @ direction)
    return found


def _loss(prompts: NDArray[np.float64], sample: Sample, config: Q16Config) -> float:
    weights = _weights(sample.truth) if config.balanced else np.ones(len(sample.truth))
    return _entropy(logits_of(prompts, sample, config.scale), sample.truth, weights)


def _entropy(logits: NDArray[np.float64], truth: NDArray[np.bool_], weights: NDArray[Any]) -> float:
    return float((weights * (np.logaddexp(0.0, logits) - truth * logits)).mean())


def _weights(truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean 1 over all, the same sum for both labels (picture,)."""
    share = truth.mean()
    weights: NDArray[np.float64] = np.where(truth, 0.5 / share, 0.5 / (1 - share))
    return weights


def _widened(index: NDArray[np.int64], wide: int) -> NDArray[np.int64]:
    missing = wide - index.shape[1]
    return np.concatenate([index, np.repeat(index[:, :1], missing, axis=1)], axis=1) if missing else index
