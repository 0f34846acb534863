"""Guard a diffusers pipeline in place, by giving the instance a subclass of its own class.

A forwarding proxy would be simpler and unsafe: `proxy.to("cuda")` returns the bare pipeline. What is guarded
is the instance: a pipeline built from its `components`, or by another class's `from_pipe`, is a new one and
needs its own guard. So do pipelines inside it that are called alone, such as the prior of a combined one.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeVar, cast

from safeguard import calls, flow
from safeguard.adapters import diffusers_outputs as outputs
from safeguard.adapters import pictures
from safeguard.adapters.diffusers_call import Call
from safeguard.adapters.diffusers_latents import Decoder
from safeguard.adapters.diffusers_probe import Probe, usable
from safeguard.adapters.in_place import keeping_methods
from safeguard.driving import drive
from safeguard.errors import CheckFailed
from safeguard.guards import Guard
from safeguard.judging import Piece
from safeguard.policy import Policy
from safeguard.types import Action, Modality, Span, Task, Verdict

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_FRAMES = 16
"""Frames of a video that are looked at, evenly spread, the first and the last among them."""

_GENERATES = ("__call__", "text_to_image", "image_variation", "dual_guided")
"""Methods that return pictures; all but the first are those of VersatileDiffusion."""
_REWRITES = re.compile(
    r"_?(?:upsample|enhance|rewire|rewrite|expand|extend|refine|polish)_prompts?(?:_\w+)?|(?:get|generate)_(?:image_)?caption"
)
"""Methods by which pipelines put a prompt of their own making in place of the user's."""
_LARGEST = 4096  # pixels of a placeholder's side


def wrap(target: T, guard: Guard, *, frames: int = MAX_FRAMES) -> T:
    """Guard a pipeline in place and return it: the same object, whose class still has the same name.

    frames: how many frames of a video the checks see, 2 or more.
    Raises TypeError when it is guarded already, and whatever loading the policy's models raises.
    """
    if frames < 2:
        raise ValueError(f"frames must be 2 or more, so that the first and the last are seen, got {frames}")
    pipe = cast(Any, target)
    base = type(pipe)
    if getattr(base, "__safeguard__", None) is not None:
        raise TypeError(f"this {base.__name__} is guarded already; build another pipeline for another guard")
    route = guard.prepare("t2i", "image")  # what is missing is said now
    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__safeguard__": guard,
        **keeping_methods("use save_pretrained"),
    }
    for name in dir(base):
        if name in _GENERATES:
            original = getattr(base, name)
            members[name] = _guarded(
                original, base, guard, frames, probed=usable(base, pipe, original, route)
            )
        elif _REWRITES.fullmatch(name) and callable(getattr(base, name)):
            members[name] = _judged(inspect.getattr_static(base, name), guard)
    # same name and module, so that save_pretrained writes the class it always wrote
    pipe.__class__ = type(base.__name__, (base,), members)
    return target


def refuse_modular(target: Any, guard: Guard, **how: Any) -> NoReturn:
    """Raise TypeError: a modular pipeline has no fixed arguments or outputs by which it could be guarded."""
    raise TypeError(
        f"cannot guard {type(target).__name__}: modular pipelines take any state and return any state; "
        "guard the function that calls it, or use the pipeline of the same model that is not modular"
    )


