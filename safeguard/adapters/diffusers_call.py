"""What a call of a diffusers pipeline asks for: its texts, what no check can read, the same for one row."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from safeguard.adapters.in_place import kept
from safeguard.calls import Ask, Texts

_PER_ASK = re.compile(r"(?:(?:neg|negative|content|task|source)_)?prompt(?:_\d+)?")
"""Text arguments of which a list has one text per prompt of the batch; any other list goes to all of them."""
_PROMPT = re.compile(r"(?:\w+_)?prompts?(?:_\d+)?")
"""Arguments that must be text: what else stands in them cannot be judged."""
_FILE = re.compile(r"(?:\w+_)?(?:image|images|video|videos|audio|mask|file|fonts)")
"""Arguments whose strings are places of files."""
_WORD = re.compile(r"[\w.+-]{0,40}")

_SETTINGS = frozenset(
    {
        "cache_implementation",
        "callback_on_step_end_tensor_inputs",
        "data_type",
        "encoding",
        "mixed_precision_format",
        "mixed_precision_reasoner_policy",
        "mode",
        "output_type",
        "prior_callback_on_step_end_tensor_inputs",
        "resample_method_input",
        "resample_method_output",
        "sampling_method",
        "sampling_type",
        "task_type",
        "token_type",
    }
)
"""Arguments that choose among fixed words. A value that is no single word is judged like any other text."""

_OPAQUE = frozenset(
    {
        "conditioning_features",
        "encoder_hidden_states",
        "input_ids",
        "input_tokens",
        "negative_encoder_hidden_states",
        "prior_token_ids",
        "prompt_latents",
        "text_model_output",
    }
)
"""Arguments that carry a prompt in a form that no check can read, besides those named `embed`."""

_COUNTS = (
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "num_waveforms_per_prompt",
    "num_designs_per_prompt",
)
_NOISE = ("latents", "prior_latents")
_DEEPEST = 8


class _Unreadable(Exception):
    """A value that may hold text, in a form that nothing here can read."""


@dataclasses.dataclass(frozen=True, slots=True)
class TextArgument:
    """One argument and the texts in it, in order. per_ask: one text per prompt, otherwise all go to all."""

    name: str
    value: Any = dataclasses.field(repr=False)
    leaves: tuple[Any, ...] = dataclasses.field(repr=False)
    per_ask: bool

    @property
    def sources(self) -> list[str]:
        """Names of the texts in reports: the argument, numbered where it holds several."""
        if self.per_ask or self.value is self.leaves[0]:
            return [self.name]
        return [f"{self.name}[{i}]" for i in range(len(self.leaves))]

    def texts_of(self, ask: int) -> dict[str, Any]:
        """The texts that one prompt of the batch gets."""
        if self.per_ask:
            return {self.name: self.leaves[ask]}
        return dict(zip(self.sources, self.leaves, strict=True))

    def with_texts(self, texts: Sequence[Texts | None]) -> Any:
        """The value of the argument with these texts; the very texts that were given where nothing changed.

        A refused prompt (None) becomes an empty text. A text that goes to all prompts was judged with each of
        them; where it was refined, the words found for the first prompt that is left are taken.
        """
        if self.per_ask:
            new = ["" if t is None else t[self.name] for t in texts]
        else:
            live = next(t for t in texts if t is not None)
            new = [live[source] for source in self.sources]
        if all(a is b for a, b in zip(new, self.leaves, strict=True)):
            return kept(self.value)
        return _replaced(self.value, iter(new), strict=_PROMPT.fullmatch(self.name) is not None)


class Call:
    """One call, bound by the names of the pipeline's own parameters, never by position.

    rows is the number of prompts in the batch; 1 where there are none. Raises TypeError, as the pipeline
    itself would, for arguments that it does not take.
    """

    def __init__(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._signature = self.signature = signature
        self._bound = signature.bind(*args, **kwargs)
        self._extra = next(
            (p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD), None
        )
        self._self = next(iter(signature.parameters), "")
        self.values: dict[str, Any] = {k: v for k, v in self._bound.arguments.items() if k != self._extra}
        self.values.pop(self._self, None)
        self.values.update(self._bound.arguments.get(self._extra or "", {}))
        given = {name: value for name, value in self.values.items() if not self._is_default(name, value)}
        self.unseen: list[str] = [n for n, v in given.items() if _is_opaque(n, v)]
        self.rows = _rows(self.values, self.unseen)
        self.texts = self._read({n: v for n, v in given.items() if n not in self.unseen})

    def get(self, name: str) -> Any:
        """Value of an argument as given, else its default; None where the pipeline has no such parameter."""
        if name in self.values:
            return self.values[name]
        parameter = self._signature.parameters.get(name)
        return None if parameter is None or parameter.default is parameter.empty else parameter.default

    @property
    def per_prompt(self) -> int:
        """How many outputs are asked for per prompt."""
        counts = [count for name in _COUNTS if isinstance(count := self.get(name), int)]
        return max([1, *counts])

    def asks(self) -> list[Ask]:
        """One ask per prompt of the batch, its main text first."""
        order = sorted(self.texts, key=lambda a: (a.name != "prompt", a.name.startswith("neg")))
        return [
            Ask(
                {source: text for a in order for source, text in a.texts_of(row).items()},
                tuple(self.unseen),
                self.per_prompt,
            )
            for row in range(self.rows)
        ]

    def batch(self, texts: Sequence[Texts | None]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for the whole batch with these texts."""
        return self._arguments({a.name: a.with_texts(texts) for a in self.texts})

    def single(
        self, ask: int, row: int, outputs: int, texts: Texts
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for one new output: what is given per prompt or output narrowed, given noise dropped.

        row: place among all `outputs` of the batch.
        """
        changes: dict[str, Any] = {name: 1 for name in _COUNTS if name in self._signature.parameters}
        counted = self.per_prompt > 1
        for name, value in self.values.items():
            if name not in _COUNTS:
                changes[name] = _narrowed(name, value, (ask, self.rows), (row, outputs), counted=counted)
        for argument in self.texts:
            if argument.per_ask:
                changes[argument.name] = type(argument.value)([texts[argument.name]])
            else:
                changes[argument.name] = argument.with_texts([texts])
        noise = [name for name in _NOISE if "prompt" in self._signature.parameters and name in changes]
        return self._arguments(changes, noise)

    def _arguments(
        self, changes: Mapping[str, Any], dropped: Sequence[str] = ()
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, without the pipeline itself."""
        arguments = dict(self._bound.arguments)
        extra = dict(arguments.get(self._extra or "", {}))
        for name, value in changes.items():
            (extra if name in extra else arguments)[name] = value
        for name in dropped:
            arguments.pop(name, None)
            extra.pop(name, None)
        if self._extra is not None and extra:
            arguments[self._extra] = extra
        ordered = {name: arguments[name] for name in self._signature.parameters if name in arguments}
        bound = inspect.BoundArguments(self._signature, ordered)
        return bound.args[1:], bound.kwargs

    def _is_default(self, name: str, value: Any) -> bool:
        """Whether this is what the pipeline would have used anyway."""
        parameter = self._signature.parameters.get(name)
        if value is None or parameter is None:
            return value is None
        default = parameter.default
        if isinstance(default, str | list | tuple | dict):
            return type(value) is type(default) and bool(value == default)
        return False

    def _read(self, given: Mapping[str, Any]) -> list[TextArgument]:
        """All arguments that hold text; those that cannot be read are added to `unseen`."""
        found: list[TextArgument] = []
        for name, value in given.items():
            if (_FILE.fullmatch(name) and _is_place(value)) or (name in _SETTINGS and _is_word(value)):
                continue
            strict = _PROMPT.fullmatch(name) is not None
            value = kept(value)
            try:
                leaves = tuple(_leaves(value, strict=strict))
            except _Unreadable:
                self.unseen.append(name)
                continue
            if not leaves:
                continue
            flat = isinstance(value, list | tuple) and len(leaves) == len(value) == self.rows
            flat = flat and all(leaf is item for leaf, item in zip(leaves, value, strict=True))
            found.append(TextArgument(name, value, leaves, flat and _PER_ASK.fullmatch(name) is not None))
        return found


def _is_opaque(name: str, value: Any) -> bool:
    """Whether an argument carries meaning that no check can read, such as prompt_embeds."""
    if value is None or isinstance(value, bool | int | float | str):
        return False
    if name in _OPAQUE:
        return True
    return "embed" in name and not name.endswith(("_scale", "_mask", "_mask_2"))


def _is_place(value: Any) -> bool:
    """Whether strings in it look like paths and addresses; one of several words is judged as text."""
    places = value if isinstance(value, list | tuple) else [value]
    return not any(isinstance(place, str) and len(place.split()) > 1 for place in places)


def _is_word(value: Any) -> bool:
    words = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(word, str) and _WORD.fullmatch(word) for word in words)


