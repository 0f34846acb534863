"""Tiny decoders built for onnxruntime-genai, and a copying builder where only what is around it matters."""

from __future__ import annotations

import json
import logging
import threading
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai")
pytest.importorskip("onnxscript", reason="needs onnxscript")

from safeguard.errors import ExportError, PackError, ParityError  # noqa: E402
from safeguard.exporters.genai import ARCHITECTURES, cached_genai, export_genai  # noqa: E402
from safeguard.packs import read_pack  # noqa: E402
from safeguard.refiners.causal_lm import CausalLMRefiner  # noqa: E402
from safeguard.refiners.torch_lm import TorchLM  # noqa: E402
from tests.adapters.tiny_lm import tiny_tokenizer  # noqa: E402
from tests.tiny_decoders import PROMPTS, TEMPLATE, decoder, genai_pack, save  # noqa: E402

COPYING = """
import os, shutil, sys
out = sys.argv[sys.argv.index("-o") + 1]
for name in os.listdir({source!r}):
    if name != "safeguard.json":
        shutil.copy(os.path.join({source!r}, name), out)
with open({log!r}, "a") as log:
    log.write("built\\n")
"""
FAILING = """
import sys
out = sys.argv[sys.argv.index("-o") + 1]
open(out + "/model.onnx", "wb").write(b"half")
sys.exit("OSError: No space left on device")
"""


