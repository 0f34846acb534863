"""Repositories are read by Triton's own protobuf, their steps run on a stand-in for its python backend."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safeguard.checks.clip_heads import ClipHeads, Perceptron, PromptPair, write_heads
from safeguard.checks.text_classifier import TextClassifier
from safeguard.errors import ExportError, PackError
from safeguard.exporters.triton import RECORD_NAME, Serving, export_triton
from safeguard.exporters.triton_calls import StepPack, worst_rows
from safeguard.packs import read_pack, resolve, seal
from safeguard.text import views
from tests.exporters.tiny_onnx import bag_of_words
from tests.tiny_packs import refiner_pack, rude_pack

pytest.importorskip("onnx", reason="onnx is not installed (extra export)")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra onnx)")

SERVER = Path(__file__).with_name("triton_server.py")
TEXTS = (
    "Good day to you",
    "",
    "you are a r.u.d.e n4ked fool",  # read as `rude` and `naked` in other readings only
    "good day " * 30 + "rude",  # several windows of 16 tokens
    "día bueno \U0001f600",
)


def asked(repository: Path, name: str, requests: Sequence[Sequence[bytes]]) -> dict[str, Any]:
    """What the steps of a repository answer, run as Triton runs them."""
    given = {"requests": [[base64.b64encode(item).decode() for item in items] for items in requests]}
    done = subprocess.run(
        [sys.executable, str(SERVER), str(repository), name],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        cwd=repository,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def worst(check: TextClassifier, text: str) -> list[float]:
    """Scores over all readings of a text, as a guard takes them."""
    readings = list(dict.fromkeys([text, *(view.text for view in views(text))]))
    rows = [list(finding.scores.values()) for finding in check(readings)]
    return np.array(rows).max(axis=0).tolist()  # type: ignore[no-any-return]


def model_config(path: Path) -> Any:
    """A config as Triton's own protobuf reads it; raises for an unknown field or a wrong type."""
    pb = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed")
    from google.protobuf import text_format

    return text_format.Parse(path.read_text(encoding="utf-8"), pb.ModelConfig())