def _rows(values: Mapping[str, Any], unseen: Sequence[str]) -> int:
    """Number of prompts in the batch."""
    names = [n for n in ("prompt", *sorted(values)) if _PER_ASK.fullmatch(n) and not n.startswith("neg")]
    for name in names:
        value = values.get(name)
        if value is None or name in unseen:
            continue
        return max(len(value), 1) if isinstance(value, list | tuple) else 1
    for name in ("prompt_embeds", *unseen):
        value = values.get(name)
        shape = getattr(value, "shape", None)
        if shape is not None and len(shape) > 1:
            return max(int(shape[0]), 1)
        if name == "prompt_embeds" and isinstance(value, list):
            return max(len(value), 1)
    return 1


def _leaves(value: Any, *, strict: bool, depth: int = 0) -> Iterator[Any]:
    """All texts in a value, in order, keys of mappings too. strict: whatever is no text is given as well."""
    if isinstance(value, str | bytes | bytearray):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        if depth == _DEEPEST:
            raise _Unreadable
        for part in _parts(value):
            yield from _leaves(part, strict=strict and not isinstance(value, Mapping), depth=depth + 1)
    elif value is None or isinstance(value, bool | int | float):
        if strict and depth:  # alone it is a switch, such as use_system_prompt
            yield value
    elif strict or _holds_text(value):
        raise _Unreadable


