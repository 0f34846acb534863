from __future__ import annotations

import io
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_for_cuda(dtype: str) -> None:
    from safeguard.backends.torch import ModuleBackend

    with pytest.raises(BackendError, match=f"{dtype} is for cuda, the device asked for is cpu"):
        ModuleBackend(Doubler(), inputs=("x",), outputs=("y",), dtype=dtype)  # type: ignore[arg-type]


def test_an_unknown_dtype_is_refused() -> None:
    from safeguard.backends.torch import ModuleBackend

    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, got 'int8'"):
        ModuleBackend(Doubler(), inputs=("x",), outputs=("y",), dtype="int8")  # type: ignore[arg-type]


def test_a_compiled_module_gives_what_the_module_gives() -> None:
    from safeguard.backends.torch import ModuleBackend

    backend = ModuleBackend(Doubler(), inputs=("x",), outputs=("y",), compile_with="eager")
    backend.warmup([{"x": np.ones((2, 2), np.float32)}])

    np.testing.assert_array_equal(backend({"x": np.ones((2, 2), np.float32)})["y"], np.full((2, 2), 2.0))


def test_threads_may_share_a_compiled_module() -> None:
    from safeguard.backends.torch import ModuleBackend

    backend = ModuleBackend(Doubler(), inputs=("x",), outputs=("y",), compile_with="eager")

    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda i: backend({"x": np.full((1, 1), i, np.float32)})["y"].item(), range(12))
        )

    assert found == [2.0 * i for i in range(12)]


def test_an_unknown_compiler_is_refused() -> None:
    from safeguard.backends.torch import ModuleBackend

    with pytest.raises(ValueError, match=r"no torch.compile backend 'gcc'; known: .*inductor"):
        ModuleBackend(Doubler(), inputs=("x",), outputs=("y",), compile_with="gcc")


def test_warming_up_runs_what_it_is_given() -> None:
    seen: list[tuple[int, ...]] = []

    class Keeps(Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            seen.append(tuple(x.shape))
            return x

    backend = _backend(Keeps())
    backend.warmup()
    backend.warmup([{"x": np.ones((2, 3), np.float32)}])

    assert seen == [(2, 3)]


@pytest.mark.gpu
def test_half_precision_on_the_gpu_gives_float32(program: Path) -> None:
    from safeguard.backends.torch import ModuleBackend

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    backend = ModuleBackend(
        torch.nn.Linear(4, 2), inputs=("input",), outputs=("y",), device="cuda", dtype="float16"
    )

    assert backend({"input": np.ones((1, 4), np.float32)})["y"].dtype == np.float32


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


def test_a_program_can_be_compiled(program: Path) -> None:
    backend = open_backend(program, inputs=("x",), outputs=("y",), compile_with="eager")

    np.testing.assert_array_equal(backend({"x": np.ones((3, 2), np.float32)})["y"], np.full((3, 2), 2.0))


def test_a_program_in_half_precision_is_for_cuda(program: Path) -> None:
    with pytest.raises(BackendError, match="float16 is for cuda"):
        open_backend(program, inputs=("x",), outputs=("y",), dtype="float16")


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"compile_with": "inductor"}])
def test_other_files_keep_the_precision_of_their_export(options: Any) -> None:
    with pytest.raises(
        BackendError, match=r"for models that torch runs \(.pt2\); m.onnx keeps its precision"
    ):
        open_backend(Path("m.onnx"), inputs=("x",), outputs=("y",), **options)


def test_a_tensor_goes_into_the_module_as_it_is() -> None:
    seen: list[Any] = []

    class Keeps(Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            seen.append(x.data_ptr())
            return x

    x = torch.ones(2, 2)
    backend = _backend(Keeps())
    backend({"x": x})

    assert seen == [x.data_ptr()]
    assert backend.tensor_device is None  # on the CPU checks hand over arrays, as they always did
