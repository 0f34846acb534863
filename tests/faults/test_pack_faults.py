"""Model packs that are missing, cut off, altered, exchanged or not what they say: refused, never loaded."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safeguard import BackendError, Guard, PackError, PackNotFound
from safeguard.backends import open_backend
from safeguard.checks.text_classifier import TextClassifier
from safeguard.packs import read_pack, resolve, seal
from tests.policies import policy
from tests.tiny_packs import rude_pack

NAMES = ("input_ids", "attention_mask")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return rude_pack(tmp_path / "pack")


def fields(folder: Path) -> dict[str, Any]:
    return read_pack(folder).manifest.model_dump(mode="json", exclude={"files"})


def refused(folder: Path, match: str) -> None:
    """Guarding something by a pack is refused, and works once the pack is whole again."""
    with pytest.raises(PackError, match=match):
        Guard(policy=policy(input={"llm": {"checks": [str(folder)]}}))(lambda prompt: prompt)


# --- missing, cut off, altered, exchanged -------------------------------------------------------


def test_missing_model_is_said_when_the_target_is_guarded_and_loads_once_it_is_there(folder: Path) -> None:
    kept = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").unlink()
    guard = Guard(policy=policy(input={"llm": {"checks": [str(folder)]}}))
    with pytest.raises(PackError, match=r"file model.onnx is missing"):
        guard(lambda prompt: prompt)
    with pytest.raises(PackError, match=r"file model.onnx is missing"):
        guard.check_input("good")

    (folder / "model.onnx").write_bytes(kept)
    assert guard.check_input("rude")[0].flagged == ("toxic",)


def test_missing_pack_is_said_when_the_target_is_guarded(tmp_path: Path) -> None:
    with pytest.raises(PackNotFound, match="no model pack named"):
        Guard(policy=policy(input={"llm": {"checks": [str(tmp_path / "none")]}}))(lambda prompt: prompt)


@pytest.mark.parametrize("kept", [0, 1, 100])
def test_model_that_was_cut_off_is_refused(folder: Path, kept: int) -> None:
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(content[:kept])
    refused(folder, "model.onnx")


def test_model_that_was_cut_off_before_it_was_sealed_is_refused_by_the_runtime(folder: Path) -> None:
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(content[: len(content) // 2])
    seal(folder, fields(folder))
    with pytest.raises(BackendError, match=r"model.onnx cannot be opened"):
        TextClassifier.load(folder)


def test_one_altered_bit_is_refused(folder: Path) -> None:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[-1] ^= 1
    (folder / "model.onnx").write_bytes(content)
    refused(folder, "model.onnx was altered")


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_file_exchanged_between_the_digest_and_the_loading_is_refused(folder: Path, name: str) -> None:
    pack = resolve(folder)  # all digests are right
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")

    with pytest.raises(PackError, match=f"{name} was altered"):
        TextClassifier.load(pack)


def test_model_exchanged_after_it_was_read_is_not_the_one_that_runs(folder: Path, tmp_path: Path) -> None:
    proven = resolve(folder).read("model.onnx")
    (folder / "model.onnx").write_bytes(b"\x08\x07 something else")

    backend = open_backend(folder / "model.onnx", inputs=NAMES, outputs=["logits"], content=proven)
    ids = np.array([[4]], np.int64)  # the word `rude`, whose logit is 4
    assert backend({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"].tolist() == [[4.0]]


def test_read_gives_only_listed_files(folder: Path) -> None:
    (folder / "other.txt").write_text("x")
    with pytest.raises(PackError, match=r"lists no file 'other.txt'"):
        resolve(folder).read("other.txt")


def test_missing_file_of_a_model_is_a_backend_error(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"none.onnx cannot be opened: No such file or directory"):
        open_backend(tmp_path / "none.onnx", inputs=["x"], outputs=["y"])


# --- disguises --------------------------------------------------------------------------------


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_pickle_in_disguise_is_never_unpickled(
    folder: Path, tmp_path: Path, name: str, protocol: int
) -> None:
    mark = tmp_path / "ran"
    (folder / name).write_bytes(pickle.dumps(Evil(mark), protocol))
    with pytest.raises(PackError):
        _seal_and_load(folder)
    assert not mark.exists()


def _seal_and_load(folder: Path) -> None:
    seal(folder, fields(folder))
    TextClassifier.load(folder)


def test_zip_with_a_pickle_called_onnx_is_refused(folder: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.save({"a": torch.zeros(1)}, folder / "model.onnx")
    with pytest.raises(PackError, match="starts like a zip archive"):
        seal(folder, fields(folder))
    with pytest.raises(BackendError, match=r"model.onnx cannot be opened"):
        open_backend(folder / "model.onnx", inputs=NAMES, outputs=["logits"])


def test_pickle_called_pt2_is_never_unpickled(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    mark, path = tmp_path / "ran", tmp_path / "model.pt2"
    path.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(BackendError, match=r"model.pt2 cannot be opened as an exported program"):
        open_backend(path, inputs=["x"], outputs=["y"])
    assert not mark.exists()


def test_zip_with_a_pickle_called_pt2_is_never_unpickled(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    mark, path = tmp_path / "ran", tmp_path / "model.pt2"
    torch.save(Evil(mark), path)
    with pytest.raises(BackendError, match=r"model.pt2 cannot be opened as an exported program"):
        open_backend(path, inputs=["x"], outputs=["y"])
    assert not mark.exists()


def test_pickled_array_in_heads_is_never_unpickled(tmp_path: Path) -> None:
    from safeguard.checks.clip_heads import read_heads

    mark, path = tmp_path / "ran", tmp_path / "heads.npz"
    np.savez(path, **{"red:perceptron:weight": np.array([Evil(mark)], object)})  # type: ignore[arg-type]
    with pytest.raises(PackError, match=r"heads.npz holds no plain arrays"):
        read_heads(path)
    assert not mark.exists()


# --- files that lead elsewhere ------------------------------------------------------------------


def linear(folder: Path, location: str) -> bytes:
    """An ONNX model, y = x @ w, that keeps `w` in a file of that name."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from onnx.external_data_helper import set_external_data

    weight = np.eye(64, dtype=np.float32)
    (folder / "w.dat").write_bytes(weight.tobytes())
    tensor = numpy_helper.from_array(weight, "w")
    set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64])],
        [tensor],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    made: bytes = onnx.ModelProto.SerializeToString(model)
    return made