def _parts(value: Any) -> Iterator[Any]:
    if not isinstance(value, Mapping):
        yield from value
        return
    for key, part in value.items():
        if isinstance(key, str) and _is_opaque(key, part):
            raise _Unreadable
        yield key
        yield part


def _holds_text(value: Any) -> bool:
    """Whether an object of another kind may hold text: sets, iterators, arrays of strings, dataclasses."""
    if getattr(getattr(value, "dtype", None), "kind", "") in ("U", "S", "O", "T"):
        return True
    if isinstance(value, Collection | Iterator) and not hasattr(value, "shape"):
        return not isinstance(value, range)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(
            any(True for _ in _leaves(getattr(value, f.name), strict=False, depth=_DEEPEST - 1))
            for f in dataclasses.fields(value)
        )
    return False


def _replaced(value: Any, texts: Iterator[Any], *, strict: bool, depth: int = 0) -> Any:
    """A copy of the value with its texts replaced in the order of `_leaves`."""
    if isinstance(value, str | bytes | bytearray):
        return next(texts)
    if isinstance(value, Mapping):
        within = partial(_replaced, texts=texts, strict=False, depth=depth + 1)
        return {within(key): within(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_replaced(part, texts, strict=strict, depth=depth + 1) for part in value])
    return next(texts) if strict and depth else value


def _narrowed(name: str, value: Any, ask: tuple[int, int], row: tuple[int, int], *, counted: bool) -> Any:
    """What one output of a batch gets of an argument; the value itself where it is not given per item.

    ask, row: place and number, among the prompts and among the outputs. counted: several outputs per prompt
    were asked for, so that a list of pictures as long is no batch.
    """
    shape: Sequence[int] = getattr(value, "shape", ())
    if isinstance(value, list) and (name == "generator" or _is_pictures(name, value)):
        length = len(value)
    elif len(shape) >= 4 or (len(shape) in (2, 3) and ("embed" in name or name.endswith("attention_mask"))):
        length = int(shape[0])
    else:
        return value
    if length == ask[1] > 1:
        place = ask[0]
    elif length == row[1] and (ask[1] > 1 or shape or not counted or name == "generator"):
        place = row[0]
    else:
        return value
    return value[place] if name == "generator" else value[place : place + 1]


def _is_pictures(name: str, value: list[Any]) -> bool:
    """Whether a list has a picture per item; those of IP adapters have one per adapter."""
    return not name.startswith("ip_adapter") and all(
        hasattr(item, "shape") or hasattr(item, "getpixel") for item in value
    )
