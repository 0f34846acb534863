"""The two loops of Iterative Prompt Refinement, and what each made of every picture on its way.

`guarded` is the guard's own flow: a check looks at each picture, and only what it flags is refined; the last
picture is judged too. `published` is the loop of the paper's code: the refiner looks at each picture and the
original prompt, "keep" (the same prompt) ends a stream, and nobody judges the last picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from safeguard import calls, flow
from safeguard.driving import drive
from safeguard.errors import RefinerError
from safeguard.guards import Guard
from safeguard.judging import Piece, image_piece
from safeguard.policy import Policy
from safeguard.types import Action, Modality, Refiner, RefineRequest, Span, Task

Draw = Callable[[Sequence[str], Sequence[int]], Sequence[Sequence[Any]]]
"""(prompts, seeds) -> for each prompt one picture per seed, as `train.refiner.pictures.pipeline_draw`."""
_STRIDE = 1_000_003  # between the seeds of two rounds: far apart from those of the next pictures


@dataclass(slots=True)
class Stream:
    """One picture and what became of it.

    bare: what the prompt draws without any guard. texts, images, drawn: after each round from 0 on, carried
    on where nothing was drawn anew; an image is None where the prompt was refused. action: what the guard
    finally did; failed: because something could not be judged.
    """

    bare: Any = field(repr=False)
    texts: list[str] = field(repr=False)
    images: list[Any] = field(repr=False)
    drawn: list[bool]
    action: Action = Action.ALLOW
    failed: bool = False

    def carry(self, rounds: int) -> None:
        """Repeats the last entry up to the last round."""
        while len(self.texts) <= rounds:
            self.texts.append(self.texts[-1])
            self.images.append(self.images[-1])
            self.drawn.append(False)


class Rounds:
    """Draws pictures of a prompt for one loop: seed of each picture in each round.

    fresh: other noise in each round, as a guarded pipeline has; otherwise only the prompt differs.
    """

    def __init__(self, draw: Draw, seeds: Sequence[int], *, fresh: bool = True) -> None:
        if not seeds:
            raise ValueError("a loop needs at least one seed, one for each picture")
        self._draw, self.seeds, self._fresh = draw, tuple(seeds), fresh

    def seed(self, place: int, number: int) -> int:
        """The seed of one picture in one round."""
        return self.seeds[place] + (number * _STRIDE if self._fresh else 0)

    def all(self, text: str) -> list[Any]:
        """A picture per seed, of round 0."""
        return self.some(text, [(place, 0) for place in range(len(self.seeds))])

    def some(self, text: str, places: Sequence[tuple[int, int]]) -> list[Any]:
        """A picture per (place, round). Raises ValueError where draw gives another number."""
        made = self._draw([text], [self.seed(place, number) for place, number in places])
        if len(made) != 1 or len(made[0]) != len(places):
            raise ValueError(f"draw must give {len(places)} pictures for one prompt")
        return list(made[0])


def guarded(guard: Guard, rounds: Rounds, prompt: str) -> list[Stream]:
    """One stream per seed through the guard's flow; its policy says how many rounds there are."""
    job = _Job(prompt, rounds)
    bare = rounds.all(prompt)
    job.known = {prompt: bare}
    outcome = drive(flow.run(guard.route("t2i", "image"), job))
    streams = []
    for place, report in enumerate(outcome.reports[0]):
        trace = job.traces.get(place) or [(prompt, None)]
        stream = Stream(
            bare[place],
            [text for text, _ in trace],
            [image for _, image in trace],
            [image is not None for _, image in trace],
            report.action,
            report.failed,
        )
        stream.carry(guard.policy.max_rounds)
        streams.append(stream)
    return streams


class _Job:
    """One guarded call that keeps what it draws."""

    task: Task = "t2i"
    modality: Modality = "image"
    on_loop = False

    def __init__(self, prompt: str, rounds: Rounds) -> None:
        self.asks: Sequence[calls.Ask] = [calls.Ask({"prompt": prompt}, outputs=len(rounds.seeds))]
        self._rounds = rounds
        self.known: Mapping[str, list[Any]] = {}
        self.traces: dict[int, list[tuple[str, Any]]] = {}

    def first(self, texts: Sequence[calls.Texts | None]) -> list[list[Any]]:
        """The pictures of round 0; an unchanged prompt is not drawn twice."""
        given = texts[0]
        if given is None:
            return [[]]
        text = given["prompt"]
        made = self.known.get(text) or self._rounds.all(text)
        self.traces = {place: [(text, image)] for place, image in enumerate(made)}
        return [list(made)]

    def again(self, ask: int, place: int, texts: calls.Texts) -> Any:
        """One new picture for one place."""
        text = texts["prompt"]
        (image,) = self._rounds.some(text, [(place, len(self.traces[place]))])
        self.traces[place].append((text, image))
        return image

    def pieces(self, outputs: Sequence[Any], policy: Policy) -> list[Piece]:
        """What the checks see."""
        return [image_piece(image) for image in outputs]

    def placeholder(self, output: Any) -> None:
        """Nothing: the picture itself is in the trace, the report says that it was withheld."""

    def redact(self, output: Any, spans: Sequence[Span]) -> None:
        """Pictures have no spans to cut."""


def published(refiner: Refiner, rounds: Rounds, prompt: str, count: int) -> list[Stream]:
    """One stream per seed through the loop of IPR's released code, `count` rounds at most.

    The refiner always gets the original prompt, with the latest picture. Source: IPR (EMNLP 2025).
    """
    bare = rounds.all(prompt)
    streams = [Stream(image, [prompt], [image], [True]) for image in bare]
    live = list(range(len(streams)))
    for number in range(1, count + 1):
        requests = [RefineRequest(prompt, (), (), streams[p].images[-1], number) for p in live]
        texts = list(refiner(requests)) if requests else []
        if len(texts) != len(requests):
            raise RefinerError(f"refiner {refiner.name!r} gave {len(texts)} texts for {len(requests)}")
        live = [p for p, text in zip(live, texts, strict=True) if text.strip() != prompt.strip()]
        rewrites = [text for text in texts if text.strip() != prompt.strip()]
        for text in dict.fromkeys(rewrites):
            places = [p for p, other in zip(live, rewrites, strict=True) if other == text]
            made = rounds.some(text, [(p, number) for p in places])
            for p, image in zip(places, made, strict=True):
                streams[p].texts.append(text)
                streams[p].images.append(image)
                streams[p].drawn.append(True)
        for stream in streams:
            stream.carry(number)
    return streams
