from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safeguard.backends import open_backend
from safeguard.errors import BackendError

torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
Module: Any = torch.nn.Module


class Doubler(Module):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        return x * 2


def _backend(module: Any, *outputs: str) -> Any:
    from safeguard.backends.torch import ModuleBackend

    return ModuleBackend(module, inputs=("x",), outputs=outputs or ("y",))


def test_a_module_runs_on_arrays_and_gives_float32() -> None:
    y = _backend(Doubler())({"x": np.array([[1.5]], np.float16)})["y"]

    np.testing.assert_array_equal(y, np.array([[3]], np.float32), strict=True)


def test_outputs_are_found_by_name_in_a_mapping() -> None:
    class Named(Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return {"other": x, "y": x + 1}

    assert _backend(Named())({"x": np.zeros((1, 1), np.float32)})["y"].item() == 1


def test_an_output_that_is_not_there_is_named() -> None:
    class Named(Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return {"other": x}

    with pytest.raises(BackendError, match="gave no y; it gave other"):
        _backend(Named())({"x": np.zeros((1, 1), np.float32)})


def test_another_number_of_outputs_is_refused() -> None:
    with pytest.raises(BackendError, match="gave 1 outputs, expected y, z"):
        _backend(Doubler(), "y", "z")({"x": np.zeros((1, 1), np.float32)})


def test_missing_inputs_are_named() -> None:
    with pytest.raises(BackendError, match="needs inputs x; missing: x"):
        _backend(Doubler())({})


def test_cuda_where_there_is_none_is_an_error() -> None:
    with pytest.raises(BackendError, match=r"CUDA devices, asked for 'cuda:77'"):
        open_backend(Path("any.pt2"), inputs=("x",), outputs=("y",), device="cuda:77")


@pytest.fixture
def program(tmp_path: Path) -> Path:
    batch = torch.export.Dim("batch")
    exported = torch.export.export(Doubler(), (torch.ones(2, 2),), dynamic_shapes={"x": {0: batch}})
    torch.export.save(exported, tmp_path / "double.pt2")
    return tmp_path / "double.pt2"


def test_an_exported_program_runs(program: Path) -> None:
    backend = open_backend(program, inputs=("x",), outputs=("y",))

    np.testing.assert_array_equal(backend({"x": np.ones((3, 2), np.float32)})["y"], np.full((3, 2), 2.0))


def test_a_file_that_is_no_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.pt2").write_bytes(b"nothing")

    with pytest.raises(BackendError, match=r"broken.pt2 cannot be opened as an exported program"):
        open_backend(tmp_path / "broken.pt2", inputs=("x",), outputs=("y",))


def test_a_pickle_inside_a_program_does_not_run(program: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    bad = tmp_path / "bad.pt2"
    buffer = io.BytesIO()
    torch.save(_Touch(canary), buffer)
    with zipfile.ZipFile(program) as source, zipfile.ZipFile(bad, "w") as target:
        names = source.namelist()
        for name in names:
            evil = "sample_inputs" in name or name.endswith(".pt")
            target.writestr(name, buffer.getvalue() if evil else source.read(name))

    assert any("sample_inputs" in name or name.endswith(".pt") for name in names)
    with pytest.raises(BackendError, match=r"bad.pt2 cannot be opened"):
        open_backend(bad, inputs=("x",), outputs=("y",))
    assert not canary.exists()


class _Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_the_canary_of_the_test_above_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Touch(tmp_path / "canary")))

    assert (tmp_path / "canary").exists()
