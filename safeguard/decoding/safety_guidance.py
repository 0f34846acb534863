"""Safe Latent Diffusion: every step of a diffusion pipeline is pulled away from a safety concept.

Source: Schramowski et al. 2023, Safe Latent Diffusion. diffusers has deprecated its own pipeline for it; this
one works on pipelines that there are: Stable Diffusion 1, 2, XL and 3, also with a picture, a mask or a
ControlNet. The denoiser gets a third share of the batch that is conditioned on the concept, and what it
answers for the prompt is moved before the pipeline puts both answers together; the pipeline itself and its
classifier-free guidance stay as they are. Costs half a pass of the denoiser more, and its memory.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from safeguard.errors import MissingExtra

try:
    import torch
    from torch import Tensor
except ImportError as exc:
    raise MissingExtra("torch", extra="torch") from exc

CONCEPT = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, "
    "bodily fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, "
    "child abuse, brutality, cruelty"
)
"""The concept of the paper's released pipeline."""

Preset = Literal["weak", "medium", "strong", "max"]
_DENOISERS = ("UNet2DConditionModel", "SD3Transformer2DModel")
_CONDITIONS = {"encoder_hidden_states": 0, "text_embeds": 1, "pooled_projections": 1}
"""Inputs of a denoiser that say what is wanted -> place in the concept: its words, or one vector."""


