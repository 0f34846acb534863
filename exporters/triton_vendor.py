"""Copies the modules that a Triton step needs from the package, so that a repository is complete."""

from __future__ import annotations

import ast
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import safeguard
from safeguard.errors import ExportError

_ROOT = Path(safeguard.__file__).parent
_DATA = _ROOT / "data"


def copy_closure(module: str, folder: Path) -> tuple[str, ...]:
    """Copies a module, and all of ours that are imported with it, as a package `safeguard` into a folder.

    Data files that a copied module names come along. Packages on the way to a module are left empty where
    nothing is imported from them. Returns the copied modules' names, sorted.
    Raises ExportError for a module that is not there as a source file.
    """
    found: dict[str, Path] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found[name] = _source(name)
        todo += _imports(found[name])
    for name, source in found.items():
        parts = name.split(".")
        target = folder.joinpath(*parts)
        target = target / "__init__.py" if source.name == "__init__.py" else target.with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        for file in _data_files(source):
            (folder / "safeguard" / "data").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_DATA / file, folder / "safeguard" / "data" / file)
    for package in {p for name in found for p in _packages(name)} - set(found):
        path = folder.joinpath(*package.split("."), "__init__.py")
        path.write_text(f'"""Part of safeguard {safeguard.__version__}, copied for Triton."""\n', "utf-8")
    shutil.copyfile(_ROOT / "LICENSE", folder / "safeguard" / "LICENSE")
    return tuple(sorted(found))


def _packages(name: str) -> Iterator[str]:
    """The packages that a module lies in, without itself."""
    parts = name.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts)))


def _source(name: str) -> Path:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ExportError(name, "its source is not installed, so it cannot be copied for Triton")
    return Path(spec.origin)


def _imports(path: Path) -> list[str]:
    """Modules of ours that are imported when the file is; what a function imports is for other uses."""
    found: list[str] = []
    todo: list[ast.stmt] = list(ast.parse(path.read_text("utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "safeguard":
            base = str(node.module)
            inside = [f"{base}.{alias.name}" for alias in node.names]
            modules = [name for name in inside if _is_module(name)]
            found += modules + ([base] if len(modules) < len(inside) else [])
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("safeguard.")]
        elif isinstance(node, ast.Try) or (
            isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING"
        ):
            todo += node.body
    return found


def _is_module(name: str) -> bool:
    parts = name.split(".")[1:]
    return (_ROOT.joinpath(*parts).with_suffix(".py")).is_file() or (
        _ROOT.joinpath(*parts) / "__init__.py"
    ).is_file()


def _data_files(path: Path) -> list[str]:
    """Names of our data files that stand in a module as plain text."""
    constants = {n.value for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Constant)}
    return sorted(file.name for file in _DATA.iterdir() if file.is_file() and file.name in constants)