def _guarded(
    original: Callable[..., Any], base: type, guard: Guard, frames: int, *, probed: bool
) -> Callable[..., Any]:
    """The method of the guarded class, with the signature and docstring of the original."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def guarded(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        call = Call(signature, (self, *args), kwargs)
        route = guard.route(_Job.task, _Job.modality)
        probe = functools.partial(Probe, self, route) if probed else None
        job = _Job(self, base, functools.partial(original, self), call, guard.policy, frames, probe)
        outcome = drive(flow.run(route, job))
        return guard.settle(outcome.flat, job.result(outcome))

    return guarded


class _Job:
    """One guarded call of a pipeline."""

    task: Task = "t2i"
    modality: Modality = "image"
    on_loop = False

    def __init__(
        self,
        pipe: Any,
        base: type,
        generate: Callable[..., Any],
        call: Call,
        policy: Policy,
        frames: int,
        probe: Callable[..., Probe] | None = None,
    ) -> None:
        self.asks: Sequence[calls.Ask] = call.asks()
        if len(self.asks) > policy.max_items:
            raise ValueError(
                f"a call may have at most {policy.max_items} items (max_items), got {len(self.asks)}"
            )
        self._pipe, self._base, self._generate, self._call = pipe, base, generate, call
        self._policy, self._frames, self._probe = policy, frames, probe
        self._known: list[tuple[Any, Sequence[Verdict]]] = []  # items that the probe stopped
        self._size = _size(pipe, call)
        self._made: outputs.Made | None = None
        self._starts: list[int] = []

    def first(self, texts: Sequence[calls.Texts | None]) -> list[list[Any]]:
        """Run the whole batch, with an empty text for what was refused, and give each ask its outputs."""
        args, kwargs = self._call.batch(texts)
        live = [t is not None for t in texts for _ in range(self._call.per_prompt)]
        made = self._made = self._run(args, kwargs, live)
        items, n = made.items, len(self.asks)
        if not made.readable:  # whatever it is, it belongs to every prompt
            self.asks = [replace(ask, outputs=1) for ask in self.asks]
            return [items for _ in self.asks]
        if len(items) % n:
            if None in texts:
                why = f"cannot tell which of {len(items)} outputs belongs to which of {n} prompts"
                raise CheckFailed("safeguard", why)
            ends = [len(items) * (i + 1) // n for i in range(n)]
        else:
            ends = [len(items) // n * (i + 1) for i in range(n)]
            self.asks = [replace(ask, outputs=len(items) // n) for ask in self.asks]
        self._starts = [0, *ends[:-1]]
        return [items[start:end] for start, end in zip(self._starts, ends, strict=True)]

    def again(self, ask: int, place: int, texts: calls.Texts) -> Any:
        """One new output for one place: a generator goes on from where it is, given noise is drawn anew."""
        made = self._made
        if made is None or not made.readable:
            raise CheckFailed("safeguard", "this pipeline's output cannot be made again one by one")
        row = self._starts[ask] + place
        args, kwargs = self._call.single(ask, row, len(made.items), texts)
        new = self._run(args, kwargs)
        if not new.readable or not new.items:
            raise CheckFailed("safeguard", "this pipeline's output cannot be made again one by one")
        return new.items[0]

    def _run(self, args: Any, kwargs: dict[str, Any], live: Sequence[bool] | None = None) -> outputs.Made:
        """One run of the pipeline, with a probe where there is one."""
        if self._probe is None:
            return outputs.Made(self._generate(*args, **kwargs))
        probe = self._probe(self._decoder(running=True), live)
        args, kwargs = probe.put_into(self._call.signature, args, kwargs)
        made = outputs.Made(self._generate(*args, **kwargs))
        if probe.stopped is not None:
            known = probe.stopped
            if not made.readable or len(made.items) != len(known):  # cannot tell which is which: all flagged
                known = [[v for row in known for v in row]] * len(made.items)
            self._known += zip(made.items, known, strict=True)
        return made

    def _decoder(self, *, running: bool = False) -> Decoder:
        asked = (self._call.get("width"), self._call.get("height"))
        return Decoder(self._pipe, _sides(asked, _default_size(self._pipe)), running=running)

    def pieces(self, items: Sequence[Any], policy: Policy) -> list[Piece]:
        """What the checks see of each output; one that cannot be read does not harm its neighbours."""
        decoder = self._decoder()
        output_type = self._call.get("output_type")
        found: list[Piece] = []
        for item in items:
            known = next((verdicts for stopped, verdicts in self._known if stopped is item), None)
            if known:
                found.append(Piece("output", (), known=tuple(known)))
                continue
            try:
                found.append(outputs.piece_of(item, output_type, decoder, self._frames))
            except Exception as exc:
                log.error("output cannot be read: error=%s", type(exc).__name__)
                found.append(Piece("output", (), 0, f"output cannot be read ({type(exc).__name__})"))
        return found

    def placeholder(self, output: Any) -> Any:
        """Blank or blurred, like the output that it stands for, or like the others of the call."""
        if output is not None:
            return outputs.blank(output, self._policy.placeholder_image)
        if self._made is not None and self._made.items:
            return outputs.blank(self._made.items[0], "blank")
        return _nothing(self._pipe, self._base, self._call, self._size)

    def redact(self, output: Any, spans: Sequence[Span]) -> Any:
        """Pictures have no spans to cut."""
        return self.placeholder(output)

    def result(self, outcome: calls.Outcome) -> Any:
        """The pipeline's own output with what may be handed on; None where nothing was made."""
        flat = [item for row in outcome.outputs for item in row]
        if self._made is not None:
            if not self._made.readable:
                flat = flat[:1]
            return self._made.assemble(flat, outcome.flat, outputs.fields_of(self._base))
        if self._policy.on_block == "raise":
            return None
        as_dict = self._call.get("return_dict") in (None, True)
        return outputs.result_of_none(self._base, flat, outcome.flat, as_dict=as_dict)


