"""Causal language models in onnxruntime-genai's format: the fastest way to an answer on a CPU.

One row at a time: decoding is bound by memory, and an answer then never depends on what else was asked.
Every generation holds its own cache, of exactly the tokens that it may need. Build the folder with
`safeguard.exporters.genai`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safeguard.backends import default_threads, parse_device
from safeguard.backends.onnx import external_files
from safeguard.errors import BackendError, MissingExtra, PackError
from safeguard.packs import read_pack
from safeguard.refiners.file_tokens import FileTokens, end_ids
from safeguard.refiners.language_model import Answer, Stop, Turns, cut, give_up

try:
    import onnxruntime_genai as og
except ImportError as exc:
    raise MissingExtra("onnxruntime-genai", extra="genai") from exc

CONFIG = "genai_config.json"
_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
_LEADS_OUT = re.compile("library|path|folder|dir|profil|file", re.I)
_SEARCH: dict[str, Any] = {  # greedy whatever the folder's own settings are
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}


class GenaiLM:
    """A model of onnxruntime-genai with its tokenizer. Safe to call from several threads."""

    def __init__(
        self, model: Any, tokens: FileTokens, *, window: int = 0, ends: Collection[int] = ()
    ) -> None:
        self._model, self._tokens = model, tokens
        self._window = window
        self._ends = end_ids(tuple(ends) or None, tokens)

    @classmethod
    def load(cls, folder: Path, *, device: str = "cpu", threads: int | None = None) -> GenaiLM:
        """From a built pack, its digests checked, on the device asked for or not at all.

        threads: CPU threads, at most 4 of those that the process may use by default.
        Raises PackError for a folder that is not such a pack, BackendError when it cannot run.
        """
        pack = read_pack(folder).expect("refiner").verify().alone()
        found = cls.open(folder, device=device, threads=threads)
        pack.verify()  # the runtime reads the files itself, so they are proven again when it has them
        return found

    @classmethod
    def open(cls, folder: Path, *, device: str = "cpu", threads: int | None = None) -> GenaiLM:
        """As `load`, from a folder that onnxruntime-genai's own builder made, taken as it is."""
        kind, index = parse_device(device)
        settings = _settings(folder)
        _refuse_strange_files(folder, settings)
        if kind == "cuda" and not og.is_cuda_available():
            raise BackendError(
                "this onnxruntime-genai has no CUDA; run: pip install onnxruntime-genai-cuda in its place"
            )
        config = og.Config(str(folder))
        config.clear_providers()
        if kind == "cuda":
            config.append_provider("cuda")
            config.set_provider_option("cuda", "device_id", str(index))
        config.overlay(json.dumps(_session(threads)))
        tokens = FileTokens.load(folder)
        try:
            model = og.Model(config)
        except Exception as exc:  # its errors have no common base class of their own
            raise BackendError(f"{folder.name} cannot be opened: {exc}") from exc
        if model.device_type != _DEVICES[kind]:
            raise BackendError(f"onnxruntime-genai took {model.device_type}, asked for {device!r}")
        ends = settings.get("eos_token_id")
        return cls(
            model,
            tokens,
            window=int(settings.get("context_length") or 0),
            ends=[ends] if isinstance(ends, int) else ends or (),
        )

    @property
    def window(self) -> int:
        """Tokens of prompt and answer together; 0 where no limit is known."""
        return self._window

    @property
    def special(self) -> re.Pattern[str] | None:
        """Special and bracketed tokens of the tokenizer."""
        return self._tokens.special

    def encode(self, text: str, /, *, framed: bool = False) -> list[int]:
        """Token ids; framed: with the tokenizer's own special tokens around them."""
        return self._tokens.encode(text, framed=framed)

    def render(self, turns: Turns, /) -> str | None:
        """The conversation with the generation prompt; None without a chat template."""
        return self._tokens.render(turns)

    def generate(
        self, rows: Sequence[Sequence[int]], limits: Sequence[int], /, *, stop: Stop | None = None
    ) -> list[Answer]:
        """Greedy answers, one after the other. Raises RefinerError when stopped, BackendError on failure."""
        answers = []
        for row, limit in zip(rows, limits, strict=True):
            kept, whole = cut(self._continue(row, limit, stop), self._ends, limit)
            answers.append(Answer(self._tokens.decode(kept), whole))
        return answers

    def logits(self, row: Sequence[int], /) -> Any:
        """(time, vocabulary) float32: what the model expects after each token of a row."""
        generator = self._generator(row, 1)
        return np.array(generator.get_output("logits"), dtype=np.float32)[0]

    def _continue(self, row: Sequence[int], limit: int, stop: Stop | None) -> list[int]:
        """At most `limit` new tokens, the last one an end token where one came."""
        if stop is not None and stop():
            raise give_up()
        generator = self._generator(row, limit)
        made: list[int] = []
        while len(made) < limit:
            if stop is not None and stop():
                raise give_up()
            try:
                generator.generate_next_token()
                made.append(int(generator.get_next_tokens()[0]))
            except Exception as exc:  # its errors have no common base class of their own
                raise BackendError(f"onnxruntime-genai failed to run: {exc}") from exc
            if made[-1] in self._ends or generator.is_done():
                break
        return made

    def _generator(self, row: Sequence[int], limit: int) -> Any:
        if not row:
            raise ValueError("a row must hold at least one token")
        try:
            params = og.GeneratorParams(self._model)
            params.set_search_options(max_length=len(row) + limit, batch_size=1, **_SEARCH)
            generator = og.Generator(self._model, params)
            generator.append_tokens(np.asarray(row, dtype=np.int32))
        except Exception as exc:  # its errors have no common base class of their own
            raise BackendError(f"onnxruntime-genai failed to run: {exc}") from exc
        return generator