def replace_builder(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a builder of ours before the real one, for processes that are started from here."""
    package = folder / "onnxruntime_genai" / "models"
    package.mkdir(parents=True)
    for name in ("__init__.py", "../__init__.py"):
        (package / name).write_text("")
    (package / "builder.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A builder that copies what the real one made once; the file gets a line for each time."""
    log = tmp_path / "builds"
    log.write_text("")
    replace_builder(tmp_path / "path", COPYING.format(source=str(genai_pack()), log=str(log)), monkeypatch)
    return log


def source_of(tmp_path: Path) -> Path:
    return save(tmp_path / "my model")


def test_a_built_pack_answers_as_torch_does() -> None:
    expected = CausalLMRefiner(TorchLM(decoder(), tiny_tokenizer()), TEMPLATE)._answers(PROMPTS)
    refiner = CausalLMRefiner.load(genai_pack())
    assert refiner.template == TEMPLATE
    assert refiner._answers(PROMPTS) == expected


def test_the_manifest_says_what_was_built_and_how_well_it_agrees() -> None:
    manifest = read_pack(genai_pack()).verify().manifest
    assert (manifest.kind, manifest.precision, manifest.model.file) == ("refiner", "float32", "model.onnx")
    assert "past_key_values.1.value" in manifest.model.inputs
    assert "present.1.value" in manifest.model.outputs
    assert "genai_config.json" in manifest.files
    assert manifest.export is not None
    assert manifest.export.exporter.startswith("onnxruntime-genai 0.")
    assert manifest.export.parity[0].flips == 0


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_is_merged_and_kept_in_eight_bits(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    base = save(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    TEMPLATE.model_copy(update={"version": "of the adapter"}).write(
        tmp_path / "adapter" / "refiner_template.json"
    )
    manifest = export_genai(tmp_path / "adapter", tmp_path / "out", fields={"license": "Apache-2.0"})
    row = tiny_tokenizer()("a quiet harbour", add_special_tokens=False)["input_ids"]
    refiner = CausalLMRefiner.load(tmp_path / "out")
    found: Any = refiner._model.logits(row)  # type: ignore[attr-defined]
    with torch.inference_mode():
        merged = adapted.merge_and_unload()(torch.tensor([row])).logits[0].numpy()
        plain = decoder()(torch.tensor([row])).logits[0].numpy()
    assert abs(found - merged).mean() < 0.1 * abs(found - plain).mean()
    assert (manifest.precision, manifest.license) == ("int8-weights", "Apache-2.0")
    assert refiner.template.version == "of the adapter"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_that_we_name_is_one_that_the_builder_knows(kind: str) -> None:
    code = (resources.files("onnxruntime_genai") / "models" / "builder.py").read_text(encoding="utf-8")
    assert f'config.architectures[0] == "{kind}"' in code
    assert hasattr(transformers, kind)


def test_an_architecture_that_the_builder_does_not_know_is_named(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=261, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    source = save(tmp_path / "model", transformers.GPT2LMHeadModel(config))
    with pytest.raises(
        ExportError, match=r"GPT2LMHeadModel .* does not know its architecture; it knows Ernie"
    ):
        export_genai(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path / "model")
    with pytest.raises(PackError, match="no refiner could be loaded from"):
        export_genai(tmp_path / "model", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_fewer_bits_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"precision must be int8 .* got 'int4': fewer bits change the text"):
        export_genai(tmp_path, tmp_path / "out", precision="int4")  # type: ignore[arg-type]


def test_a_builder_that_fails_is_quoted_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tmp_path)
    replace_builder(tmp_path / "path", FAILING, monkeypatch)
    with pytest.raises(ExportError, match=r"LlamaForCausalLM .* failed: OSError: No space left on device"):
        export_genai(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my model", "path"]


def test_a_build_that_says_something_else_is_refused_and_leaves_nothing(tmp_path: Path, builds: Path) -> None:
    torch.manual_seed(1)
    other = save(tmp_path / "other", transformers.LlamaForCausalLM(decoder().config))
    with pytest.raises(ParityError, match=r"logits .* has a mean KL divergence that is off"):
        export_genai(other, tmp_path / "out")
    assert builds.read_text() == "built\n"
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        export_genai(tmp_path / "model", tmp_path / "out")


def test_the_cache_is_built_once(tmp_path: Path, builds: Path) -> None:
    source = source_of(tmp_path)
    first = cached_genai(source, cache=tmp_path / "cache")
    again = cached_genai(source, cache=tmp_path / "cache")
    assert (first.folder, first.digest) == (again.folder, again.digest)
    assert first.folder.name.startswith("my-model-")
    assert builds.read_text() == "built\n"


def test_a_changed_source_has_another_place_in_the_cache(tmp_path: Path, builds: Path) -> None:
    source = source_of(tmp_path)
    first = cached_genai(source, cache=tmp_path / "cache")
    TEMPLATE.model_copy(update={"version": "2"}).write(source / "refiner_template.json")
    second = cached_genai(source, cache=tmp_path / "cache")
    assert first.folder != second.folder
    assert CausalLMRefiner.load(second.folder).template.version == "2"


def test_an_altered_cache_is_built_again_and_said_so(
    tmp_path: Path, builds: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = source_of(tmp_path)
    folder = cached_genai(source, cache=tmp_path / "cache").folder
    (folder / "genai_config.json").write_text("{}")
    with caplog.at_level(logging.WARNING, "safeguard"):
        cached_genai(source, cache=tmp_path / "cache").verify()
    assert "a cached model is built again" in caplog.text
    assert builds.read_text() == "built\nbuilt\n"
    assert json.loads((folder / "genai_config.json").read_text())["model"]["type"] == "llama"


def test_of_several_at_once_one_builds_and_the_others_wait(tmp_path: Path, builds: Path) -> None:
    source = source_of(tmp_path)
    found: list[Path] = []

    def ask() -> None:
        found.append(cached_genai(source, cache=tmp_path / "cache").folder)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(set(found)), builds.read_text()) == (3, 1, "built\n")


def test_a_refiner_builds_into_the_users_cache_on_first_use(
    tmp_path: Path, builds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    refiner = CausalLMRefiner.load_genai(source_of(tmp_path))
    assert refiner.template == TEMPLATE
    (made,) = (tmp_path / "home" / "safeguard" / "genai").glob("my-model-*")
    assert (made / "safeguard.json").is_file()


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="no model could be found as 'nobody/nothing'"):
        cached_genai("nobody/nothing", cache=tmp_path)


def test_an_adapter_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(PackError, match=r"has no adapter_model\.safetensors; other formats are refused"):
        cached_genai(tmp_path, cache=tmp_path / "cache")
