from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from safeguard import Guard, Policy
from safeguard.checks import hub
from safeguard.errors import BackendError, PackError
from safeguard.manifest import Window

torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra torch)")

TOXIC_BERT = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
UNBIASED = [
    *("toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit"),
    *("male", "female", "homosexual_gay_or_lesbian", "christian", "jewish", "muslim", "black", "white"),
    "psychiatric_or_mental_illness",
]
TEXTS = ["good day", "the rude kitchen knife", "a " * 40, ""]


def save(folder: Path, tokenizer: Tokenizer, labels: list[str], kind: str = "Bert", **config: Any) -> Any:
    """A tiny random classifier of the real class with these labels, saved as hub repositories are."""
    torch.manual_seed(1)
    made = getattr(transformers, f"{kind}Config")(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=34,
        pad_token_id=0,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        **config,
    )
    model = getattr(transformers, f"{kind}ForSequenceClassification")(made).eval()
    with torch.no_grad():  # random weights of the usual size give logits too close to each other
        model.get_parameter(
            next(n for n, _ in model.named_parameters() if n.endswith("bias") and "classifier" in n)
        ).normal_()
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"]
        if kind == "Bert"
        else ["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    return model


def logits(model: Any, ids: list[int]) -> Any:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0].double().numpy()


def test_toxic_bert_labels_come_out_by_name_with_independent_sigmoids(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = save(tmp_path, tokenizer, TOXIC_BERT)

    (found,) = hub.load(tmp_path)(["good day"])

    expected = 1 / (1 + np.exp(-logits(model, [2, 5, 6, 3])))  # [CLS] good day [SEP]
    assert found.scores == pytest.approx(dict(zip(TOXIC_BERT, expected, strict=True)), abs=1e-6)


def test_unbiased_labels_are_unified_and_identity_heads_left_out(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = save(tmp_path, tokenizer, UNBIASED, "Roberta")

    check = hub.load(tmp_path)
    (found,) = check(["good day"])

    p = 1 / (1 + np.exp(-logits(model, [2, 5, 6, 3])))
    assert found.scores == pytest.approx(
        {
            "toxic": p[0],
            "severe_toxic": p[1],
            "obscene": p[2],
            "identity_hate": p[3],
            "insult": p[4],
            "threat": p[5],
            "sexual_explicit": p[6],
        },
        abs=1e-6,
    )
    assert check.labels == tuple(found.scores)


def test_the_order_of_the_labels_does_not_matter(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = save(tmp_path, tokenizer, TOXIC_BERT[::-1])

    (found,) = hub.load(tmp_path)(["rude"])

    assert found.scores["toxic"] == pytest.approx(1 / (1 + np.exp(-logits(model, [2, 4, 3])[5])), abs=1e-6)


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_scores_are_the_same_one_by_one_and_in_a_batch(
    tmp_path: Path, tokenizer: Tokenizer, kind: str
) -> None:
    save(tmp_path, tokenizer, TOXIC_BERT, kind)
    check = hub.load(tmp_path)

    together = check(TEXTS)

    for text, found in zip(TEXTS, together, strict=True):
        assert found.scores == pytest.approx(check([text])[0].scores, abs=1e-5)
    assert together[2].coverage is not None
    assert (
        together[2].coverage.windows == 2
    )  # 40 tokens in windows of 32 (Bert) or 31 (Roberta) positions, less 2


def test_a_single_label_classifier_has_a_softmax_and_its_safe_class_is_left_out(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = save(tmp_path, tokenizer, ["neutral", "toxic"], problem_type="single_label_classification")

    (found,) = hub.load(tmp_path)(["good"])

    z = logits(model, [2, 5, 3])
    assert found.scores == {"toxic": pytest.approx(1 / (1 + np.exp(z[0] - z[1])), abs=1e-6)}


def test_labels_left_out_can_be_chosen(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save(tmp_path, tokenizer, TOXIC_BERT)

    assert hub.load(tmp_path, ignored=["obscene", "insult"]).labels == (
        "toxic",
        "severe_toxic",
        "threat",
        "identity_hate",
    )


def test_unnamed_labels_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save(tmp_path, tokenizer, ["LABEL_0", "LABEL_1"])

    with pytest.raises(
        PackError, match=r"does not name its labels \(LABEL_0, LABEL_1\); set config.id2label"
    ):
        hub.load(tmp_path)


def test_a_model_that_is_not_there_is_a_pack_error(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="no text classifier could be loaded from"):
        hub.load(tmp_path / "nothing")


def test_weights_in_a_pickle_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = save(tmp_path, tokenizer, TOXIC_BERT)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")

    with pytest.raises(PackError, match="no text classifier could be loaded from"):
        hub.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "longest", "window"),
    [
        ({"max_position_embeddings": 512, "model_type": "bert"}, 512, Window(tokens=512, overlap=128)),
        (
            {"max_position_embeddings": 514, "model_type": "roberta", "pad_token_id": 1},
            10**30,
            Window(tokens=512, overlap=128),
        ),
        (
            {"max_position_embeddings": 8192, "model_type": "modernbert"},
            8192,
            Window(tokens=512, overlap=128),
        ),
    ],
)
def test_windows_are_as_long_as_the_model_reads(config: dict[str, Any], longest: int, window: Window) -> None:
    assert hub.window_of(SimpleNamespace(**config), longest) == window


def test_the_digest_changes_with_the_weights(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = save(tmp_path, tokenizer, TOXIC_BERT)
    before = hub.load(tmp_path).digest
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(tmp_path)

    assert hub.load(tmp_path).digest not in (None, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torch_run": "cuda_graphs"}, "CUDA graphs need a device cuda, the device asked for is cpu"),
        ({"torch_dtype": "float16"}, "float16 is for cuda, the device asked for is cpu"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(
    tmp_path: Path, tokenizer: Tokenizer, options: Any, message: str
) -> None:
    save(tmp_path, tokenizer, TOXIC_BERT)

    with pytest.raises(BackendError, match=message):
        hub.load(tmp_path, **options)


def test_an_unknown_way_to_run_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save(tmp_path, tokenizer, TOXIC_BERT)

    with pytest.raises(ValueError, match="torch_run must be eager, compiled or cuda_graphs, got 'fast'"):
        hub.load(tmp_path, torch_run="fast")  # type: ignore[arg-type]


def test_the_policy_says_how_torch_runs_a_check(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save(tmp_path, tokenizer, TOXIC_BERT)
    guard = Guard(
        policy=Policy.from_data(
            {"input": {"llm": {"checks": [f"hub:{tmp_path}"]}}, "runtime": {"torch_run": "cuda_graphs"}}
        )
    )

    with pytest.raises(BackendError, match="CUDA graphs need a device cuda"):
        guard.check_input("good day")


@pytest.mark.gpu
@pytest.mark.parametrize("run", ["compiled", "cuda_graphs"])
def test_on_a_gpu_every_way_to_run_gives_the_same_scores(
    tmp_path: Path, tokenizer: Tokenizer, run: Any
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    save(tmp_path, tokenizer, TOXIC_BERT)
    expected = hub.load(tmp_path)(TEXTS)

    found = hub.load(tmp_path, device="cuda", torch_run=run)(TEXTS)

    for one, other in zip(expected, found, strict=True):
        assert one.scores == pytest.approx(dict(other.scores), abs=1e-3)