def _settings(folder: Path) -> dict[str, Any]:
    """The `model` part of a folder's configuration."""
    try:
        model = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise PackError(f"{folder} has no {CONFIG} that says what the model is") from exc
    if not isinstance(model, dict) or not isinstance(model.get("decoder"), dict):
        raise PackError(f"{CONFIG} describes no decoder")
    return model


def _refuse_strange_files(folder: Path, settings: dict[str, Any]) -> None:
    """Raises PackError for a configuration that leads out of its folder or loads libraries.

    What onnxruntime-genai does not know it hands to onnxruntime, whose settings name libraries to load,
    folders to read weights from and files to write.
    """
    decoder = settings["decoder"]
    name = str(decoder.get("filename", ""))
    if Path(name).name != name or not (folder / name).is_file():
        raise PackError(f"{CONFIG} names the model file {name!r}, which must lie beside it")
    parts = sorted(n for n, part in settings.items() if n != "decoder" and isinstance(part, dict | list))
    parts = [n for n in parts if n != "eos_token_id"]
    if parts or "pipeline" in decoder:
        raise PackError(
            f"{CONFIG} describes more than one decoder ({', '.join(parts) or 'pipeline'}); a refiner is one"
        )
    inside = {key: value for key, value in decoder.items() if key != "filename"}
    strange = sorted({key for key in _keys(inside) if _LEADS_OUT.search(key)})
    if strange:
        raise PackError(f"{CONFIG} sets {', '.join(strange)}; a pack must name no libraries and no places")
    for weights in external_files(folder / name):
        if Path(weights).name != weights or not (folder / weights).is_file():
            raise PackError(f"{name} keeps weights in {weights!r}, which must lie beside it")


def _keys(value: Any) -> Iterator[str]:
    """Every key at any depth of plain data."""
    if isinstance(value, dict):
        yield from map(str, value)
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _keys(part)


def _session(threads: int | None) -> dict[str, Any]:
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be 1 or more, got {threads}")
    options = {"intra_op_num_threads": threads or default_threads(), "inter_op_num_threads": 1}
    return {"model": {"decoder": {"session_options": options}}}