def linear_pack(folder: Path, location: str) -> Path:
    folder.mkdir()
    (folder / "model.onnx").write_bytes(linear(folder, location))
    made = {
        "name": "linear",
        "version": "1",
        "kind": "refiner",
        "model": {"file": "model.onnx", "inputs": ["x"], "outputs": ["y"]},
        "license": "none",
    }
    seal(folder, made)
    return folder


def test_weights_beside_the_model_are_read_when_the_pack_lists_them(tmp_path: Path) -> None:
    from safeguard.checks.opening import open_model

    backend = open_model(resolve(linear_pack(tmp_path / "linear", "w.dat")), "cpu", 1)
    assert backend({"x": np.ones((1, 64), np.float32)})["y"].tolist() == [[1.0] * 64]


def test_weights_exchanged_after_the_digest_are_refused(tmp_path: Path) -> None:
    from safeguard.checks.opening import open_model

    pack = resolve(linear_pack(tmp_path / "linear", "w.dat"))
    (pack.folder / "w.dat").write_bytes(bytes(64 * 64 * 4))
    with pytest.raises(PackError, match=r"w.dat was altered"):
        open_model(pack, "cpu", 1)


@pytest.mark.parametrize("location", ["../w.dat", "sub/../../w.dat", "/etc/hostname", "w.dat/../../w.dat"])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    from safeguard.checks.opening import open_model

    (tmp_path / "w.dat").write_bytes(bytes(64 * 64 * 4))
    folder = linear_pack(tmp_path / "linear", location)
    with pytest.raises(BackendError, match="which its pack does not list"):
        open_model(resolve(folder), "cpu", 1)