@pytest.fixture(scope="module")
def rude(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rude_pack(tmp_path_factory.mktemp("packs") / "rude")


@pytest.fixture(scope="module")
def repository(rude: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "models"
    export_triton(read_pack(rude), out, serving=Serving(max_rows=8))
    return out


@pytest.fixture(scope="module")
def served(repository: Path) -> dict[str, Any]:
    requests = [[text.encode()] for text in TEXTS]
    together = [text.encode() for text in TEXTS]
    long = b"good " * 200_000
    return asked(repository, "rude-words", [*requests, together, [b"\xff\xfe"], [long], []])


def test_scores_are_those_of_the_check_over_all_readings(rude: Path, served: dict[str, Any]) -> None:
    check = TextClassifier.load(rude)

    found = [answer["scores"][0] for answer in served["answers"][: len(TEXTS)]]

    assert np.array(found) == pytest.approx(np.array([worst(check, text) for text in TEXTS]), abs=1e-6)
    assert [row[0] > 0.5 for row in found] == [False, False, True, True, False]  # so both outcomes were met


def test_a_request_of_several_texts_is_answered_as_one_by_one(served: dict[str, Any]) -> None:
    alone = [answer["scores"][0] for answer in served["answers"][: len(TEXTS)]]

    assert served["answers"][len(TEXTS)]["scores"] == pytest.approx(np.array(alone), abs=1e-6)


def test_what_cannot_be_judged_is_an_error_and_no_score(served: dict[str, Any]) -> None:
    not_text, too_long = served["answers"][len(TEXTS) + 1 : len(TEXTS) + 3]

    assert "UnicodeDecodeError" in not_text["error"]
    assert "more than max_windows 512 windows of 14 tokens" in too_long["error"]  # 16 less two special ones


def test_a_request_without_texts_has_no_scores(served: dict[str, Any]) -> None:
    assert served["answers"][-1] == {"scores": []}


def test_the_steps_use_their_own_copy_and_neither_pydantic_nor_torch(
    served: dict[str, Any], repository: Path
) -> None:
    assert Path(served["where"]).is_relative_to(repository)
    assert not [name for name in served["modules"] if name.split(".")[0] in ("pydantic", "torch")]


def test_windows_are_padded_to_lengths_that_the_batcher_can_join(served: dict[str, Any]) -> None:
    assert {shape[1] for shape in served["shapes"]} == {16}  # the only length up to a window of 16
    assert max(shape[0] for shape in served["shapes"]) == 8  # 270 words are more rows than max_rows holds


def test_every_config_is_valid_for_triton(repository: Path) -> None:
    names = ("rude-words", "rude-words_tokenizer", "rude-words_scores", "rude-words_model")

    configs = {name: model_config(repository / name / "config.pbtxt") for name in names}

    assert [config.name for config in configs.values()] == list(names)
    assert sorted(p.name for p in repository.iterdir() if p.is_dir()) == sorted(names)
    assert all((repository / name / "1").is_dir() for name in names)


def test_the_model_is_batched_and_warmed_up(repository: Path) -> None:
    config = model_config(repository / "rude-words_model" / "config.pbtxt")

    assert (config.platform, config.max_batch_size) == ("onnxruntime_onnx", 8)
    assert list(config.dynamic_batching.preferred_batch_size) == [8]  # 16, 32 and 64 are above max_rows
    assert config.dynamic_batching.max_queue_delay_microseconds == 200
    assert [(g.kind, g.count) for g in config.instance_group] == [(2, 1)]  # KIND_CPU is 2
    assert list(config.version_policy.specific.versions) == [1]
    assert [w.batch_size for w in config.model_warmup] == [1, 8]
    assert (repository / "rude-words_model" / "warmup" / "ones_int64_16").stat().st_size == 16 * 8


def test_the_ensemble_joins_the_steps(repository: Path) -> None:
    config = model_config(repository / "rude-words" / "config.pbtxt")

    steps = [step.model_name for step in config.ensemble_scheduling.step]
    behind = config.ensemble_scheduling.step[1]
    assert steps == ["rude-words_tokenizer", "rude-words_scores"]
    assert set(behind.input_map.values()) == set(config.ensemble_scheduling.step[0].output_map.values())
    assert [(t.name, list(t.dims)) for t in config.output] == [("SCORES", [-1, 1])]


def test_every_config_carries_the_digest_of_the_pack(repository: Path, rude: Path) -> None:
    pack = read_pack(rude)

    found = {
        model_config(p).parameters["pack_digest"].string_value for p in repository.glob("*/config.pbtxt")
    }

    assert found == {pack.digest}
    assert json.loads((repository / RECORD_NAME).read_text())["pack"]["digest"] == pack.digest


def test_the_readme_says_how_to_start_and_to_ask(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")

    assert "tritonserver --model-repository=/models" in text
    assert 'client.infer("rude-words", [asked])' in text
    assert json.loads((repository / RECORD_NAME).read_text())["pack"]["digest"] in text


def _pack_of(repository: Path) -> Path:
    return repository / "rude-words_tokenizer" / "1" / "pack"


def test_an_altered_file_of_a_step_is_refused(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rude-words_tokenizer"
    (folder / "1" / "pack").mkdir(parents=True)
    source = _pack_of(repository) / "safeguard.json"
    (folder / "1" / "pack" / "safeguard.json").write_bytes(source.read_bytes() + b" ")
    parameters = {"manifest_sha256": {"string_value": "0" * 64}}
    args = {
        "model_config": json.dumps({"parameters": parameters}),
        "model_repository": str(folder),
        "model_version": "1",
    }

    with pytest.raises(ValueError, match="not the file that was exported"):
        StepPack.open(args)


def test_an_int8_model_is_run_one_window_at_a_time(tmp_path: Path) -> None:
    texts = ("Good morning!", "i will find you", "a picture of a kitchen knife " * 40)
    pack = resolve("text-guard-s")
    check = TextClassifier.load(pack, threads=1)
    export_triton(pack, tmp_path / "models")

    found = asked(tmp_path / "models", "text-guard-s", [[text.encode() for text in texts]])

    config = model_config(tmp_path / "models" / "text-guard-s_model" / "config.pbtxt")
    assert config.max_batch_size == 1
    assert not config.HasField("dynamic_batching")
    assert "a neighbour would" in (tmp_path / "models" / "text-guard-s_model" / "config.pbtxt").read_text()
    assert {shape[0] for shape in found["shapes"]} == {1}
    wanted = np.array([worst(check, text) for text in texts])
    assert np.array(found["answers"][0]["scores"]) == pytest.approx(wanted, abs=1e-6)


def test_padding_changes_no_score(tmp_path: Path) -> None:
    pack = rude_pack(tmp_path / "pack")
    bag_of_words(pack / "model.onnx")  # logits are sums over tokens, so each one that is not masked shows
    fields = json.loads((pack / "safeguard.json").read_text())
    labels = {"labels": ["a", "b", "c"], "temperatures": {"b": 2.5}, "biases": {"c": -0.5}}
    window = {"window": {"tokens": 40, "overlap": 8}}
    seal(pack, {k: v for k, v in fields.items() if k != "files"} | labels | window)
    texts = ["good day", "", "rude day " * 30, "naked " * 17]
    check = TextClassifier.load(pack, threads=1)
    export_triton(read_pack(pack), tmp_path / "models", serving=Serving(views=False))

    found = asked(tmp_path / "models", "rude-words", [[text.encode() for text in texts]])

    wanted = np.array([list(finding.scores.values()) for finding in check(texts)])
    assert np.array(found["answers"][0]["scores"]) == pytest.approx(wanted, abs=1e-6)
    assert {shape[1] for shape in found["shapes"]} == {16, 32, 40}  # the window of 40 is the last length


def picture_pack(folder: Path) -> Path:
    """A tower whose embedding is a random projection of 16 x 16 pixels to 4 numbers, and two heads on it."""
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(0)
    folder.mkdir()
    weight = rng.normal(size=(3 * 16 * 16, 4)).astype(np.float32) / 16
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["pixel_values"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["image_embeds"]),
        ],
        "tower",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(weight, "weight")],
    )
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9),
        str(folder / "model.onnx"),
    )
    perceptron = (rng.normal(size=(4, 4)), rng.normal(size=4), rng.normal(size=4))
    write_heads(
        folder / "heads.npz",
        [PromptPair("gore", rng.normal(size=(2, 4)), 10.0), Perceptron("hate", *perceptron)],
    )
    seal(
        folder,
        {
            "name": "tower",
            "version": "1",
            "kind": "clip_heads",
            "model": {"file": "model.onnx", "inputs": ["pixel_values"], "outputs": ["image_embeds"]},
            "labels": ["gore", "hate"],
            "image": {"size": 16, "resize": 16},
            "license": "none",
        },
    )
    return folder


