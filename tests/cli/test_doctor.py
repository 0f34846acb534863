from __future__ import annotations

import json

from safeguard.doctor import examine
from tests.cli.conftest import Run


def test_json_is_the_diagnosis(run: Run) -> None:
    result = run("doctor", "--offline", "--json")

    assert json.loads(result.stdout) == examine(offline=True).to_dict()


def test_the_exit_code_says_whether_the_standard_preset_can_run(run: Run) -> None:
    assert run("doctor", "--offline").exit_code == (0 if examine(offline=True).ready else 1)


def test_everything_that_is_missing_is_shown_with_its_remedy(run: Run) -> None:
    shown = run("doctor", "--offline").stdout
    missing = [item for item in examine(offline=True).items if item.remedy]

    assert all(f"{item.name}: " in shown and f"-> {item.remedy}" in shown for item in missing)
