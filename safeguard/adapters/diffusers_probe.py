"""A look at pictures while a pipeline makes them, so that the steps of one that will be blocked are saved.

The probe goes in as `callback_on_step_end`, after the user's own callback, which still runs and sees what it
would have seen. Every few steps the latents are decoded and judged by the image checks of the policy. Where
all pictures of the call are flagged, the pipeline is told to skip the steps that are left, and what it hands
back is not looked at again: the verdicts on the previews count, with the step in their coverage. A picture
that the probe passes is judged when it is finished, as without a probe. So are all pictures of a batch in
which only some are flagged. Checks that fail on a preview, and latents with NaN, stop nothing: the finished
picture decides.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from safeguard import calls
from safeguard.adapters.diffusers_latents import Decoder, decodes
from safeguard.driving import drive
from safeguard.errors import CheckFailed, PolicyError
from safeguard.judging import Budget, Piece
from safeguard.policy import ProbeRules
from safeguard.types import Coverage, Verdict

log = logging.getLogger(__name__)

_CALLBACK = "callback_on_step_end"
_TENSORS = "callback_on_step_end_tensor_inputs"
_LATENTS = "latents"


def lacking(base: type, pipe: Any, call: Callable[..., Any]) -> str | None:
    """What a pipeline has not that a probe needs, None where a probe can work."""
    parameters = inspect.signature(call).parameters
    if _CALLBACK not in parameters or _TENSORS not in parameters:
        return f"{base.__name__} has no {_CALLBACK}"
    if _LATENTS not in (getattr(base, "_callback_tensor_inputs", None) or ()):
        return f"the callback of {base.__name__} sees no latents"
    if not isinstance(getattr(base, "interrupt", None), property):
        return f"{base.__name__} cannot be interrupted"
    if not decodes(pipe):
        return f"the latents of {base.__name__} cannot be decoded to pictures"
    return None


def usable(base: type, pipe: Any, call: Callable[..., Any], route: calls.Route) -> bool:
    """Whether calls of this pipeline are probed; says so where the policy wants it and it cannot be.

    Raises PolicyError then, where the policy's `probe.unavailable` is "error".
    """
    rules = route.policy.probe
    if not rules.every or not route.outputs.checks:
        return False
    why = lacking(base, pipe, call)
    if why is None:
        return True
    if rules.unavailable == "error":
        raise PolicyError(
            f"probe.every is {rules.every}, but {why}; set probe.every to 0, or probe.unavailable to 'warn'"
        )
    log.warning("no probe, pictures are judged when they are finished: %s", why)
    return False


class Probe:
    """The probe of one run of a pipeline.

    live: which items (rows of the latents) will be handed on if they pass, None for all.
    """

    def __init__(
        self, pipe: Any, route: calls.Route, decoder: Decoder, live: Sequence[bool] | None = None
    ) -> None:
        self._pipe, self._route, self._decoder, self._live = pipe, route, decoder, live
        self._rules: ProbeRules = route.policy.probe
        self._budget = Budget(route.policy)
        self._own: Any = None
        self._own_tensors: list[str] = []
        self._map: Any = None  # (channel + 1, 3), from latents to colours
        self._blind = False
        self.stopped: list[list[Verdict]] | None = None
        """The verdicts on each item where the run was stopped; empty for those not looked at."""

    def put_into(self, signature: inspect.Signature, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """The arguments of a run with the probe in the place of the user's callback."""
        bound = signature.bind(self._pipe, *args, **kwargs)
        arguments = bound.arguments
        self._own = arguments.get(_CALLBACK)
        own = getattr(self._own, "tensor_inputs", None)  # of a PipelineCallback
        if own is None:
            own = arguments.get(_TENSORS, signature.parameters[_TENSORS].default)
        self._own_tensors = list(own or ())
        wanted = {
            _CALLBACK: self._on_step_end,
            _TENSORS: [*self._own_tensors, *([] if _LATENTS in self._own_tensors else [_LATENTS])],
        }
        # by name, in the order of the signature: what stands behind them may have been given by position
        for name, value in wanted.items():
            arguments[name] = value
        ordered = {name: arguments[name] for name in signature.parameters if name in arguments}
        bound = inspect.BoundArguments(signature, ordered)
        return bound.args[1:], bound.kwargs

    def _on_step_end(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        given: Any = tensors
        if self._own is not None:
            own = {name: tensors[name] for name in self._own_tensors if name in tensors}
            given = self._own(pipe, step, timestep, own)
        latents = given.get(_LATENTS, tensors[_LATENTS]) if isinstance(given, dict) else None
        if latents is not None and self._is_due(step + 1):
            self._look(latents, step + 1)
        return given

    def _is_due(self, done: int) -> bool:
        if self._blind or self.stopped is not None:
            return False
        past, total = done - self._rules.from_step, self._total()
        return past >= 0 and past % self._rules.every == 0 and (total is None or done < total)

    def _total(self) -> int | None:
        total = getattr(self._pipe, "_num_timesteps", None)
        return total if isinstance(total, int) else None

    def _look(self, latents: Any, done: int) -> None:
        """Judge the previews; stops the run when all that matter are flagged."""
        live = self._live
        rows = range(len(latents)) if live is None or len(live) != len(latents) else [
            i for i, wanted in enumerate(live) if wanted
        ]  # fmt: skip
        if not bool(latents.isfinite().all()):
            return
        pictures = self._previews(latents, rows)
        if pictures is None:
            self._say_blind()
            return
        verdicts = drive(self._route.outputs.judge([Piece("output", (p,)) for p in pictures], self._budget))
        flagged = [self._is_flagged(row) for row in verdicts]
        log.debug("probe: step=%d flagged=%d of %d", done, sum(flagged), len(flagged))
        if not flagged or not all(flagged):
            return
        total = self._total() or done
        coverage = Coverage("steps", total, done)
        self.stopped = [[] for _ in range(len(latents))]
        for i, row in zip(rows, verdicts, strict=True):
            self.stopped[i] = [replace(v, coverage=coverage) for v in row]
        self._pipe._interrupt = True
        log.info("stopped at step %d of %d: items=%d", done, total, len(flagged))

    def _is_flagged(self, row: Sequence[Verdict]) -> bool:
        """Whether such a finished picture would be withheld, and the score is enough for a preview."""
        least = self._rules.threshold or 0.0
        return any(not v.action.passes and any(v.scores[c] >= least for c in v.flagged) for v in row)

    def _previews(self, latents: Any, rows: Sequence[int]) -> list[Any] | None:
        """A picture (3, height, width) in [0, 1] for each row; None where the latents cannot be decoded."""
        if self._map is not None:
            return [_mapped(latents[i], self._map) for i in rows]
        pictures = [self._decoder(latents[i]) for i in rows]
        if any(picture is None for picture in pictures):
            return None
        if self._rules.preview == "linear" and latents.ndim == 4:
            self._map = _fitted([latents[i] for i in rows], pictures)
        return pictures

    def _say_blind(self) -> None:
        self._blind = True
        if self._rules.unavailable == "error":
            raise CheckFailed("safeguard", "the probe cannot see the latents of this call")
        log.warning("no probe in this call: its latents cannot be decoded to pictures")


def _fitted(latents: Sequence[Any], pictures: Sequence[Any]) -> Any:
    """The linear map from latents to colours that is nearest to what the VAE makes of these: least squares.

    latents: (channel, height, width) each. Returns (channel + 1, 3), None where there are too few places.
    """
    import torch

    places, colours = [], []
    for latent, picture in zip(latents, pictures, strict=True):
        small = torch.nn.functional.adaptive_avg_pool2d(picture.float(), latent.shape[-2:])
        places.append(_with_one(latent))
        colours.append(small.flatten(1).T)  # (place, 3)
    left, right = torch.cat(places).cpu(), torch.cat(colours).cpu()
    if len(left) < 2 * left.shape[1] or right.shape[1] != 3:
        return None
    # a little ridge: latents whose channels depend on one another have no single best map
    square = left.T @ left + 1e-3 * torch.eye(left.shape[1])
    return torch.linalg.solve(square, left.T @ right)


def _mapped(latent: Any, colours: Any) -> Any:
    """(3, height, width) in [0, 1] from (channel, height, width)."""
    picture = (_with_one(latent) @ colours.to(latent.device)).clamp(0, 1)
    return picture.T.reshape(3, *latent.shape[-2:])


def _with_one(latent: Any) -> Any:
    """(place, channel + 1), the last column of ones."""
    import torch

    flat = latent.detach().float().flatten(1).T
    return torch.cat([flat, torch.ones_like(flat[:, :1])], dim=1)
