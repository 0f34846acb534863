"""The text of a `generate()` call as an iterator that cancels the call when its reader leaves.

A `TextIteratorStreamer` alone cannot: whoever stops reading it leaves the thread that generates running to
its end, and what that thread raises (`Blocked`) is never seen by the reader.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from typing import Any, Self

from safeguard.errors import MissingExtra

try:
    import torch
    from transformers import TextIteratorStreamer
except ImportError as exc:
    raise MissingExtra("transformers", extra="torch") from exc


class TextStream:
    """Text of one `model.generate(**inputs)` that runs in a thread of its own; iterate it, or async iterate.

    Special tokens and the prompt are left out. Leave it by `with`, `async with`, `close` or `aclose`: the
    generation then stops at its next step and its thread is waited for. What the call raises is raised to the
    reader where the text ends. timeout_s: longest wait for the next piece, then TimeoutError.
    """

    def __init__(self, model: Any, tokenizer: Any, *, timeout_s: float | None = None, **inputs: Any) -> None:
        self._left = threading.Event()
        self._timeout_s = timeout_s
        self._streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._error: BaseException | None = None
        self._ended = False
        criteria = [*(inputs.pop("stopping_criteria", None) or ()), self._stop]
        inputs |= {"streamer": self._streamer, "stopping_criteria": criteria}
        context = contextvars.copy_context()  # reports go to the `capture` blocks of the reader
        self._thread = threading.Thread(
            target=context.run, args=(self._generate, model, inputs), name="safeguard-stream", daemon=True
        )
        self._thread.start()

    def _generate(self, model: Any, inputs: dict[str, Any]) -> None:
        try:
            model.generate(**inputs)
        except BaseException as exc:
            self._error = exc
        finally:
            self._streamer.text_queue.put(None)  # also where the call never came to its streamer

    def _stop(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full(
            (input_ids.shape[0],), self._left.is_set(), dtype=torch.bool, device=input_ids.device
        )

    def _next(self) -> str | None:
        """The next piece, None at the end."""
        while not self._ended:
            try:
                piece = self._streamer.text_queue.get(timeout=self._timeout_s)
            except queue.Empty as exc:
                raise TimeoutError(f"no text came for {self._timeout_s} s") from exc
            if piece is None:
                self._ended = True
            elif piece != "":  # also drops nothing but the streamer's own empty end
                return str(piece)
        self._thread.join()
        error, self._error = self._error, None
        if error is not None and not self._left.is_set():
            raise error
        return None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        piece = self._next()
        if piece is None:
            raise StopIteration
        return piece

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        piece = await asyncio.to_thread(self._next)
        if piece is None:
            raise StopAsyncIteration
        return piece

    def close(self) -> None:
        """Stop the generation at its next step and wait for its thread."""
        self._left.set()
        self._streamer.text_queue.put(None)  # wakes a reader in another thread
        self._thread.join()

    async def aclose(self) -> None:
        """`close` for an event loop."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()
