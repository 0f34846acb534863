"""One guarded call of `generate()`: its prompts as text, its rows of tokens, and its output put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from safeguard import calls
from safeguard.adapters.chat import Part
from safeguard.adapters.messages import words_of
from safeguard.adapters.token_stream import TokenStream
from safeguard.adapters.token_text import TokenText
from safeguard.errors import CheckFailed
from safeguard.judging import Piece, text_piece
from safeguard.policy import Policy
from safeguard.types import Modality, Report, Span, Task

_PROMPTS = ("input_ids", "inputs")
_SEEN = frozenset(
    [*_PROMPTS, "attention_mask", "position_ids", "token_type_ids", "cache_position", "logits_to_keep"]
    + ["negative_prompt_ids", "negative_prompt_attention_mask", "tokenizer", "assistant_tokenizer"]
    + ["generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"]
    + ["assistant_model", "streamer", "custom_generate", "synced_gpus", "use_model_defaults"]
)
"""Arguments that say nothing a check has not read, besides those of a generation config."""

_SHAPED = ("position_ids", "token_type_ids", "cache_position", "past_key_values")
"""Arguments made for the batch as it was given; left out when it is generated in another shape."""


class Made(str):
    """A continuation as text, with its tokens."""

    __slots__ = ("ids",)
    ids: tuple[int, ...]

    @classmethod
    def of(cls, text: str, ids: Sequence[int]) -> Made:
        """The continuation of these tokens that reads as this text."""
        made = cls(text)
        made.ids = tuple(ids)
        return made


class LmJob:
    """One call of a guarded language model, as the flow sees it.

    Outputs keep the prompt's tokens as they were given, also where another prompt was generated from, so that
    what callers cut off by length is right.
    """

    modality: Modality = "text"
    on_loop = False

    def __init__(
        self,
        model: Any,
        generate: Callable[..., Any],
        named: dict[str, Any],
        text: TokenText,
        policy: Policy,
        task: Task,
        chats: Sequence[Any] | None = None,
    ) -> None:
        self.task: Task = task
        self.text, self._generate, self._named, self._policy = text, generate, named, policy
        self._model_config = model.generation_config
        self.ids = _prompt_ids(named)
        self._tokens: list[list[int]] = [] if self.ids is None else self.ids.tolist()
        self._device = self.ids.device if self.ids is not None else model.device
        self._key = "inputs" if named.get("inputs") is not None else "input_ids"
        self._rows = _batch_size(self.ids, named)
        if self._rows > policy.max_items:
            raise ValueError(
                f"a call may have at most {policy.max_items} items (max_items), got {self._rows}"
            )
        embeds = named.get("inputs_embeds") is not None
        self._width = self.ids.shape[1] if self.ids is not None else 0 if embeds else 1
        self.outputs = int(self._value("num_return_sequences") or 1)
        mask = named.get("attention_mask")
        self._mask = mask if _same_shape(mask, self.ids) else None
        self._chats = chats if chats is not None and len(chats) == self._rows else None
        self._parts: list[list[Part]] = []
        self.asks: Sequence[calls.Ask] = [self._ask(row) for row in range(self._rows)]
        self._tried: dict[tuple[int, int], set[tuple[tuple[str, str], ...]]] = {}
        self._result: Any = None
        self._made: list[Made] = []
        self._asked_otherwise = False  # whether a prompt was rewritten before the first generation
        self._echo = True  # whether the model gives the prompt back before what it adds

    # --- what is asked ------------------------------------------------------------------------

    def _ask(self, row: int) -> calls.Ask:
        ids = self._read(row)
        unseen = _unseen(self._named)
        if any(i > self.text.largest or i < 0 for i in ids):
            unseen = (*unseen, "a token that the tokenizer does not know")
            ids = [i for i in ids if 0 <= i <= self.text.largest]
        parts = self.text.parts(ids, self._policy.history, self._messages(row)) if ids else []
        self._parts.append(parts)
        texts = {part.name: part.text for part in parts}
        documents = getattr(self._chat(row), "safeguard_documents", None)
        if documents:
            texts["documents"] = "\n".join(words_of(documents))
        negative = self._named.get("negative_prompt_ids")
        if isinstance(negative, torch.Tensor) and negative.dim() == 2 and len(negative):
            said = self.text.plain(self.text.decode(negative[min(row, len(negative) - 1)].tolist()))
            texts[self._negative_name()] = said
        return calls.Ask({n: t for n, t in texts.items() if t != ""}, unseen, self.outputs)

    def _negative_name(self) -> str:
        """Below a guidance scale of 1 a negative prompt draws the model: then it is judged like any other."""
        scale = self._value("guidance_scale")
        return "guiding_prompt" if scale is not None and not scale >= 1 else calls.NEGATIVE

    def _read(self, row: int) -> list[int]:
        """Tokens of one prompt. Left out are masked control tokens and masked ends of one repeated sign.

        Other masked tokens are read: recurrent models see them in spite of the mask.
        """
        if self.ids is None:
            return []
        ids = self._tokens[row]
        if self._mask is None:
            return ids
        shown: list[bool] = [bool(v) for v in self._mask[row].tolist()]
        padding = {i for i, id_ in enumerate(ids) if not shown[i] and id_ in self.text.special_ids}
        for order in (range(len(ids)), range(len(ids) - 1, -1, -1)):
            first = next(iter(order), None)
            for i in order:
                if first is None or shown[i] or ids[i] != ids[first] or self._is_word(ids[i]):
                    break
                padding.add(i)
        return [id_ for i, id_ in enumerate(ids) if i not in padding]

    def _is_word(self, id_: int) -> bool:
        """Whether a token says something by itself; such a one is no padding."""
        return 0 <= id_ <= self.text.largest and any(c.isalnum() for c in self.text.decode([id_]))

    def _chat(self, row: int) -> Any:
        return self._chats[row] if self._chats is not None else None

    def _messages(self, row: int) -> Any:
        return getattr(self._chat(row), "messages", None)

    def _value(self, name: str) -> Any:
        """A generation setting as this call sees it: argument, else the call's config, else the model's."""
        if name in self._named:
            return self._named[name]
        given = getattr(self._named.get("generation_config"), name, None)
        return given if given is not None else getattr(self._model_config, name, None)

    # --- generating ---------------------------------------------------------------------------

    def first(
        self, texts: Sequence[calls.Texts | None], stream: TokenStream | None = None
    ) -> list[list[Any]]:
        """Continue all prompts that were not refused, in one batch."""
        live = [i for i, t in enumerate(texts) if t is not None]
        said = {i: t for i, t in enumerate(texts) if t is not None}
        for i in live:
            for place in range(self.outputs):
                self._tried[i, place] = {_key(said[i])}
        rows = self._run(live, said, {}, stream, keep=True)
        if len(rows) != len(live) * self.outputs:
            raise TypeError(
                f"generate() gave {len(rows)} rows for {len(live)} prompts x {self.outputs} sequences"
            )
        self._made = rows
        made: list[list[Any]] = [[] for _ in texts]
        for at, i in enumerate(live):
            made[i] = list(rows[at * self.outputs : (at + 1) * self.outputs])
        return made

    def again(self, ask: int, place: int, texts: calls.Texts) -> Any:
        """One more continuation of one prompt; sampled where the same words were continued before."""
        changes: dict[str, Any] = {"num_return_sequences": 1}
        tried = self._tried.setdefault((ask, place), set())
        if _key(texts) in tried and not self._value("do_sample"):
            changes["do_sample"] = True  # greedy search would only give the same again
            if not (self._value("temperature") or 0) > 0:
                changes["temperature"] = 1.0
        tried.add(_key(texts))
        rows = self._run([ask], {ask: texts}, changes)
        if not rows:
            raise TypeError("generate() gave no rows for one prompt")
        return rows[0]

    def _run(
        self,
        live: Sequence[int],
        texts: Mapping[int, calls.Texts],
        changes: Mapping[str, Any],
        stream: TokenStream | None = None,
        *,
        keep: bool = False,
    ) -> list[Made]:
        named = {**self._arguments(live, texts, again=not keep), **changes}
        prompt = _prompt_ids(named)
        if stream is not None:
            stream.expect(prompt, self.ids)
            criteria = named.get("stopping_criteria")
            named |= {
                "streamer": stream,
                "stopping_criteria": StoppingCriteriaList([*(criteria or ()), stream.stop]),
            }
        result = self._generate(**named)
        sequences = getattr(result, "sequences", result)
        if not isinstance(sequences, torch.Tensor) or sequences.dim() != 2 or sequences.is_floating_point():
            raise TypeError(f"generate() must give tokens that can be judged, got {type(result).__name__}")
        width = prompt.shape[1] if prompt is not None else self._width
        echo = self._echoes(sequences, prompt, width, len(live))
        if keep:
            self._result, self._echo = result, echo
            self._asked_otherwise = any(self._revised(i, texts[i]) is not None for i in live)
        return [
            Made.of(self.text.decode([i for i in ids if i <= self.text.largest]), ids)
            for ids in sequences[:, width if echo else 0 :].tolist()
        ]

    def _echoes(self, sequences: torch.Tensor, prompt: torch.Tensor | None, width: int, rows: int) -> bool:
        """Whether the rows begin with their prompts; where they do not, all of a row counts as made."""
        if prompt is None:
            return True
        if not rows or len(sequences) % rows:
            return False
        wanted = prompt.to(sequences.device).repeat_interleave(len(sequences) // rows, 0)
        return bool(sequences.shape[1] >= width and torch.equal(sequences[:, :width], wanted))

    def _arguments(
        self, live: Sequence[int], texts: Mapping[int, calls.Texts], *, again: bool
    ) -> dict[str, Any]:
        """The call's arguments for some of its rows; exactly as given when nothing is different."""
        revised = {i: ids for i in live if (ids := self._revised(i, texts[i])) is not None}
        everything = len(live) == self._rows
        if everything and not revised and not again:
            return dict(self._named)
        named = {n: self._narrowed(n, v, live) for n, v in self._named.items()}
        named.pop("past_key_values", None)  # belongs to another shape, or was filled by the call before
        allowed = named.get("prefix_allowed_tokens_fn")
        if allowed is not None:  # it is told a row's number, which must be the one it would have had
            each = self.outputs if (self._value("num_beams") or 1) == 1 else 1
            now = 1 if again else each
            named["prefix_allowed_tokens_fn"] = lambda b, ids: allowed(live[b // now] * each + b % now, ids)
        return self._reshaped(named, live, revised) if revised else named

    def _narrowed(self, name: str, value: Any, live: Sequence[int]) -> Any:
        if len(live) == self._rows or not isinstance(value, torch.Tensor) or name in _config_names():
            return value
        if value.dim() == 0 or value.shape[0] != self._rows:
            return value
        return value[torch.as_tensor(list(live), device=value.device)]

    def _revised(self, row: int, texts: calls.Texts) -> list[int] | None:
        """Tokens of a prompt that reads differently now, None where it is as it was given."""
        parts = self._parts[row]
        names = {part.name for part in parts}
        changed = [n for n, t in self.asks[row].texts.items() if texts.get(n, t) != t]
        if not changed:
            return None
        if not names.issuperset(changed):
            raise CheckFailed("safeguard", f"cannot put a new text in the place of {changed[0]}")
        ids = self.text.rewritten(self._read(row), parts, texts, self._messages(row))
        return ids or self._end() or [self.pad_id()]  # nothing is left of it, and a model needs one token

    def _reshaped(
        self, named: dict[str, Any], live: Sequence[int], revised: Mapping[int, list[int]]
    ) -> dict[str, Any]:
        """Arguments for prompts of new lengths, padded on the left."""
        rows: list[list[int]] = []
        masks: list[list[int]] = []
        width = max(self._width, *(len(ids) for ids in revised.values()))
        pad = self.pad_id()
        for i in live:
            ids = revised[i] if i in revised else self._tokens[i]
            given = None if i in revised or self._mask is None else self._mask[i].tolist()
            mask = given if given is not None else [1] * len(ids)
            rows.append([pad] * (width - len(ids)) + ids)
            masks.append([0] * (width - len(ids)) + mask)
        named = {n: v for n, v in named.items() if n not in _SHAPED}
        named[self._key] = torch.tensor(rows, dtype=torch.long, device=self._device)
        named["attention_mask"] = torch.tensor(masks, dtype=torch.long, device=self._device)
        shift = width - self._width
        for limit, fresh in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            total = self._value(limit)
            if shift and total and self._value(fresh) is None:
                named[limit] = total + shift  # as many new tokens as the caller asked for
        return named

    # --- judging and putting together ---------------------------------------------------------

    def pieces(self, outputs: Sequence[Any], policy: Policy) -> list[Piece]:
        """What the checks see of each continuation."""
        return [text_piece("output", str(output), policy) for output in outputs]

    def placeholder(self, output: Any) -> Made:
        """The policy's placeholder as a continuation that has ended."""
        text = self._policy.placeholder_text
        return Made.of(text, [*self.text.encode(text), *self._end()] if text else self._end())

    def redact(self, output: Any, spans: Sequence[Span]) -> Made:
        """The continuation with its flagged places replaced, made of new tokens."""
        text = calls.cut_spans(str(output), spans, self._policy.placeholder_text or "[redacted]")
        return Made.of(text, [*self.text.encode(text), *self._end()])

    def _end(self) -> list[int]:
        eos = _one(self._value("eos_token_id"))
        eos = self.text.eos if eos is None else eos
        return [] if eos is None else [eos]

    def pad_id(self) -> int:
        """What short rows are filled up with."""
        known = (_one(self._value("pad_token_id")), self.text.pad, *self._end(), 0)
        return next(i for i in known if i is not None and i >= 0)

    def result(self, outputs: Sequence[Sequence[Any]], reports: Sequence[Report]) -> Any:
        """What the call returns: the model's own object where nothing was changed.

        Where something was, the output object holds the sequences alone: scores and hidden states would tell
        what was withheld, and their rows no longer fit.
        """
        rows: list[Made] = [row for made in outputs for row in made]
        same = len(rows) == len(self._made) and all(a is b for a, b in zip(rows, self._made, strict=True))
        result = self._result
        if not same or result is None:
            result = self._rebuilt(rows)
        elif self._asked_otherwise and self._echo:
            sequences = self._sequences(rows)
            if isinstance(result, ModelOutput):
                result.sequences = sequences
            else:
                result = sequences
        if isinstance(result, ModelOutput):
            result.safety = tuple(reports)
        return result

    def _sequences(self, rows: Sequence[Made]) -> torch.Tensor:
        """Prompts as they were given and what follows them, padded on the right."""
        given = self._result.sequences if isinstance(self._result, ModelOutput) else self._result
        device = given.device if given is not None else self._device
        pad = self.pad_id()
        ids = [_trimmed(row.ids, pad, self._end()) for row in rows]
        width = max((len(row) for row in ids), default=0)
        filled = [[*row, *[pad] * (width - len(row))] for row in ids]
        sequences = torch.tensor(filled, dtype=torch.long, device=device).reshape(len(rows), width)
        if self._echo and self._width:
            sequences = torch.cat([self._prompts(len(rows)).to(device), sequences], dim=1)
        return sequences

    def _rebuilt(self, rows: Sequence[Made]) -> Any:
        sequences = self._sequences(rows)
        if isinstance(self._result, ModelOutput):
            return type(self._result)(sequences=sequences)
        if self._result is None and self._value("return_dict_in_generate"):
            beams = (self._value("num_beams") or 1) > 1
            return (GenerateBeamDecoderOnlyOutput if beams else GenerateDecoderOnlyOutput)(
                sequences=sequences
            )
        return sequences

    def _prompts(self, rows: int) -> torch.Tensor:
        """The prompts as they were given, one per output row."""
        if self.ids is not None:
            return self.ids.repeat_interleave(self.outputs, 0)
        bos = _one(self._value("bos_token_id"))
        return torch.full((rows, self._width), self.pad_id() if bos is None else bos, dtype=torch.long)


def _prompt_ids(named: Mapping[str, Any]) -> torch.Tensor | None:
    given = [named[n] for n in _PROMPTS if named.get(n) is not None]
    if len(given) > 1:
        raise ValueError("give input_ids or inputs, not both")
    if not given:
        return None
    ids = given[0]
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
        got = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"input_ids must be a tensor of tokens of shape (batch, length), got {got}")
    return ids


def _batch_size(ids: torch.Tensor | None, named: Mapping[str, Any]) -> int:
    if ids is not None:
        return int(ids.shape[0])
    tensors = [v for v in named.values() if isinstance(v, torch.Tensor) and v.dim() > 0]
    return int(tensors[0].shape[0]) if tensors else 1  # as generate() itself counts


def _same_shape(mask: Any, ids: torch.Tensor | None) -> bool:
    return bool(isinstance(mask, torch.Tensor) and ids is not None and mask.shape == ids.shape)


@cache
def _config_names() -> frozenset[str]:
    return frozenset(vars(GenerationConfig()))


def _unseen(named: Mapping[str, Any]) -> tuple[str, ...]:
    """Arguments by which something could be said to the model that no check has read."""
    known = _SEEN | _config_names()
    return tuple(n for n, v in named.items() if n not in known and _says_something(v))


def _says_something(value: Any) -> bool:
    length = getattr(value, "get_seq_length", None)
    if callable(length):  # a cache: what is in it was never text here
        return int(length()) > 0
    if isinstance(value, torch.Tensor):
        return bool(value.numel() > 0)
    if isinstance(value, str | bytes | Mapping | list | tuple | set):
        return len(value) > 0
    return value is not None and not isinstance(value, bool | int | float)


def _trimmed(ids: Sequence[int], pad: int, end: Sequence[int]) -> list[int]:
    """A row without its padding; where padding is the end token itself, one stays."""
    size = len(ids)
    while size and ids[size - 1] == pad:
        size -= 1
    return [*ids[:size], *(end if size < len(ids) and pad in end else ())]


def _one(ids: Any) -> int | None:
    """The first of one token or several."""
    if isinstance(ids, torch.Tensor):
        ids = ids.flatten().tolist()
    if isinstance(ids, list | tuple):
        ids = ids[0] if ids else None
    return None if ids is None else int(ids)


def _key(texts: calls.Texts) -> tuple[tuple[str, str], ...]:
    return tuple(texts.items())
