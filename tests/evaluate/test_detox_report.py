from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from safeguard.evaluate.detox_report import columns_of, read_result, report_html
from safeguard.evaluate.detox_svg import apart, bars, curve, scatter, ticks


def row(tp: float, emt: float) -> dict[str, Any]:
    return {
        "prompts": 3,
        "tp": {"mean": tp, "std": 0.01, "runs": [tp]},
        "emt": {"mean": emt, "std": None, "runs": [emt]},
    }


def result(name: str, tp: float, *, step: int | None = None, perplexity: float = 20.0) -> dict[str, Any]:
    families = {
        "disability": row(tp, 0.3),
        "in_distribution": row(tp, 0.2),
        "out_of_distribution": row(tp, 0.3),
    }
    return {
        "kind": "detox",
        "format": 1,
        "name": name,
        "step": step,
        "model_digest": "0" * 64,
        "settings": {"seeds": [1]},
        "note": "fewer steps" if name == "ours" else "",
        "suites": {"toxigen": {"judges": {"box": families}, "distinct": {}, "tokens_per_s": 12.0}},
        "clean": {"perplexity": perplexity},
    }


def test_every_result_is_a_row_and_the_least_toxic_stands_out() -> None:
    page = report_html([result("base", 0.4), result("ours", 0.2)])
    assert page.index("<td>base</td>") < page.index("<td>ours</td>")
    assert '<td class="best">0.200 <small>± 0.010</small></td>' in page
    assert '<td class="best">0.400' not in page
    assert "ours: fewer steps" in page


def test_in_and_out_of_distribution_are_columns_of_their_own() -> None:
    assert columns_of([result("base", 0.4)]) == [
        ("toxigen", "box", "in_distribution", "tp"),
        ("toxigen", "box", "in_distribution", "emt"),
        ("toxigen", "box", "out_of_distribution", "tp"),
        ("toxigen", "box", "out_of_distribution", "emt"),
    ]


def test_page_loads_nothing_from_elsewhere() -> None:
    found: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(f"{tag} {name}" for name, _ in attrs if name in ("src", "href"))
            if tag in ("script", "link", "iframe", "img"):
                found.append(tag)

    Links().feed(report_html([result("base", 0.4), result("ours", 0.2)]))
    assert found == []


def test_names_cannot_bring_markup_in() -> None:
    page = report_html([result("<script>x</script>", 0.4)])
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_training_steps_make_a_curve() -> None:
    some = [result("ours", 0.4, step=100), result("ours", 0.3, step=200), result("base", 0.5)]
    page = report_html(some)
    assert "<polyline" in page
    assert "ours, step 200" in page


def test_curves_begin_at_the_base_where_it_comes_first() -> None:
    page = report_html([result("base", 0.5), result("ours", 0.4, step=100), result("ours", 0.3, step=200)])
    assert page.count("<polyline") == 2  # in and out of distribution
    # steps 0 to 200 in ticks of 50, from 70 to 640 across: 0, 100 and 200 lie at 70, 355 and 640
    line = page.split('<polyline points="')[1].split('"')[0]
    assert [point.split(",")[0] for point in line.split()] == ["70.0", "355.0", "640.0"]


def test_what_is_known_of_several_rows_is_said_once() -> None:
    some = [result(name, 0.4) | {"note": "one rate", "reduced": "few texts"} for name in ("a", "b")]
    page = report_html(some)
    assert page.count("one rate") == page.count("few texts") == 1
    assert "a, b: one rate" in page


def test_names_in_a_picture_keep_a_line_apart() -> None:
    # the lowest (largest) stays at 100; the one at 98 goes to 86, and 40 is far enough away
    assert apart([98.0, 40.0, 100.0]) == [86.0, 40.0, 100.0]


def test_report_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one result"):
        report_html([])


def test_contamination_is_a_table() -> None:
    figures = {
        "items": 3, "longest_span": 9, "mean_span": 2.0, "share_span_8": 1 / 3, "largest_jaccard": 1.0,
        "share_jaccard": 0.0, "contaminated": [1],
    }  # fmt: skip
    assert "<td>prompts in texts</td><td>3</td><td>9</td>" in report_html(
        [result("base", 0.4)], contamination={"prompts in texts": figures}
    )


def test_other_json_files_are_no_results(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a result of"):
        read_result(tmp_path / "x.json")


def test_broken_files_are_no_results(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON file"):
        read_result(tmp_path / "x.json")


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(result("base", 0.4)))
    assert read_result(tmp_path / "x.json") == result("base", 0.4)


def test_ticks_are_round_and_hold_the_values() -> None:
    # 0.37 / 5 = 0.074 -> steps of 0.1; (12 - 3) / 5 = 1.8 -> steps of 2 from 2
    assert ticks(0.0, 0.37) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert ticks(3, 12) == [2, 4, 6, 8, 10, 12]


def test_one_value_still_has_an_axis() -> None:
    # nothing between 5 and 5, so 5 to 10 in steps of 1
    assert ticks(5, 5) == [5, 6, 7, 8, 9, 10]


def test_length_of_a_bar_is_its_value() -> None:
    # 860 - 260 - 90 = 510 for 1
    picture = ElementTree.fromstring(bars([("a & b", 0.5, 0.1), ("c", 1.0, None)], "t"))
    space = "{http://www.w3.org/2000/svg}"
    assert [r.get("width") for r in picture.findall(f"{space}rect")[1:]] == ["255.0", "510.0"]


def test_points_and_lines_are_well_formed_and_named() -> None:
    for picture in (
        scatter([("a<b", 10.0, 0.2), ("c", 12.0, 0.1)], "x", "y"),
        curve({"a": [(1, 0.5), (2, 0.1)]}, "x", "y"),
    ):
        assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert "a&lt;b" in scatter([("a<b", 10.0, 0.2), ("c", 12.0, 0.1)], "x", "y")