def test_pack_cannot_list_a_file_outside_its_folder(folder: Path) -> None:
    path = folder / "safeguard.json"
    data = json.loads(path.read_text())
    data["files"]["../w.dat"] = "0" * 64
    path.write_text(json.dumps(data))
    refused(folder, r"file '../w.dat' must be a relative path inside the pack")


def test_place_of_weights_written_in_another_way_is_refused(tmp_path: Path) -> None:
    content = linear(tmp_path, "w.dat")
    plain = b"\x0a\x08location\x12\x05w.dat"
    turned = b"\x12\x05w.dat\x0a\x08location"  # protobuf fields may come in any order
    assert content.count(plain) == 1
    (tmp_path / "model.onnx").write_bytes(content.replace(plain, turned))
    with pytest.raises(BackendError, match="names a file with weights in a form that cannot be checked"):
        open_backend(tmp_path / "model.onnx", inputs=["x"], outputs=["y"])


def test_linked_folder_inside_a_pack_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes.txt").write_text("x")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    seal(folder, fields(folder), files=["model.onnx", "tokenizer.json", "sub/notes.txt"])
    refused(folder, "sub/notes.txt is a link that leads out of")


def test_linked_manifest_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "safeguard.json", tmp_path / "elsewhere.json")
    (folder / "safeguard.json").symlink_to(tmp_path / "elsewhere.json")
    refused(folder, "safeguard.json is a link that leads out of")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_in_the_place_of_a_file_is_refused_and_does_not_hang(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    refused(folder, "file tokenizer.json is missing")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_in_the_place_of_a_manifest_is_refused_and_does_not_hang(folder: Path) -> None:
    (folder / "safeguard.json").unlink()
    os.mkfifo(folder / "safeguard.json")
    with pytest.raises(PackError, match="it is no plain file"):
        read_pack(folder)
    refused(folder, "has no safeguard.json")


# --- manifests --------------------------------------------------------------------------------

_SMALL = (
    b'{"name":"n","version":"1","kind":"refiner","license":"x","files":{"m":"' + b"0" * 64 + b'"},'
    b'"model":{"file":"m","inputs":[],"outputs":["y"]},"notes":%s}'
)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 100,
        b"\xff\xfe\xfa",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 100_000 + b"}",
        b'{"name": "a", "name": "b"}',
        b" " * 4_000_001,
        _SMALL % b"NaN",
        _SMALL % b"1e999",
        _SMALL % b'"\\ud800"',
        _SMALL % (b"[" * 500 + b"]" * 500),
        _SMALL.replace(b'"n"', b'"../n"') % b'""',
        pickle.dumps({"a": 1}),
    ],
    ids=range(18),
)
def test_manifest_that_is_a_bomb_or_nonsense_is_refused(folder: Path, content: bytes) -> None:
    (folder / "safeguard.json").write_bytes(content)
    refused(folder, "safeguard.json")


def test_manifest_of_very_many_files_is_refused_quickly(folder: Path) -> None:
    data = json.loads((folder / "safeguard.json").read_text())
    data["files"] |= {f"f{n}": "0" * 64 for n in range(40_000)}
    (folder / "safeguard.json").write_text(json.dumps(data))
    refused(folder, "file f0 is missing")


# --- tokenizers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"null", b"\xff\xfe", b"[" * 10_000, b'{"version": "1.0", "model": {"type": "none"}}'],
    ids=range(6),
)
def test_broken_tokenizer_is_refused(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    seal(folder, fields(folder))
    refused(folder, "tokenizer.json is no tokenizer that this version of tokenizers can read")


def test_tokenizer_that_knows_no_words_is_refused(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="none"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    seal(folder, fields(folder))
    refused(folder, "tokenizer.json is no tokenizer that this version of tokenizers can read")
