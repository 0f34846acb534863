"""What our sources may never say: code from data, pickles, remote code, shells, event loops of their own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_layers import ROOT, sources

NETWORK = {"aiohttp", "ftplib", "http.client", "httpx", "paramiko", "requests", "smtplib", "telnetlib"}
PICKLES = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
LOOPS = {"asyncio.run", "asyncio.new_event_loop", "asyncio.set_event_loop", "asyncio.get_event_loop"}
SHELLS = {"os.system", "os.popen", "commands.getoutput", "subprocess.getoutput", "subprocess.getstatusoutput"}
NEVER = {
    "logging.basicConfig": "an application decides where its logs go",
    "tempfile.mktemp": "the name can be taken before the file is made",
    "torch.hub.load": "runs code from a repository",
    "yaml.full_load": "makes objects",
    "yaml.load_all": "makes objects",
    "yaml.unsafe_load": "makes objects",
    **dict.fromkeys(LOOPS, "the application's event loop is not ours"),
    **dict.fromkeys(SHELLS, "goes through a shell"),
}
ENVIRONMENT = {  # the functions that may change the environment for a moment, and why
    "safeguard/backends/torch.py": "torch reads from there only whether it may unpickle",
    "safeguard/doctor.py": "the hub client reads from there whether it may use the network",
}


def problems(tree: ast.Module) -> Iterator[str]:
    """What a source says that it may not, with the line."""
    names = _imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (f"{node.lineno}: imports {m}" for m in _modules(node) if _is_banned(m))
        elif isinstance(node, ast.Call):
            yield from (
                f"{node.lineno}: {what}" for what in _call_problems(node, _full_name(node.func, names))
            )


def _imported(tree: ast.Module) -> dict[str, str]:
    """Local name -> what it was imported as."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def _full_name(node: ast.expr, names: dict[str, str]) -> str:
    """`np.load` as "numpy.load"; a method of something unknown as ".load"."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(names.get(node.id, node.id) if isinstance(node, ast.Name) else "")
    return ".".join(reversed(parts))


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]


def _is_banned(module: str) -> bool:
    return module in NETWORK | {"urllib.request"} or module.split(".")[0] in PICKLES | NETWORK | {
        "nest_asyncio"
    }


def _call_problems(node: ast.Call, name: str) -> Iterator[str]:
    given = {k.arg: k.value for k in node.keywords if k.arg}
    if name in NEVER:
        yield f"{name}: {NEVER[name]}"
    if name in ("eval", "exec", "compile", "breakpoint", "builtins.eval", "builtins.exec"):
        yield f"{name} runs code"
    if name == "torch.load" and not _is(given.get("weights_only"), True):
        yield "torch.load without weights_only=True unpickles"
    if name in ("numpy.load", "numpy.lib.npyio.load") and not _is(given.get("allow_pickle"), False):
        yield "numpy.load without allow_pickle=False"
    if name == "yaml.load" and not ast.unparse(given.get("Loader", ast.Constant(None))).endswith(
        "StrictLoader"
    ):
        yield "yaml.load without our strict loader"
    if "trust_remote_code" in given and not _is(given["trust_remote_code"], False):
        yield "trust_remote_code"
    if "shell" in given and not _is(given["shell"], False):
        yield "a shell"
    if "verify" in given and _is(given["verify"], False):
        yield "certificates are not verified"
    if name.endswith((".run_until_complete", ".run_forever")):
        yield "runs an event loop"


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


PATHS = [path for _, path in sources()] + [ROOT / "__init__.py"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT.parent)))
def test_source_says_nothing_dangerous(path: Path) -> None:
    assert list(problems(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_environment_is_changed_only_where_it_must_be() -> None:
    changing = {
        str(path.relative_to(ROOT.parent))
        for path in PATHS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (
            isinstance(node, ast.Subscript)
            and not isinstance(node.ctx, ast.Load)
            and _is_environment(node.value)
        )
        or (isinstance(node, ast.Call) and ast.unparse(node.func) in CHANGES)
    }
    assert changing <= set(ENVIRONMENT)


CHANGES = {
    "os.putenv",
    "os.unsetenv",
    *(f"os.environ.{method}" for method in ("update", "setdefault", "pop", "clear")),
}


def _is_environment(node: ast.expr) -> bool:
    return ast.unparse(node) in ("os.environ", "environ")


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "import urllib.request",
        "from requests import get",
        "eval('1')",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x', weights_only=False)",
        "from torch import load\nload('x')",
        "import numpy as np\nnp.load('x')",
        "import yaml\nyaml.load(x)",
        "import yaml\nyaml.load(x, Loader=yaml.Loader)",
        "from asyncio import run\nrun(main())",
        "import asyncio\nasyncio.run(main())",
        "loop.run_until_complete(x)",
        "model.from_pretrained(x, trust_remote_code=True)",
        "model.from_pretrained(x, trust_remote_code=trust)",
        "import subprocess\nsubprocess.run(x, shell=True)",
        "import tempfile\ntempfile.mktemp()",
        "import logging\nlogging.basicConfig()",
    ],
)
def test_danger_is_seen(source: str) -> None:
    assert list(problems(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import torch\ntorch.load('x', weights_only=True)",
        "import re\nre.compile('a')",
        "loop.load(x)",
    ],
)
def test_harmless_look_alike_is_no_danger(source: str) -> None:
    assert list(problems(ast.parse(source))) == []