def test_pictures_are_scored_as_the_check_scores_them(tmp_path: Path) -> None:
    pack = picture_pack(tmp_path / "pack")
    export_triton(read_pack(pack), tmp_path / "models", serving=Serving(max_rows=2))
    colours = np.random.default_rng(1).integers(0, 256, (40, 60, 4), np.uint8)  # translucent: three views
    pictures = [Image.fromarray(colours), Image.fromarray(colours[:, :, :3])]
    files = [io.BytesIO(), io.BytesIO()]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file, "PNG")

    found = asked(tmp_path / "models", "tower", [[file.getvalue() for file in files], [b"no picture"]])

    wanted = [[f.scores["gore"], f.scores["hate"]] for f in ClipHeads.load(pack)(pictures)]
    assert np.array(found["answers"][0]["scores"]) == pytest.approx(np.array(wanted), abs=1e-6)
    assert [shape[0] for shape in found["shapes"]] == [2, 2]  # four views, two at a time
    assert "cannot be read as a picture" in found["answers"][1]["error"]
    assert len([model_config(path) for path in (tmp_path / "models").glob("*/config.pbtxt")]) == 4


def test_nothing_is_left_behind_when_writing_fails(rude: Path, tmp_path: Path) -> None:
    def fail(step: str) -> None:
        if "steps" in step:
            raise RuntimeError(step)

    with pytest.raises(RuntimeError, match="writing the steps"):
        export_triton(read_pack(rude), tmp_path / "models", say=fail)

    assert list(tmp_path.iterdir()) == []


def test_a_repository_that_is_there_is_replaced_only_when_asked(rude: Path, tmp_path: Path) -> None:
    export_triton(read_pack(rude), tmp_path / "models")
    (tmp_path / "models" / "mine").touch()

    with pytest.raises(FileExistsError, match="is there already"):
        export_triton(read_pack(rude), tmp_path / "models")
    assert (tmp_path / "models" / "mine").exists()
    export_triton(read_pack(rude), tmp_path / "models", overwrite=True)
    assert not (tmp_path / "models" / "mine").exists()


def test_a_folder_of_somebody_else_is_never_replaced(rude: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "thesis.txt").touch()

    with pytest.raises(ExportError, match=f"no folder with a {RECORD_NAME}"):
        export_triton(read_pack(rude), tmp_path / "models", overwrite=True)


def test_an_altered_pack_is_not_exported(tmp_path: Path) -> None:
    pack = rude_pack(tmp_path / "rude")
    (pack / "tokenizer.json").write_text("{}")

    with pytest.raises(PackError, match=r"tokenizer\.json was altered"):
        export_triton(read_pack(pack), tmp_path / "models")


def test_a_refiner_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="its kind is refiner; Triton serves text_classifier"):
        export_triton(read_pack(refiner_pack(tmp_path / "pack")), tmp_path / "models")


def test_an_int8_graph_is_not_put_on_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="its int8 graph is for CPUs"):
        export_triton(resolve("text-guard-s"), tmp_path / "models", serving=Serving(device="gpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device must be cpu or gpu, got 'tpu'"),
        ({"instances": 0}, "must be 1 or more"),
        ({"queue_delay_us": -1}, "must be 0 or more"),
        ({"preferred_rows": (0,)}, "preferred_rows must be 1 or more"),
    ],
)
def test_wrong_serving_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Serving(**options)


def test_scores_that_are_no_probabilities_are_an_error() -> None:
    owners = np.array([0, 0])

    with pytest.raises(ValueError, match="no probabilities"):
        worst_rows(np.array([[0.1], [np.nan]]), owners, 1)
    with pytest.raises(ValueError, match="no probabilities"):
        worst_rows(np.array([[0.1], [1.5]]), owners, 1)


def test_an_item_without_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="rows for each of 2 items"):
        worst_rows(np.array([[0.1]]), np.array([0]), 2)