@dataclass(frozen=True, slots=True)
class SafetySettings:
    """How strongly, in the words of the paper. Raises ValueError for values out of range."""

    warmup_steps: int
    """delta: steps at the beginning that are left alone; momentum builds up already."""
    scale: float
    """s_S: above it a difference counts in full."""
    threshold: float
    """lambda: where the prompt is ahead of the concept by this much or more, nothing is done."""
    momentum_scale: float
    """s_m: share of the momentum in each step's correction."""
    momentum_beta: float
    """beta_m: how much of the momentum stays from step to step."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {self.warmup_steps}")
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, got {self.scale}")
        for name in ("momentum_scale", "momentum_beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


PRESETS: Mapping[Preset, SafetySettings] = {  # Schramowski et al. 2023, appendix on hyperparameters
    "weak": SafetySettings(15, 20.0, 0.0, 0.0, 0.0),
    "medium": SafetySettings(10, 1000.0, 0.01, 0.3, 0.4),
    "strong": SafetySettings(7, 2000.0, 0.025, 0.5, 0.7),
    "max": SafetySettings(0, 5000.0, 1.0, 0.5, 0.7),
}


def safety_guidance(
    plain: Tensor, prompt: Tensor, concept: Tensor, momentum: Tensor, settings: SafetySettings
) -> tuple[Tensor, Tensor]:
    """What is taken from the prompt's direction, and the momentum after this step.

    plain, prompt, concept: predictions (batch, channel, height, width) without a prompt, for the prompt and
    for the concept. Source: equations 4 and 6 to 8 of the paper.
    """
    ahead = prompt - concept
    share = (ahead.abs() * settings.scale).clamp(max=1.0)
    share = torch.where(ahead >= settings.threshold, torch.zeros_like(share), share)
    guidance = share * (concept - plain) + settings.momentum_scale * momentum
    return guidance, settings.momentum_beta * momentum + (1 - settings.momentum_beta) * guidance


class SafetyGuidance:
    """Guides diffusion pipelines away from a concept. Holds settings only; what a call needs, the call has.

    settings: a preset of the paper (weak, medium, strong, max) or `SafetySettings`. concept: what to keep
    away from, in words; the text encoders read as much of it as they can.
    """

    def __init__(self, settings: Preset | SafetySettings = "medium", *, concept: str = CONCEPT) -> None:
        if isinstance(settings, str):
            if settings not in PRESETS:
                raise ValueError(f"settings must be one of {', '.join(PRESETS)}, got {settings!r}")
            settings = PRESETS[settings]
        if not concept.strip():
            raise ValueError("concept must say what to keep away from, got an empty text")
        self.settings, self.concept = settings, concept

    def apply(self, pipe: Any) -> Any:
        """Guide every call of this pipeline from now on, and return it; weights and parts are not touched.

        The instance gets a subclass of its own class with the same name. Raises TypeError for a pipeline
        whose denoiser this does not know, or that is guided already.
        """
        base = type(pipe)
        denoiser_of(pipe)
        if any("__safety_guidance__" in vars(kind) for kind in base.__mro__):
            raise TypeError(f"this {base.__name__} has safety guidance already; revert it first")
        call = base.__call__

        @functools.wraps(call)
        def guided(this: Any, *args: Any, **kwargs: Any) -> Any:
            with self.during(this):
                return call(this, *args, **kwargs)

        members = {"__call__": guided, "__module__": base.__module__, "__qualname__": base.__qualname__}
        kind: Any = type(base)  # its metaclass
        pipe.__class__ = kind(
            base.__name__, (base,), {**members, "__doc__": base.__doc__, "__safety_guidance__": self}
        )
        return pipe

    def revert(self, pipe: Any) -> Any:
        """The pipeline as it was before `apply`. Raises TypeError when it was changed again since."""
        if vars(type(pipe)).get("__safety_guidance__") is not self:
            raise TypeError(
                f"this {type(pipe).__name__} was not given this guidance, or was guarded after it; "
                "take off what came later first"
            )
        pipe.__class__ = type(pipe).__bases__[0]
        return pipe

    @contextmanager
    def during(self, pipe: Any) -> Iterator[Any]:
        """Guide the calls of this pipeline in the block, in this thread, whatever else shares its denoiser.

        Raises TypeError where it is guided already.
        """
        denoiser = denoiser_of(pipe)
        owners = [getattr(hook, "__self__", None) for hook in denoiser._forward_hooks.values()]
        if any(isinstance(o, _Steps) and o.thread == threading.get_ident() for o in owners):
            raise TypeError(f"this {type(pipe).__name__} has safety guidance already; revert it first")
        steps = _Steps(pipe, self.settings, self.concept)
        handles = [
            denoiser.register_forward_pre_hook(steps.before, with_kwargs=True),
            denoiser.register_forward_hook(steps.after),
        ]
        try:
            yield pipe
        finally:
            for handle in handles:
                handle.remove()


def denoiser_of(pipe: Any) -> Any:
    """The part of a pipeline that predicts noise. Raises TypeError for one that this does not know."""
    name = type(pipe).__name__
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    inner = getattr(denoiser, "_orig_mod", denoiser)  # of torch.compile
    known = any(kind.__name__ in _DENOISERS for kind in type(inner).__mro__)
    if not known or not callable(getattr(pipe, "encode_prompt", None)):
        raise TypeError(
            f"no safety guidance for {name}: its denoiser must be one of {', '.join(_DENOISERS)} and its "
            "prompts encoded by encode_prompt(); a negative prompt does without"
        )
    if hasattr(type(pipe), "do_perturbed_attention_guidance") or hasattr(type(pipe), "image_guidance_scale"):
        raise TypeError(
            f"no safety guidance for {name}, which has a guidance of its own besides the prompt's"
        )
    return denoiser


class _Steps:
    """The steps of the calls in one block: which one it is, the momentum, the concept as embeddings."""

    def __init__(self, pipe: Any, settings: SafetySettings, concept: str) -> None:
        self._pipe, self._settings, self._concept = pipe, settings, concept
        self.thread = threading.get_ident()
        self._embeddings: tuple[Tensor, Tensor | None] | None = None
        self._timesteps: Any = None
        self._momentum: Tensor | None = None
        self._step = 0

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add the third share of the batch."""
        if threading.get_ident() != self.thread:
            return None
        if not self._pipe.do_classifier_free_guidance:
            raise ValueError(
                "safety guidance works on classifier-free guidance: give a guidance_scale above 1, "
                f"got {getattr(self._pipe, 'guidance_scale', None)}"
            )
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        if not isinstance(sample, Tensor) or len(sample) % 2:
            raise TypeError(
                "the denoiser was not called with a batch of two halves, as safety guidance needs"
            )
        self._begin()
        widen = functools.partial(_widened, rows=len(sample), concept=self._encoded())
        return tuple(widen("", a) for a in args), {name: widen(name, a) for name, a in kwargs.items()}

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Move the prompt's prediction and leave the third share out again."""
        if threading.get_ident() != self.thread:
            return None
        made = output[0]
        plain, prompt, concept = (part.float() for part in made.chunk(3))
        momentum = torch.zeros_like(plain) if self._momentum is None else self._momentum
        guidance, self._momentum = safety_guidance(plain, prompt, concept, momentum, self._settings)
        if self._step >= self._settings.warmup_steps:
            prompt = prompt - guidance
        self._step += 1
        both = torch.cat([plain, prompt]).to(made.dtype)
        return (both, *output[1:]) if isinstance(output, tuple) else type(output)(sample=both)

    def _begin(self) -> None:
        """Start anew where the pipeline does: each call sets timesteps of its own."""
        timesteps = self._pipe.scheduler.timesteps
        if timesteps is not self._timesteps:
            self._timesteps, self._momentum, self._step = timesteps, None, 0

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
    def _encoded(self) -> tuple[Tensor, Tensor | None]:
        if self._embeddings is None:
            encode: Callable[..., Any] = self._pipe.encode_prompt
            told: dict[str, Any] = {
                "prompt": self._concept,
                "device": self._pipe._execution_device,
                "num_images_per_prompt": 1,
                "do_classifier_free_guidance": False,
            }
            others = {"prompt_2": None, "prompt_3": None}
            known = inspect.signature(encode).parameters
            made = encode(**told, **{name: v for name, v in others.items() if name in known})
            self._embeddings = (made[0], made[2] if len(made) > 2 else None)
        return self._embeddings


def _widened(name: str, value: Any, *, rows: int, concept: tuple[Tensor, Tensor | None]) -> Any:
    """A denoiser input with a third share: the concept where it says what is wanted, else the prompt."""
    if isinstance(value, Mapping):
        return {n: _widened(n, v, rows=rows, concept=concept) for n, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_widened(name, v, rows=rows, concept=concept) for v in value)
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != rows:
        return value
    third = value[rows // 2 :]
    place = _CONDITIONS.get(name)
    if place is not None:
        said = concept[place]
        if said is None or said.shape[1:] != value.shape[1:]:
            raise ValueError(
                f"safety guidance cannot stand beside {name} of shape {tuple(value.shape[1:])}, "
                f"its concept has {None if said is None else tuple(said.shape[1:])}; give the prompt as text"
            )
        third = said.to(value).expand(rows // 2, *said.shape[1:])
    return torch.cat([value, third])
