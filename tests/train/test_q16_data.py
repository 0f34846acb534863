from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safeguard.train.q16_data import read_pictures
from tests.train.tiny_pictures import picture, write_labels, write_pictures


def rows_of(folder: Path, count: int, **columns: Any) -> list[dict[str, Any]]:
    for i in range(count):
        picture(folder / f"{i}.png", (i, 0, 0), seed=i)
    return [{"file": f"{i}.png", "label": i % 2, **columns} for i in range(count)]


def test_parts_and_labels_are_those_of_the_file(tmp_path: Path) -> None:
    found = read_pictures(write_pictures(tmp_path), tmp_path / "labels.jsonl")
    three = {"inappropriate": 3, "harmless": 3}
    wanted = {"train": {"inappropriate": 6, "harmless": 6}, "validation": three, "test": three}
    assert found.counts() == wanted


def test_csv_says_the_same_as_json_lines(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 3, split="train") + [{"file": "2.png", "label": 0, "split": "val"}]
    lines = [",".join(map(str, row.values())) for row in rows]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label,split", *lines]), encoding="utf-8")
    write_labels(tmp_path, rows)
    found = [read_pictures(tmp_path, tmp_path / f"labels.{kind}") for kind in ("csv", "jsonl")]
    assert found[0] == found[1]
    assert len(found[0].part("validation")) == 1


def test_other_names_of_parts_are_known(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 3)
    for row, split in zip(rows, ("dev", "held_out", ""), strict=True):
        row["split"] = split
    found = read_pictures(tmp_path, write_labels(tmp_path, rows))
    assert [p.part for p in found.pictures] == ["validation", "test", "train"]


def test_ratings_become_labels_and_the_middle_is_left_out(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 4, split="train")
    for row, rating in zip(rows, (1.0, 3.0, 4.0, 2.4), strict=True):
        del row["label"]
        row["rating"] = rating
    rows.append({"file": "0.png", "label": 1, "split": "validation"})  # so that none is drawn
    found = read_pictures(tmp_path, write_labels(tmp_path, rows))
    # under 2.5 inappropriate, over 3.5 harmless; 0.png stands in validation, so training loses it
    assert [(p.name, p.unsafe) for p in found.part("train")] == [("2.png", False), ("3.png", True)]


def test_validation_is_drawn_by_groups_of_both_labels(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 40, split="train")
    for i, row in enumerate(rows):
        row["group"] = f"{i % 2}-{i // 4}"  # ten groups of two for each label
    found = read_pictures(tmp_path, write_labels(tmp_path, rows), validation_fraction=0.2)
    # a fifth of twenty pictures is four, two whole groups of each label
    assert found.counts()["validation"] == {"inappropriate": 4, "harmless": 4}
    groups = [{p.group for p in found.part(part)} for part in ("train", "validation")]
    assert not groups[0] & groups[1]


def test_validation_follows_from_the_seed(tmp_path: Path) -> None:
    labels = write_labels(tmp_path, rows_of(tmp_path, 40))
    one, same, other = (read_pictures(tmp_path, labels, seed=seed) for seed in (1, 1, 2))
    assert one.digest == same.digest
    assert one.part("validation") != other.part("validation")


def test_a_file_that_is_held_out_too_is_left_out_of_training(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 4, split="train")
    (tmp_path / "copy.png").write_bytes((tmp_path / "1.png").read_bytes())
    rows += [{"file": "copy.png", "label": 1, "split": "test"}]
    rows += [{"file": "3.png", "label": 1, "split": "validation"}]
    found = read_pictures(tmp_path, write_labels(tmp_path, rows))
    assert [p.name for p in found.part("train")] == ["0.png", "2.png"]
    assert found.duplicates == 2


def test_digest_changes_with_the_content_of_a_picture(tmp_path: Path) -> None:
    labels = write_labels(tmp_path, rows_of(tmp_path, 6))
    before = read_pictures(tmp_path, labels).digest
    picture(tmp_path / "0.png", (9, 9, 9), seed=99)
    assert read_pictures(tmp_path, labels).digest != before


def test_a_group_in_two_parts_is_refused(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 4, group="cat", split="train")
    rows[0]["split"] = "test"
    with pytest.raises(ValueError, match="1 groups stand in more than one split, such as 'cat'"):
        read_pictures(tmp_path, write_labels(tmp_path, rows))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 1}, "line 1 of labels.jsonl must have file"),
        ({"file": "0.png", "label": 2}, "line 1 of labels.jsonl: label must be 0 or 1, got 2"),
        ({"file": "0.png", "label": "yes"}, "label must be 0 or 1, got 'yes'"),
        ({"file": "0.png"}, "must have label 0 or 1, or a rating"),
        ({"file": "0.png", "rating": "nan"}, "must have label 0 or 1, or a rating"),
        ({"file": "0.png", "label": 1, "split": "later"}, "split must be train, validation or test"),
        ({"file": "../0.png", "label": 1}, "file must be a relative path inside the folder"),
        ({"file": "/0.png", "label": 1}, "file must be a relative path inside the folder"),
    ],
)
def test_a_row_that_says_something_else_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    rows_of(tmp_path, 1)
    with pytest.raises(ValueError, match=message):
        read_pictures(tmp_path, write_labels(tmp_path, [row]))


def test_a_picture_that_is_not_there_is_named(tmp_path: Path) -> None:
    labels = write_labels(tmp_path, [{"file": "none.png", "label": 1}])
    with pytest.raises(FileNotFoundError, match=r"no such picture \(line 1 of labels.jsonl\)"):
        read_pictures(tmp_path, labels)


def test_lines_that_are_no_objects_are_named(tmp_path: Path) -> None:
    (tmp_path / "labels.jsonl").write_text("[1]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1 of labels.jsonl must be an object"):
        read_pictures(tmp_path, tmp_path / "labels.jsonl")
    (tmp_path / "labels.jsonl").write_text("{\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1 of labels.jsonl is no JSON"):
        read_pictures(tmp_path, tmp_path / "labels.jsonl")


def test_an_empty_file_of_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"labels.jsonl names no picture"):
        read_pictures(tmp_path, write_labels(tmp_path, []))


def test_ratings_that_cross_are_refused(tmp_path: Path) -> None:
    labels = write_labels(tmp_path, rows_of(tmp_path, 2))
    with pytest.raises(ValueError, match="inappropriate_rating must be at most harmless_rating, got 4"):
        read_pictures(tmp_path, labels, harmless_rating=3.0, inappropriate_rating=4.0)
