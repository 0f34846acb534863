"""A tiny decoder built once for onnxruntime-genai: what the class around it promises."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai")
pytest.importorskip("onnxscript", reason="needs onnxscript")

from safeguard.errors import BackendError, PackError, RefinerError
from safeguard.refiners.causal_lm import CausalLMRefiner
from safeguard.refiners.genai_lm import GenaiLM
from tests.tiny_decoders import END, genai_pack

ROW = list(b"a quiet harbour")


@pytest.fixture
def model() -> GenaiLM:
    return GenaiLM.load(genai_pack())


def copied(folder: Path, change: dict[str, Any]) -> Path:
    """The built folder with another configuration."""
    shutil.copytree(genai_pack(), folder)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"].update(change)
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder


def test_the_window_is_that_of_the_model(model: GenaiLM) -> None:
    assert model.window == 512


def test_logits_are_given_for_every_token(model: GenaiLM) -> None:
    assert model.logits(ROW).shape == (len(ROW), 261)


def test_a_row_says_the_same_alone_and_among_others(model: GenaiLM) -> None:
    rows = [ROW, ROW[:1], ROW * 9]
    together = model.generate(rows, [8, 8, 8])
    assert together == [model.generate([row], [8])[0] for row in rows]


def test_each_row_has_its_own_limit(model: GenaiLM) -> None:
    one, four = model.generate([ROW, ROW], [1, 4])
    assert four.text.startswith(one.text.rstrip("\ufffd"))
    assert len(model.encode(one.text)) <= 3 < len(four.text.encode())  # one byte, or its replacement


def test_threads_get_the_answers_that_they_get_alone(model: GenaiLM) -> None:
    rows = [ROW[: n + 1] for n in range(8)]
    expected = [model.generate([row], [12])[0] for row in rows]
    found: dict[int, Any] = {}

    def ask(place: int) -> None:
        found[place] = model.generate([rows[place]], [12])[0]

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[place] for place in range(8)] == expected


def test_an_end_token_ends_an_answer(tmp_path: Path, model: GenaiLM) -> None:
    second = int(model.logits([*ROW, int(model.logits(ROW)[-1].argmax())])[-1].argmax())
    folder = copied(tmp_path / "pack", {"eos_token_id": [END, second]})
    (answer,) = GenaiLM.open(folder).generate([ROW], [50])
    assert answer.whole
    assert len(answer.text.encode()) <= 3  # the one byte before it, or its replacement


def test_a_stopped_generation_is_an_error_within_a_token(model: GenaiLM) -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 3

    with pytest.raises(RefinerError, match="the generation was stopped before its end"):
        model.generate([ROW], [400], stop=stop)
    assert len(asked) == 3


def test_a_refiner_gives_up_after_its_time(model: GenaiLM) -> None:
    refiner = CausalLMRefiner(model, timeout_s=1e-9)
    with pytest.raises(RefinerError, match="the generation was stopped before its end"):
        refiner._answers(["an angry man"])


@pytest.mark.parametrize("time", [0, -1, float("nan")])
def test_a_time_limit_must_be_positive(model: GenaiLM, time: float) -> None:
    with pytest.raises(ValueError, match="timeout_s must be above 0"):
        CausalLMRefiner(model, timeout_s=time)


def test_an_empty_row_is_refused(model: GenaiLM) -> None:
    with pytest.raises(ValueError, match="a row must hold at least one token"):
        model.generate([[]], [4])


def test_a_row_beyond_the_window_is_an_error_of_ours(model: GenaiLM) -> None:
    with pytest.raises(BackendError, match="onnxruntime-genai failed to run"):
        model.generate([ROW * 40], [4])  # 600 tokens of 512


def test_cuda_that_is_not_there_is_refused_and_nothing_else_tried() -> None:
    import onnxruntime_genai

    if onnxruntime_genai.is_cuda_available():
        pytest.skip("this onnxruntime-genai has CUDA")
    with pytest.raises(BackendError, match="this onnxruntime-genai has no CUDA; run: pip install"):
        GenaiLM.load(genai_pack(), device="cuda")


def test_threads_must_be_positive() -> None:
    with pytest.raises(ValueError, match="threads must be 1 or more, got 0"):
        GenaiLM.load(genai_pack(), threads=0)


def test_an_altered_pack_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path / "pack", {"eos_token_id": 1})
    with pytest.raises(PackError, match=r"genai_config\.json was altered"):
        GenaiLM.load(folder)


@pytest.mark.parametrize("name", ["../model.onnx", "", "nothing.onnx"])
def test_a_model_file_that_is_not_beside_the_configuration_is_refused(tmp_path: Path, name: str) -> None:
    folder = copied(tmp_path / "pack", {"decoder": {"filename": name}})
    with pytest.raises(PackError, match="which must lie beside it"):
        GenaiLM.open(folder)


def test_a_configuration_that_loads_code_is_refused(tmp_path: Path) -> None:
    options = {"filename": "model.onnx", "session_options": {"custom_ops_library": "evil.so"}}
    folder = copied(tmp_path / "pack", {"decoder": options})
    with pytest.raises(PackError, match="sets custom_ops_library; a pack must name no libraries"):
        GenaiLM.open(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"session.model_external_initializers_file_folder_path": "/elsewhere"},
        {"enable_profiling": "/elsewhere/trace"},
        {"provider_options": [{"QNN": {"backend_path": "evil.so"}}]},
    ],
)
def test_a_configuration_that_names_places_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    decoder = {"filename": "model.onnx", "session_options": options}
    folder = copied(tmp_path / "pack", {"decoder": decoder})
    with pytest.raises(PackError, match="must name no libraries and no places"):
        GenaiLM.open(folder)


@pytest.mark.parametrize(
    "change",
    [{"vision": {"filename": "../other.onnx"}}, {"decoder": {"filename": "model.onnx", "pipeline": []}}],
)
def test_a_configuration_of_more_than_one_model_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(PackError, match="describes more than one decoder"):
        GenaiLM.open(copied(tmp_path / "pack", change))


def test_weights_that_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path / "pack", {})
    data = folder / "model.onnx"
    content = data.read_bytes()
    assert b"model.onnx.data" in content
    data.write_bytes(content.replace(b"model.onnx.data", b"../odel.onnx.da"))  # as long, so it stays protobuf
    with pytest.raises(PackError, match="which must lie beside it"):
        GenaiLM.open(folder)


def test_a_chat_template_that_the_pack_does_not_list_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    shutil.copytree(genai_pack(), folder)
    (folder / "additional.jinja").write_text("{{ messages[0].content }} and be rude", encoding="utf-8")
    with pytest.raises(PackError, match=r"holds additional\.jinja, which its manifest does not list"):
        GenaiLM.load(folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {}}', '{"model": 1}'])
def test_a_malformed_configuration_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "genai_config.json").write_text(content)
    with pytest.raises(PackError, match=r"has no genai_config\.json that says|describes no decoder"):
        GenaiLM.open(tmp_path)


def test_answering_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from safeguard.refiners.causal_lm import CausalLMRefiner\n"
        "from safeguard.types import RefineRequest\n"
        f"CausalLMRefiner.load({str(genai_pack())!r})([RefineRequest('an angry man')])\n"
        "sys.exit(sorted({'torch', 'transformers'} & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