def _size(pipe: Any, call: Call) -> tuple[int, int]:
    """Width and height in pixels of what a call makes, as far as its arguments and the pipeline tell."""
    width, height = _default_size(pipe)
    for name in ("image", "init_image", "video"):
        given = call.get(name)
        while isinstance(given, list | tuple) and given:
            given = given[0]
        if hasattr(given, "getpixel"):
            width, height = given.size
            break
    wide, high = _sides((call.get("width"), call.get("height")), (width, height))
    return min(max(wide, 1), _LARGEST), min(max(high, 1), _LARGEST)


def _sides(asked: tuple[Any, Any], otherwise: tuple[int, int]) -> tuple[int, int]:
    width, height = (a if isinstance(a, int) and a else o for a, o in zip(asked, otherwise, strict=True))
    return width, height


def _default_size(pipe: Any) -> tuple[int, int]:
    factor = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", None) or 1
    sample = getattr(pipe, "default_sample_size", None)
    for part in ("unet", "transformer"):
        sample = sample or getattr(getattr(getattr(pipe, part, None), "config", None), "sample_size", None)
    if isinstance(sample, int):
        return sample * factor, sample * factor
    if isinstance(sample, list | tuple) and len(sample) == 2:
        return sample[1] * factor, sample[0] * factor
    return pictures.DEFAULT_SIZE


def _nothing(pipe: Any, base: type, call: Call, size: tuple[int, int]) -> Any:
    """A blank item of the kind that the call asked for, where nothing was made at all."""
    import numpy as np
    import torch

    width, height = size
    kind = call.get("output_type")
    count = call.get("num_frames")
    fields = outputs.fields_of(base)
    lead = (count,) if isinstance(count, int) and not {"images", "image"} & set(fields) else ()
    if kind == "np":
        return np.zeros((*lead, height, width, 3), np.float32)
    if kind == "pt":
        return torch.zeros((*lead, 3, height, width))
    if kind == "latent":
        channels = getattr(getattr(getattr(pipe, "vae", None), "config", None), "latent_channels", 4)
        factor = getattr(pipe, "vae_scale_factor", None) or 8
        if hasattr(pipe, "_pack_latents"):  # four neighbours to a patch
            return torch.zeros(((height // (2 * factor)) * (width // (2 * factor)), 4 * channels))
        return torch.zeros((channels, max(height // factor, 1), max(width // factor, 1)))
    picture = pictures.placeholder(None, size=size)
    return [picture.copy() for _ in range(count)] if lead and isinstance(count, int) else picture


def _judged(static: Any, guard: Guard) -> Any:
    """A prompt-rewriting method whose result is judged before the pipeline uses it.

    A rewrite that is refused gives way to the prompt it was made from, which was judged already.
    """
    plain = isinstance(static, staticmethod)
    original = static.__func__ if isinstance(static, staticmethod | classmethod) else static
    signature = inspect.signature(original)

    @functools.wraps(original)
    def judged(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments.get("prompt", "")
        before = [given] if isinstance(given, str) else list(given or ())
        after = [result] if isinstance(result, str) else list(result)
        reports = drive(
            flow.input_reports(
                guard.route("t2i", "image"), [calls.Ask({"rewritten_prompt": text}) for text in after]
            )
        )
        texts: list[Any] = []
        for i, (text, report) in enumerate(zip(after, reports, strict=True)):
            if not report.blocked:
                texts.append(text if report.revised_prompt is None else report.revised_prompt)
                continue
            log.warning("a prompt rewritten by the pipeline was refused, so the original is used")
            texts.append(before[i] if i < len(before) and len(before) == len(after) else "")
        guard.tell(
            [r.with_action(Action.REPLACE) if r.blocked else r for r in reports if not r.action.passes]
        )
        return texts[0] if isinstance(result, str) else type(result)(texts)

    if plain:
        return staticmethod(judged)
    return classmethod(judged) if isinstance(static, classmethod) else judged
