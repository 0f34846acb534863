from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
from pydantic import ValidationError

from safeguard.evaluate.detox_run import RunConfig
from safeguard.train.unidetox.config import Corpus, Tuning, UniDetoxConfig
from safeguard.train.unidetox.corpus import read_texts, texts_file, toxic_texts
from tests.train.tiny_detox import KIND, RUDE, write_pack

SHIPPED = Path(str(resources.files("safeguard.train") / "recipes" / "unidetox.toml"))


def test_shipped_recipe_has_the_published_settings() -> None:
    # the paper: 1e-5, 6 epochs of 4; 640 texts of 256 at alpha 0.1; 3000 steps of 8 at 5e-5
    recipe = RunConfig.read(SHIPPED)
    assert (recipe.toxic.learning_rate, recipe.toxic.epochs, recipe.toxic.batch_size) == (1e-5, 6, 4)
    assert (recipe.distil.texts, recipe.distil.tokens, recipe.distil.alpha) == (640, 256, 0.1)
    assert (recipe.apply.steps, recipe.apply.batch_size, recipe.apply.learning_rate) == (3000, 8, 5e-5)


def test_preset_for_the_cpu_says_what_it_leaves_out() -> None:
    recipe = RunConfig.read(SHIPPED, "cpu")
    assert recipe.preset == "cpu"
    assert "published" in recipe.reduced
    assert (recipe.toxic.steps, recipe.toxic.epochs) == (1500, None)
    assert recipe.apply.lora is not None


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no preset 'gpu' in unidetox\.toml; known: cpu"):
        RunConfig.read(SHIPPED, "gpu")


def test_values_change_by_dotted_names() -> None:
    recipe = RunConfig.read(SHIPPED).changed({"toxic.steps": 2, "distil.beta": 0.5})
    assert (recipe.toxic.steps, recipe.toxic.epochs, recipe.distil.beta) == (2, None, 0.5)


def test_unknown_values_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"apply\.stepz"):
        RunConfig.read(SHIPPED).changed({"apply.stepz": 2})


def test_a_tuning_has_one_length() -> None:
    with pytest.raises(ValidationError, match="give either steps or epochs"):
        Tuning(learning_rate=1e-5, batch_size=2, steps=3, epochs=1)


def test_corpus_leaves_the_unseen_group_out(tmp_path: Path) -> None:
    texts, digests = toxic_texts(UniDetoxConfig().corpus, write_pack(tmp_path))
    assert texts == RUDE[:2]  # the third is also about a disability
    assert list(digests) == ["toxicity_text.jsonl.gz"]


def test_any_file_can_be_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": "a"}\n')
    corpus = Corpus(files=("own.jsonl",), source=None, label=None, splits=None)
    assert toxic_texts(corpus, tmp_path)[0] == ["a", "b"]


def test_corpus_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text of"):
        toxic_texts(Corpus(source="other"), write_pack(tmp_path))


def test_published_texts_are_read_from_the_pack(tmp_path: Path) -> None:
    path = texts_file("published", write_pack(tmp_path), tmp_path / "texts.jsonl")
    assert read_texts(path) == KIND


def test_published_csv_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('Text\n"one, two"\nthree\n')
    assert read_texts(tmp_path / "x.csv") == ["one, two", "three"]


def test_csv_without_the_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("words\none\n")
    with pytest.raises(ValueError, match="must have a column 'Text'; it has words"):
        read_texts(tmp_path / "x.csv")


def test_missing_own_texts_say_which_stage_makes_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run the stage distil first"):
        texts_file("own", tmp_path, tmp_path / "texts.jsonl")
