"""Tiny random decoders: the exported graph says what torch says, at every size, padded or not."""

from __future__ import annotations

import errno
import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("onnxscript", reason="needs onnxscript")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

from safeguard.errors import ExportError, PackError, ParityError  # noqa: E402
from safeguard.exporters.causal_lm import (  # noqa: E402
    decoder_layout,
    divergence,
    export_causal_lm,
    read_causal_lm,
)
from safeguard.exporters.graph import operators  # noqa: E402
from safeguard.packs import read_pack  # noqa: E402
from safeguard.refiners.causal_lm import CausalLMRefiner  # noqa: E402
from safeguard.refiners.onnx_lm import DecoderLayout, feeds, open_decoder  # noqa: E402
from safeguard.refiners.torch_lm import TorchLM  # noqa: E402
from tests.adapters.tiny_lm import tiny_tokenizer  # noqa: E402
from tests.tiny_decoders import PROMPTS, TEMPLATE, decoder, onnx_pack, save, settings  # noqa: E402

Llama: Any = transformers.LlamaForCausalLM


class FullDisk:
    """A tokenizer that cannot be saved."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")


class TwoFaced(Llama):  # type: ignore[misc]  # transformers is untyped
    """Says something else while it is exported."""

    def forward(self, **inputs: Any) -> Any:
        found = super().forward(**inputs)
        if torch.compiler.is_exporting():
            found.logits = found.logits + 1
        return found

    forward.__signature__ = inspect.signature(Llama.forward)  # type: ignore[attr-defined]


def answers(model: Any) -> list[str | None]:
    return CausalLMRefiner(TorchLM(model, tiny_tokenizer()), TEMPLATE)._answers(PROMPTS)


def test_the_manifest_names_cache_and_tokens_as_they_go_in_and_out() -> None:
    manifest = read_pack(onnx_pack()).verify().manifest
    assert manifest.kind == "refiner"
    assert manifest.model.inputs == (
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.key",
        "past_key_values.1.value",
    )
    assert manifest.model.outputs == (
        "logits",
        "present.0.key",
        "present.0.value",
        "present.1.key",
        "present.1.value",
    )


def test_the_manifest_says_how_well_the_graph_agrees() -> None:
    export = read_pack(onnx_pack()).manifest.export
    assert export is not None
    # tokens of all rows: 1*7 + 1*1 + 3*6 + 3*1 + 5*3 + 2*2 = 48
    assert (export.parity[0].tensor, export.parity[0].decisions, export.parity[0].flips) == ("logits", 48, 0)
    assert export.parity[1].tensor.startswith("present.")


def test_attention_is_one_operator_in_the_native_graph() -> None:
    assert operators(onnx_pack() / "model.onnx")["Attention"] == 2  # one of each layer


@pytest.mark.parametrize(
    ("batch", "time", "past"), [(1, 1, 0), (1, 9, 0), (7, 4, 0), (2, 1, 40), (3, 5, 1), (1, 64, 64)]
)
def test_one_graph_reads_a_prompt_and_goes_on_with_it(batch: int, time: int, past: int) -> None:
    pack = read_pack(onnx_pack())
    layout = DecoderLayout.read(pack.path("decoder.json"))
    run = open_decoder(pack)
    ids = np.random.default_rng(1).integers(0, 256, (batch, past + time))
    mask = np.ones_like(ids)
    cache = layout.empty(batch)
    if past:
        before = run({**feeds(layout, ids[:, :past], mask[:, :past]), **cache})
        cache = dict(zip(layout.past, (before[name] for name in layout.present), strict=True))
    found = run({**feeds(layout, ids[:, past:], mask), **cache})
    with torch.inference_mode():
        wanted = decoder()(torch.tensor(ids)).logits[:, past:].numpy()
    np.testing.assert_allclose(found["logits"], wanted, atol=1e-4)
    assert found["present.1.key"].shape == (batch, 1, past + time, 32)  # 64 units are two heads of 32


def test_a_row_padded_on_the_left_says_what_it_says_alone() -> None:
    pack = read_pack(onnx_pack())
    layout = DecoderLayout.read(pack.path("decoder.json"))
    run = open_decoder(pack)
    row = np.array([[5, 6, 7]])
    alone = run({**feeds(layout, row, np.ones_like(row)), **layout.empty(1)})["logits"]
    padded, mask = np.array([[0, 0, 5, 6, 7]]), np.array([[0, 0, 1, 1, 1]])
    both = run(
        {
            **feeds(layout, np.vstack([padded, [[1, 2, 3, 4, 5]]]), np.vstack([mask, [[1] * 5]])),
            **layout.empty(2),
        }
    )
    np.testing.assert_allclose(both["logits"][0, 2:], alone[0], atol=1e-5)


def test_a_refiner_on_the_pack_answers_as_on_torch() -> None:
    refiner = CausalLMRefiner.load(onnx_pack())
    assert refiner.template == TEMPLATE
    assert refiner._answers(PROMPTS) == answers(decoder())


def test_eight_bit_weights_keep_what_a_model_with_a_sliding_window_says(tmp_path: Path) -> None:
    model = decoder(
        transformers.MistralForCausalLM, transformers.MistralConfig, sliding_window=4, num_hidden_layers=1
    )
    manifest = export_causal_lm(
        model, tiny_tokenizer(), tmp_path / "out", dtype="int8-weights", flavour="decomposed"
    )
    counts = operators(tmp_path / "out" / "model.onnx")
    # q, k, v, o, gate, up and down of the layer; and the head
    assert counts["MatMulNBits"] == 7 + 1
    assert "Attention" not in counts
    assert manifest.precision == "int8-weights"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert "plain.onnx" not in manifest.files


def test_a_half_precision_graph_keeps_a_half_precision_cache(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=261, n_embd=32, n_layer=1, n_head=2, n_positions=64, eos_token_id=258
    )
    model = transformers.GPT2LMHeadModel(config)
    export_causal_lm(model, tiny_tokenizer(), tmp_path / "out", dtype="float16")
    layout = DecoderLayout.read(tmp_path / "out" / "decoder.json")
    assert (layout.dtype, layout.window, layout.layers) == ("float16", 64, ((2, 16, 16),))
    assert next(model.parameters()).dtype == torch.float32  # the model itself stays as it was
    assert model.training
    assert len(CausalLMRefiner.load(tmp_path / "out")._answers(["a"])) == 1


def bert(kind: Any) -> Any:
    return kind(
        transformers.BertConfig(
            vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    ).eval()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: bert(transformers.BertForMaskedLM), "BertForMaskedLM .* it keeps no key-value cache"),
        (lambda: bert(transformers.BertModel), "BertModel .* it has no language-model head"),
        (
            lambda: transformers.LlamaModel(transformers.LlamaConfig(**settings())),
            "LlamaModel .* it has no language-model head",
        ),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=99, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
            ),
            "T5ForConditionalGeneration .* it is an encoder-decoder",
        ),
        (
            lambda: transformers.MambaForCausalLM(
                transformers.MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1)
            ),
            "MambaForCausalLM .* it keeps no key-value cache",
        ),
        (lambda: torch.nn.Linear(2, 2), "Linear .* it is no model of transformers"),
    ],
)
def test_what_is_no_decoder_with_a_cache_is_refused_by_name(make: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=why):
        export_causal_lm(make(), tiny_tokenizer(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_that_is_not_merged_is_refused() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    adapted = peft.get_peft_model(decoder(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ExportError, match=r"it has an adapter; merge it first: model.merge_and_unload\(\)"):
        decoder_layout(adapted)


def test_dynamic_int8_is_refused_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dynamic int8 ruins decoders .* ask for int8-weights"):
        export_causal_lm(decoder(), tiny_tokenizer(), tmp_path / "out", dtype="int8")  # type: ignore[arg-type]


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, int8-weights, got 'int4'"):
        export_causal_lm(decoder(), tiny_tokenizer(), tmp_path / "out", dtype="int4")  # type: ignore[arg-type]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        export_causal_lm(decoder(), FullDisk(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_says_something_else_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"logits \(1, 7, 261\) differs by 1"):
        export_causal_lm(decoder(TwoFaced, num_hidden_layers=1), tiny_tokenizer(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path / "model")
    with pytest.raises(PackError, match="no refiner could be loaded from"):
        read_causal_lm(tmp_path / "model")


def test_a_trunk_without_its_head_is_not_given_a_random_one(tmp_path: Path) -> None:
    save(tmp_path, decoder(transformers.LlamaModel))
    with pytest.raises(PackError, match=r"its weights lack lm_head\.weight"):
        read_causal_lm(tmp_path)


def test_the_template_beside_the_weights_is_read_with_them(tmp_path: Path) -> None:
    model, _, template = read_causal_lm(save(tmp_path))
    assert template == TEMPLATE
    assert model.dtype == torch.float32


def test_divergence_is_that_of_kullback_and_leibler() -> None:
    # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75) = 0.1438
    found = divergence(np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]]) + 3.0)  # logits may be shifted
    assert found.tolist() == [pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))]
