from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safeguard.bench import ours
from safeguard.bench.settings import Settings

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra onnx)")

TEXTS = ["a small house by the river", "bread and tea"]


@pytest.fixture(scope="module")
def concurrent() -> Any:
    return ours.concurrent({"pack": "text-guard-s"})


def test_a_pack_judges_all_texts_of_a_payload() -> None:
    assert len(ours.text_pack({"pack": "text-guard-s"})({"texts": TEXTS})) == 2


@pytest.mark.parametrize("way", ["threads", "tasks"])
@pytest.mark.parametrize("batched", [False, True])
def test_every_call_of_every_caller_has_a_latency(concurrent: Any, way: str, batched: bool) -> None:
    found = concurrent({"texts": TEXTS, "callers": 3, "each": 2, "way": way, "batched": batched})

    assert len(found["latencies"]) == 6
    assert (
        max(found["latencies"]) <= found["seconds"] * 1.01
    )  # all calls lie within the time that is measured


def test_a_call_that_raises_under_load_is_an_error(concurrent: Any) -> None:
    with pytest.raises(TypeError, match="must be text"):
        concurrent({"texts": [3], "callers": 2, "each": 1, "way": "threads", "batched": False})


def test_pictures_are_the_same_for_the_same_seeds() -> None:
    first, again = ours.pictures({"pictures": [1, 2]}), ours.pictures({"pictures": [1, 2]})

    assert [image.size for image in first] == [(512, 512), (512, 512)]
    assert first[0].tobytes() == again[0].tobytes()
    assert first[0].tobytes() != first[1].tobytes()


def test_the_trivial_guard_runs_as_often_as_asked() -> None:
    class Counted(dict[str, Any]):
        read = 0

        def __getitem__(self, key: str) -> Any:
            self.read += key == "text"
            return super().__getitem__(key)

    payload = Counted(text=TEXTS[0], calls=3)
    ours.trivial_guard({})(payload)  # raises when a call is blocked
    assert payload.read == 3


@pytest.mark.slow
def test_the_peers_code_paths_score_like_the_plain_model(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the exporter is not installed (extra export)")
    from safeguard.bench import peers
    from safeguard.bench.models import LABELS, make_text_models

    made = make_text_models(tmp_path, tiny=True)
    source = {"source": str(made.source)}
    plain = peers.torch_eager(source)._call(TEXTS[0])[0]
    detoxify = peers.detoxify_path(source)._call(TEXTS[0])
    llm_guard = peers.llm_guard_path({**source, "graph": str(made.float32 / "model.onnx")})._call(TEXTS[0])[0]
    pipeline = {row["label"]: row["score"] for row in peers.pipeline(source)._call(TEXTS[:1])[0]}
    own = ours.text_pack({"pack": str(made.float32)})({"texts": TEXTS[:1]})[0]

    assert [detoxify[label] for label in LABELS] == pytest.approx(plain, abs=1e-5)
    assert llm_guard == pytest.approx(plain, abs=1e-5)
    assert [pipeline[label] for label in LABELS] == pytest.approx(plain, abs=1e-5)
    assert list(own.scores.values()) == pytest.approx(plain, abs=1e-5)


def test_fewer_than_twenty_repeats_are_no_median(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a median here takes 20 runs or more, got 19"):
        Settings(work=tmp_path, repeats=19)


def test_a_folder_of_peers_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder of environments"):
        Settings(work=tmp_path, peers=tmp_path / "none")


def test_a_peer_without_an_environment_has_no_python(tmp_path: Path) -> None:
    assert Settings(work=tmp_path, peers=tmp_path).python_of("llm-guard") is None
    assert Settings(work=tmp_path).python_of("llm-guard") is None


def test_a_peers_python_is_that_of_its_environment(tmp_path: Path) -> None:
    python = tmp_path / "llm-guard" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_bytes(b"")

    assert Settings(work=tmp_path, peers=tmp_path).python_of("llm-guard") == str(python)
