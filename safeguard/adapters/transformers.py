"""Guard a transformers causal language model in place, by giving the instance a subclass of its own class.

Guarded is `generate()`, in all its forms. Not guarded, because they are no generation: calling the model
(`model(...)` gives scores), private methods such as `_sample`, the state dict. Continuous batching is
refused.

Reports: output objects (`return_dict_in_generate`) carry them as `safety`; plain tensors carry none, since an
attribute would travel into files saved from them, so use `safeguard.capture()` or `on_report`. Where a row
was withheld, an output object holds its sequences alone: scores would tell what was withheld. With a streamer
nothing can be made a second time, so `refine`, `regenerate`, `replace` and `redact` of an answer block it.

Prompts come as tokens, so who speaks in them is read from the marks of the tokenizer's own chat template.
With `history: new` only what was said after the last answer is judged, without a system turn at the very
beginning. A text that spells those marks itself can forge an answer or a system turn; from tokens that cannot
be told. Use `history: all` (preset strict), which judges every word, or guard the pipeline, which knows its
messages.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from safeguard import flow
from safeguard.adapters.in_place import keeping_methods
from safeguard.driving import drive
from safeguard.errors import MissingExtra
from safeguard.guards import Guard
from safeguard.types import Report, Task

try:
    from transformers import AutoTokenizer

    from safeguard.adapters import token_stream
    from safeguard.adapters.token_text import TokenText
    from safeguard.adapters.transformers_job import LmJob
    from safeguard.decoding.loading import Decoder
except ImportError as exc:
    raise MissingExtra("transformers", extra="torch") from exc

T = TypeVar("T")

_CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


@dataclass(frozen=True, slots=True)
class PipelineCall:
    """What a guarded pipeline knows of a call it makes, and where it collects the reports."""

    guard: Guard
    chats: Sequence[Any] | None = None
    reports: list[Report] | None = None


_pipeline: contextvars.ContextVar[PipelineCall | None] = contextvars.ContextVar("pipeline", default=None)


@contextmanager
def within(call: PipelineCall) -> Iterator[None]:
    """Calls of `generate()` inside the block, on a model of the same guard, belong to this pipeline call."""
    token = _pipeline.set(call)
    try:
        yield
    finally:
        _pipeline.reset(token)


def pipeline_call(guard: Guard) -> PipelineCall:
    """The pipeline call of this guard that is going on, or an empty one."""
    call = _pipeline.get()
    return call if call is not None and call.guard is guard else PipelineCall(guard)


def wrap(target: T, guard: Guard, *, tokenizer: Any = None, task: Task = "llm") -> T:
    """Guard a causal language model in place and return it: the same object, whose class has the same name.

    tokenizer: the one its prompts are made with (or a processor that has it); when not given it is loaded
    from where the model came from, if that is a folder or in the hub's cache. Tokens added to it later are
    not known. Raises TypeError for a model that is guarded already or does not generate text from text,
    ValueError when no tokenizer is found, and whatever loading the policy's models raises.
    """
    model = cast(Any, target)
    base = type(model)
    if getattr(base, "__safeguard__", None) is not None:
        raise TypeError(f"this {base.__name__} is guarded already; load another model for another guard")
    _refuse_others(model)
    inner = _tokenizer_of(model, tokenizer)
    text = TokenText(inner)
    guard.prepare(task, "text")  # what is missing is said now
    decoder = Decoder.load(guard.policy.decoding, model, inner, beside=guard.folder)
    generate = _guarded(base.generate, guard, text, task, decoder)
    become_guarded(model, guard, {"generate": generate} | _refusals(base, _CONTINUOUS))
    return target


def become_guarded(target: Any, guard: Guard, members: dict[str, Any]) -> None:
    """Give an instance a subclass of its own class, of the same name, so that it saves as before."""
    base: Any = type(target)
    common = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__safeguard__": guard,
        **keeping_methods("use save_pretrained, or save its state_dict"),
    }
    target.__class__ = type(base)(base.__name__, (base,), common | members)


def _refuse_others(model: Any) -> None:
    name, config = type(model).__name__, getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"cannot guard {name}: it is an encoder-decoder, and only causal language models are supported; "
            "guard the function that calls it"
        )
    can = getattr(model, "can_generate", None)
    if not callable(can) or not can() or not callable(getattr(model, "generate", None)):
        raise TypeError(
            f"cannot guard {name}: it has no generate(); load it with AutoModelForCausalLM, or guard the "
            "function that calls it"
        )
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise TypeError(
            f"cannot guard {name}: it is asked by {model.main_input_name}, and only causal language models, "
            "which are asked by text, are supported; guard the function that calls it"
        )


def _tokenizer_of(model: Any, tokenizer: Any) -> Any:
    if tokenizer is not None:
        inner = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        if not callable(getattr(inner, "decode", None)) or not callable(inner):
            raise TypeError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
        return inner
    name = str(getattr(model, "name_or_path", "") or "")
    hint = f"pass the tokenizer: guard({type(model).__name__.lower()}, tokenizer=...)"
    if not name:
        raise ValueError(f"this {type(model).__name__} does not say where it came from; {hint}")
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as exc:
        place = "in that folder" if Path(name).is_dir() else "in the hub's cache"
        raise ValueError(f"no tokenizer of {name!r} {place}; {hint}") from exc


def _guarded(
    original: Callable[..., Any], guard: Guard, text: TokenText, task: Task, decoder: Decoder | None
) -> Callable[..., Any]:
    """The `generate` of the guarded class, with the signature and docstring of the original."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def generate(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        call = pipeline_call(guard)
        with within(PipelineCall(guard)):  # what this call calls in turn is not the pipeline's
            output, reports = _generate(
                functools.partial(original, self), _named(signature, self, args, kwargs), call
            )
        if call.reports is not None:
            call.reports.extend(reports)
            return output
        return guard.settle(reports, output)

    def _generate(
        run: Callable[..., Any], named: dict[str, Any], call: PipelineCall
    ) -> tuple[Any, list[Report]]:
        route = guard.route(task, "text")
        model = run.args[0]  # type: ignore[attr-defined]  # a partial
        streamer = named.get("streamer")
        if decoder is not None:
            run = decoder.guiding(run, model)
        job = LmJob(model, run, named, text, guard.policy, task, call.chats)
        if streamer is not None and route.outputs.checks:
            outcome = token_stream.run(route, job, streamer)
        else:
            outcome = drive(flow.run(route, job))
        reports = outcome.flat
        if decoder is not None:
            reports = [replace(report, decoding=decoder.method) for report in reports]
        return job.result(outcome.outputs, reports), reports

    return generate


def _named(signature: inspect.Signature, model: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments of a call by name."""
    bound = signature.bind(model, *args, **kwargs)
    named: dict[str, Any] = {}
    for i, (name, parameter) in enumerate(signature.parameters.items()):
        if i == 0 or name not in bound.arguments:
            continue
        value = bound.arguments[name]
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(value)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            raise TypeError("give the arguments of a guarded generate() by name")
        else:
            named[name] = value
    return named


def _refusals(base: type, names: Sequence[str]) -> dict[str, Any]:
    def refusal(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(base, name))
        def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
            raise TypeError(
                f"{name}() is not guarded, so it is closed on a guarded model; use generate() with a batch"
            )

        return refuse

    return {name: refusal(name) for name in names if hasattr(base, name)}
