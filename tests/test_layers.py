"""Imports may only point downwards: a lower layer never imports a higher one at module level."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "safeguard"
LAYERS = (  # lowest first; modules on one line may import one another, lines only those above them
    {"errors"},
    {"types"},
    {"registry", "files", "locks", "manifest", "text", "policy_files"},
    {"policy", "packs", "backends", "images", "image_tensors", "testing", "smollm2", "detoxified", "stats"},
    {"runtime"},
    {"checks", "refiners", "driving", "decoding"},
    {"judging"},
    {"calls"},
    {"flow"},
    {"chunks", "held_text"},
    {"held_chunks"},
    {"streams"},
    {"guards", "schemas"},
    {"adapters"},
    {"exporters", "integrations", "train", "evaluate", "calibrate", "doctor", "demo"},
    {"bench"},
    {"cli"},
)
HEIGHT = {name: i for i, names in enumerate(LAYERS) for name in names}


def module_level_imports(path: Path) -> set[str]:
    """First part after `safeguard.` of every import that runs when the file is imported."""
    found: set[str] = set()
    todo: list[ast.stmt] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.ImportFrom) and node.module == "safeguard":
            found |= {alias.name for alias in node.names if alias.name in HEIGHT}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("safeguard."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("safeguard.")}
        elif isinstance(node, ast.Try) or (
            isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING"
        ):
            todo += node.body
    return found


def sources() -> list[tuple[str, Path]]:
    """(layer, file) for every file we ship; the two linked folders are walked where they really are."""
    top = [(p.stem, p) for p in ROOT.glob("*.py") if p.stem != "__init__"]
    inside = [
        (d.name, p) for d in ROOT.iterdir() if d.is_dir() and not d.is_symlink() for p in d.rglob("*.py")
    ]
    linked = [(n, p) for n in ("exporters", "integrations") for p in (ROOT.parent / n).rglob("*.py")]
    return sorted((n, p) for n, p in top + inside + linked if "__pycache__" not in p.parts)


def test_every_module_has_a_layer() -> None:
    assert {name for name, _ in sources()} <= set(HEIGHT)


def test_imports_point_downwards() -> None:
    wrong = [
        f"{path.relative_to(ROOT.parent)} imports safeguard.{other}"
        for here, path in sources()
        for other in module_level_imports(path)
        if other != here and HEIGHT[other] > HEIGHT[here]
    ]
    assert wrong == []


def test_the_linked_folders_are_walked() -> None:
    assert {"exporters", "integrations"} <= {name for name, _ in sources()}
