"""The wheel ships every package and data file in the tree, under the right name, and imports anywhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONFIG = PROJECT["tool"]["setuptools"]


def packages_on_disk() -> set[str]:
    return {
        ".".join((name, *init.parent.relative_to(ROOT / folder).parts))
        for name, folder in CONFIG["package-dir"].items()
        for init in (ROOT / folder).rglob("__init__.py")
        if not any(p.is_symlink() for p in init.parents)
    }


def modules_on_disk() -> set[str]:
    return {
        ".".join((name, *path.relative_to(ROOT / folder).with_suffix("").parts)).removesuffix(".__init__")
        for name, folder in CONFIG["package-dir"].items()
        for path in (ROOT / folder).rglob("*.py")
        if not any(p.is_symlink() for p in path.parents) and path.stem != "__main__"  # that one runs
    }


def test_every_package_is_listed() -> None:
    assert set(CONFIG["packages"]) == packages_on_disk()


@pytest.mark.parametrize("folder", ["exporters", "integrations"])
def test_link_points_at_the_real_folder(folder: str) -> None:
    link = ROOT / "safeguard" / folder
    assert link.is_symlink()
    assert link.resolve() == ROOT / folder


def test_no_extra_combines_the_two_builds_of_onnxruntime() -> None:
    extras = PROJECT["project"]["optional-dependencies"]

    def needs(extra: str) -> set[str]:
        found: set[str] = set()
        for line in extras[extra]:
            if line.startswith("safeguard-sdk["):
                for other in line.removeprefix("safeguard-sdk[").removesuffix("]").split(","):
                    found |= needs(other)
            else:
                found.add(line.split(">")[0].split("[")[0].strip())
        return found

    assert [e for e in extras if {"onnxruntime", "onnxruntime-gpu"} <= needs(e)] == []


def test_core_depends_on_no_machine_learning_framework() -> None:
    heavy = ("torch", "transformers", "diffusers", "onnx", "tensorrt", "optimum")
    assert [d for d in PROJECT["project"]["dependencies"] if d.startswith(heavy)] == []


@pytest.mark.slow
def test_wheel_made_through_the_sdist_imports_every_module_in_a_fresh_environment(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # a copy: building leaves files in the folder that it builds
    shutil.copytree(
        ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    )
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(tree)]
    subprocess.run(build, check=True, capture_output=True, timeout=280)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {m.replace(".", "/") for m in modules_on_disk()} <= {
        n.removesuffix(".py").removesuffix("/__init__") for n in names
    }
    assert {"safeguard/py.typed", "safeguard/data/presets/standard.yaml"} <= names
    # a fresh environment that has our dependencies from this one, and our package only from the wheel
    venv.create(tmp_path / "env", with_pip=False)
    python = str(tmp_path / "env" / "bin" / "python")
    install = ["-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True, timeout=280)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    here = next(p for p in sys.path if p.endswith("site-packages"))
    code = (
        "import importlib, sys\n"
        f"sys.path.append({here!r})\n"
        f"for name in {sorted(modules_on_disk())!r}:\n"
        "    module = importlib.import_module(name)\n"
        f"    assert module.__file__.startswith({str(site)!r}), module.__file__\n"
    )
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
