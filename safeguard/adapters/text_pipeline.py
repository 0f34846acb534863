"""Guard a text-generation pipeline in place: its model is guarded, and its messages say who spoke.

The reports of a call come through `safeguard.capture()` and `on_report`; the records it returns keep their
keys.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

from safeguard.adapters import transformers as language_model
from safeguard.adapters.transformers import PipelineCall, become_guarded, pipeline_call, within
from safeguard.errors import MissingExtra
from safeguard.guards import Guard
from safeguard.types import Report, Task

try:
    from transformers import TextGenerationPipeline
except ImportError as exc:
    raise MissingExtra("transformers", extra="torch") from exc

T = TypeVar("T")


def wrap(target: T, guard: Guard, *, tokenizer: Any = None, task: Task = "llm") -> T:
    """Guard a text-generation pipeline in place, and with it its model; returns the pipeline.

    Chats are judged by their messages: with `history: new` the turns after the last answer, and the whole
    conversation where a message spells control tokens of the template. `documents` are judged as well.
    A call with several prompts settles once, at its end, so that `Blocked.output` has all its records; one
    that is read step by step (a generator or dataset in) settles prompt by prompt.
    Raises TypeError for other pipelines, and when pipeline or model are guarded already by another guard.
    """
    pipe = cast(Any, target)
    base = type(pipe)
    if not isinstance(pipe, TextGenerationPipeline):
        raise TypeError(
            f"cannot guard {base.__name__}: of the transformers pipelines only text-generation is supported; "
            "guard the function that calls it"
        )
    if getattr(base, "__safeguard__", None) is not None:
        raise TypeError(f"this {base.__name__} is guarded already; build another pipeline for another guard")
    owner = getattr(type(pipe.model), "__safeguard__", None)
    if owner is None:
        language_model.wrap(pipe.model, guard, tokenizer=tokenizer or pipe.tokenizer, task=task)
    elif owner is not guard:
        raise TypeError(
            "the model of this pipeline is guarded already by another guard; use that one, or load another"
        )
    become_guarded(pipe, guard, _members(base, guard))
    return target


def _members(base: Any, guard: Guard) -> dict[str, Any]:
    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        reports: list[Report] = []
        with within(PipelineCall(guard, None, reports)):
            try:
                output = base.__call__(self, *args, **kwargs)
            except BaseException:
                guard.tell_unfinished(reports)  # what was made before is lost, but not what is known of it
                raise
        if isinstance(output, Iterator):  # nothing was generated yet; each step settles for itself
            return output
        return guard.settle(reports, output) if reports else output

    @functools.wraps(base.preprocess)
    def preprocess(self: Any, prompt_text: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = base.preprocess(self, prompt_text, *args, **kwargs)
        documents = kwargs.get("documents") or (kwargs.get("tokenizer_encode_kwargs") or {}).get("documents")
        if documents and hasattr(prompt_text, "messages"):
            prompt_text.safeguard_documents = documents
        return inputs

    @functools.wraps(base._forward)
    def forward(self: Any, model_inputs: Any, **kwargs: Any) -> Any:
        if getattr(type(self.model), "__safeguard__", None) is not guard:
            raise TypeError(
                "the model of this guarded pipeline was replaced by one without its guard; guard it first"
            )
        chats = model_inputs["prompt_text"]
        asked = PipelineCall(guard, _as_list(chats), pipeline_call(guard).reports)
        with within(asked):
            return base._forward(self, model_inputs, **kwargs)

    return {"__call__": call, "preprocess": preprocess, "_forward": forward}


def _as_list(chats: Any) -> Sequence[Any]:
    return chats if isinstance(chats, list | tuple) else [chats]
