from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree

import pytest

from safeguard.bench.machine import _cpu_facts, _memory_gib, describe_machine, versions
from safeguard.bench.plot import svg
from safeguard.bench.report import Goal, Row, Section, document, latencies, lines
from safeguard.bench.timing import Spread

MACHINE = {
    "processor": "Some <CPU>",
    "cores": 2,
    "flags": ["avx2"],
    "system": "Linux x86_64",
    "python": "3.11.7",
    "load_before": 0.1,
}


def section() -> Section:
    made = Section("text", "Text & more")
    made.rows = [
        Row("ours int8", "8 prompts", [0.010, 0.012, 0.020], 8, more={"peak_mb": 300.0}),
        Row("detoxify", "8 prompts", [0.100, 0.120, 0.200], 8),
        Row("detoxify one by one", "8 prompts", [0.080, 0.090, 0.090], 8),
    ]
    return made


def written() -> dict[str, Any]:
    made = section()
    made.goal(
        "int8 against the faster Detoxify", 5, ["detoxify", "detoxify one by one"], "ours int8", "8 prompts"
    )
    made.failed["llm-guard onnx"] = "no environment"
    made.notes.append("weights are random")
    return document([made], MACHINE, repeats=3)


def test_a_row_has_median_quartiles_and_rate() -> None:
    row = section().rows[0].to_dict()

    # 10 12 20: the quartiles lie half way between neighbours
    assert (row["median_ms"], row["quartiles_ms"]) == (12.0, [11.0, 16.0])
    assert row["items_per_s"] == 83.33  # 1 / 0.012
    assert row["samples_ms"] == [10.0, 12.0, 20.0]
    assert (row["runs"], row["items_per_run"], row["peak_mb"]) == (3, 8, 300.0)


def test_a_goal_is_against_the_fastest_of_the_peers() -> None:
    goal = written()["sections"][0]["goals"][0]

    # one by one: 80/10, 90/12, 90/20 = 8, 7.5, 4.5
    assert goal["what"] == "int8 against the faster Detoxify (detoxify one by one)"
    assert (goal["got"], goal["quartiles"], goal["reached"]) == (7.5, [6.0, 7.75], True)


def test_a_goal_without_its_peer_is_not_measured() -> None:
    made = section()
    made.goal("int8 against llm-guard", 25, ["llm-guard onnx"], "ours int8", "8 prompts")

    assert made.goals[0].got is None
    assert made.goals[0].reached is None


@pytest.mark.parametrize(
    ("got", "most", "reached"), [(2.0, False, True), (1.9, False, False), (1.9, True, True)]
)
def test_goals_are_least_or_most_values(got: float, most: bool, reached: bool) -> None:
    assert Goal("x", 2.0, Spread(got, got, got, 20), most=most).reached is reached


def test_percentiles_are_over_all_calls_of_all_repeats() -> None:
    found = latencies([{"latencies": [0.001, 0.003]}, {"latencies": [0.002]}])

    # 1 2 3 ms: the median is 2, the 99th percentile at place 1.98 is 2.98
    assert found == {"p50_ms": 2.0, "p99_ms": 2.98, "calls": 3}


def test_the_document_is_json_and_names_its_format() -> None:
    found = json.loads(json.dumps(written()))

    assert found["format"] == "safeguard-bench/1"
    assert sorted(found) == ["format", "machine", "repeats", "sections"]
    assert sorted(found["sections"][0]) == sorted(
        ["contenders", "failed", "goals", "name", "notes", "rows", "title"]
    )


def test_tables_show_rows_goals_and_what_did_not_run() -> None:
    text = "\n".join(lines(written()))

    assert "ours int8" in text
    assert "peak 300 MB" in text
    assert "not run: llm-guard onnx: no environment" in text
    assert "goal reached: int8 against the faster Detoxify (detoxify one by one): 7.5 (6 - 7.75)" in text


def test_a_goal_that_was_missed_says_so() -> None:
    made = section()
    made.goal("int8 against Detoxify", 25, ["detoxify"], "ours int8", "8 prompts")

    assert "goal NOT reached: int8 against Detoxify: 10 " in "\n".join(lines(document([made], MACHINE)))


def test_the_picture_is_xml_with_a_bar_for_each_row() -> None:
    tree = ElementTree.fromstring(svg(written()))

    bars = [node for node in tree.iter("{http://www.w3.org/2000/svg}rect") if node.get("height") == "12"]
    assert len(bars) == 3
    assert "Some <CPU>, 2 cores" in "".join(tree.itertext())


def test_a_slower_contender_has_a_longer_bar() -> None:
    tree = ElementTree.fromstring(svg(written()))

    bars = [node for node in tree.iter("{http://www.w3.org/2000/svg}rect") if node.get("height") == "12"]
    ours, detoxify, one_by_one = (float(bar.get("width") or 0) for bar in bars)
    assert ours < one_by_one < detoxify


def test_the_machine_is_described_without_its_name() -> None:
    import socket

    found = describe_machine()

    assert found["cores"] >= 1
    assert found["versions"]["safeguard"]
    assert socket.gethostname() not in json.dumps(found).split('"')


def test_the_first_processor_is_read() -> None:
    text = "processor\t: 0\nmodel name\t: Xeon: Gold\nflags\t\t: avx2 amx_int8\n\nprocessor\t: 1\n"

    assert _cpu_facts(text) == {"processor": "0", "model name": "Xeon: Gold", "flags": "avx2 amx_int8"}


def test_memory_is_in_gib() -> None:
    assert _memory_gib("MemTotal:       25165824 kB\nMemFree: 1 kB\n") == 24.0  # 24 * 1024 * 1024


def test_versions_of_what_is_not_installed_are_left_out() -> None:
    assert list(versions(("numpy", "no-such-package-anywhere"))) == ["numpy"]
