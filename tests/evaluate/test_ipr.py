from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from safeguard.evaluate.ipr import IprEvaluation, Measures, evaluate_ipr
from safeguard.evaluate.ipr_judges import CheckNudity, PictureJudge
from safeguard.evaluate.ipr_prompts import PROTOCOLS, IprPrompt
from safeguard.testing import SwapRefiner
from safeguard.types import Scores
from tests.evaluate.test_ipr_loops import RedCheck, guard_of
from tests.evaluate.tiny_diffusion import draw

PROMPTS = [IprPrompt("a knife", "tools"), IprPrompt("a fork", "tools"), IprPrompt("a cup", "cups")]
GUARD = PROTOCOLS["guard"].with_changes(images=2, rounds=1)
PUBLISHED = PROTOCOLS["ipr"].with_changes(images=2, rounds=1)


def judge(name: str = "outsider", threshold: float = 0.5) -> PictureJudge:
    return PictureJudge(RedCheck(name), "red", threshold)


def evaluate(protocol: Any = GUARD, **changes: Any) -> IprEvaluation:
    refiner = SwapRefiner({"knife": "cup"})
    options: dict[str, Any] = {"guard": guard_of(refiner, rounds=1), "refiner": refiner} | changes
    measures = options.pop("measures", Measures([judge()]))
    return evaluate_ipr(PROMPTS, lambda guidance: draw, protocol, measures, **options)


def steps(result: IprEvaluation) -> dict[str, Any]:
    return {row.step: row for row in result.rows if row.subset == "all"}


def test_rounds_of_the_guard_are_judged_from_outside() -> None:
    result = evaluate()
    rows = steps(result)
    # knife 220/255 and fork 150/255 are over 0.5, the cup is not; the fork cannot be refined
    assert rows["bare"].ip_images["outsider/red"] == pytest.approx(4 / 6)
    assert rows["round 1"].ip_images["outsider/red"] == pytest.approx(2 / 6)
    assert rows["handed out"].ip_images["outsider/red"] == 0.0
    assert rows["handed out"].refused == pytest.approx(2 / 6)
    assert rows["round 1"].kept == pytest.approx(2 / 6)  # the cups
    assert result.cut == {"round 1": pytest.approx(0.5), "handed out": pytest.approx(1.0)}
    assert result.outside == {"outsider/red": True}


def test_published_loop_leaves_what_the_refiner_keeps() -> None:
    rows = steps(evaluate(PUBLISHED))
    assert list(rows) == ["bare", "round 0", "round 1", "handed out"]
    assert rows["round 1"].kept == pytest.approx(4 / 6)  # only knives are rewritten
    assert rows["handed out"].refused == 0.0


def test_the_check_of_the_loop_may_not_judge_it() -> None:
    with pytest.raises(ValueError, match="reds/red is the check of the loop, so it may not judge it"):
        evaluate(measures=Measures([judge("reds")]))


def test_it_may_when_asked_for_and_the_report_says_so() -> None:
    result = evaluate(measures=Measures([judge("reds"), judge()]), inside=True)
    assert result.outside == {"reds/red": False, "outsider/red": True}
    assert "reds/red judged its own work" in result.to_markdown()


def test_a_judge_with_the_digest_of_the_check_is_the_check() -> None:
    guard = guard_of(SwapRefiner({}), rounds=1)
    same = RedCheck("other name")
    guard.outputs[0].digest = same.digest = "0" * 64  # type: ignore[attr-defined]  # optional in a check
    with pytest.raises(ValueError, match="other name/red is the check of the loop"):
        evaluate(guard=guard, measures=Measures([PictureJudge(same, "red")]))


def test_what_cannot_be_measured_is_none_with_a_reason() -> None:
    found = evaluate().to_dict()
    assert found["rows"][0]["similarity"] is None
    assert found["rows"][0]["IP_posi"] is None
    assert "no joint encoder" in found["missing"]["similarity"]
    assert "NudeNet's classes" in found["missing"]["IP_i2p"]


def test_similarity_is_to_the_original_prompt() -> None:
    asked: list[str] = []

    def align(images: Sequence[Any], texts: Sequence[str]) -> list[float]:
        asked.extend(texts)
        return [image.getpixel((0, 0))[2] / 255 for image in images]

    rows = steps(evaluate(measures=Measures([judge()], alignment=align)))
    assert set(asked) == {"a knife", "a fork", "a cup"}
    # bare: two cups are 220/255 blue, the others have none
    assert rows["bare"].similarity == pytest.approx(2 * 220 / 255 / 6)
    assert rows["round 1"].similarity == pytest.approx(4 * 220 / 255 / 6)


def test_nudity_counts_as_each_paper_has_it() -> None:
    class Bellies:
        name, modality, labels = "bodies", "image", ("BELLY_EXPOSED", "ANUS_EXPOSED")

        def __call__(self, batch: Sequence[Any], /) -> list[Scores]:
            blue = [image.getpixel((0, 0))[2] > 0 for image in batch]
            return [{"BELLY_EXPOSED": 0.3 * is_blue, "ANUS_EXPOSED": 0.0} for is_blue in blue]

    rows = steps(evaluate(measures=Measures([judge()], nudity=CheckNudity(Bellies()))))
    assert rows["bare"].IP_posi == 1.0  # red ones by the judge, blue ones by a belly
    assert rows["bare"].IP_i2p == pytest.approx(4 / 6)  # which does not count there


def test_a_check_without_such_categories_is_no_measure_of_nudity() -> None:
    with pytest.raises(ValueError, match="check 'reds' has none of NudeNet's categories"):
        CheckNudity(RedCheck())


def test_texts_are_compared_where_a_measure_is_given() -> None:
    def like(first: Sequence[str], second: Sequence[str]) -> list[float]:
        return [float(a == b) for a, b in zip(first, second, strict=True)]

    rows = steps(evaluate(measures=Measures([judge()], text_similarity=like)))
    assert rows["round 1"].text_similarity == pytest.approx(4 / 6)


def test_everything_is_written_down(tmp_path: Path) -> None:
    result = evaluate(out=tmp_path / "out", sheet=2)
    assert json.loads((tmp_path / "out" / "ipr.json").read_text()) == result.to_dict()
    lines = (tmp_path / "out" / "streams.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 3
    assert json.loads(lines[1])["streams"][0]["texts"] == ["a knife", "a cup"]


def test_sheet_shows_flagged_prompts_first_with_their_pictures(tmp_path: Path) -> None:
    evaluate(out=tmp_path, sheet=1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        # the only row is the knife: bare red, round 0 red, round 1 a blue cup; tiles begin at 44 + 26 + 20
        pixels: list[Any] = [sheet.getpixel((12 + i * 172 + 8, 44 + 26 + 20 + 8)) for i in range(3)]
    assert [(p[0] > 100, p[2] > 100) for p in pixels] == [(True, False), (True, False), (False, True)]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = evaluate(out=tmp_path / "whole")
    drawn: list[str] = []

    def counted(prompts: Sequence[str], seeds: Sequence[int]) -> list[list[Any]]:
        drawn.extend(prompts)
        return draw(prompts, seeds)

    evaluate(out=tmp_path / "cut")
    path = tmp_path / "cut" / "streams.jsonl"
    lines = path.read_text().split("\n")
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])  # two prompts, and half of the third
    refiner = SwapRefiner({"knife": "cup"})
    again = evaluate_ipr(
        PROMPTS,
        lambda guidance: counted,
        GUARD,
        Measures([judge()]),
        guard=guard_of(refiner, rounds=1),
        out=tmp_path / "cut",
        resume=True,
    )
    assert set(drawn) == {"a cup"}
    assert again.to_dict() == whole.to_dict()


def test_another_run_is_not_mixed_in(tmp_path: Path) -> None:
    evaluate(out=tmp_path)
    with pytest.raises(ValueError, match="holds a run already; give a new folder, or --resume"):
        evaluate(out=tmp_path)
    with pytest.raises(ValueError, match="holds a run with other settings"):
        evaluate(out=tmp_path, resume=True, seed=5)


def test_prompts_near_the_training_data_have_rows_without_them() -> None:
    result = evaluate(training=["a knife"])
    assert {(r.subset, r.streams) for r in result.rows} == {("all", 6), ("decontaminated", 4)}


def test_each_row_draws_with_its_own_seed_and_guidance_in_i2p() -> None:
    asked: list[Any] = []

    def draw_at(guidance: float) -> Any:
        def noted(prompts: Sequence[str], seeds: Sequence[int]) -> list[list[Any]]:
            asked.append((guidance, *seeds))
            return draw(prompts, seeds)

        return noted

    protocol = PROTOCOLS["i2p"].with_changes(images=2)
    prompts = [IprPrompt("a cup", seed=30, guidance=9.0), IprPrompt("a cup")]
    evaluate_ipr(prompts, draw_at, protocol, Measures([judge()]))
    assert asked == [(9.0, 30, 31), (7.5, 2, 3)]


def test_shared_noise_is_the_same_for_every_prompt() -> None:
    protocol = PROTOCOLS["posi"].with_changes(images=2, rounds=0)
    result = evaluate_ipr(PROMPTS, lambda guidance: draw, protocol, Measures([judge()]), seed=4)
    assert len(result.records) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guard": None}, "the loop 'guard' needs a guard with an image check and a refiner"),
        ({"guard": guard_of(SwapRefiner({}), rounds=2)}, "the guard's max_rounds is 2"),
        ({"measures": Measures([])}, "evaluate needs at least one prompt and one judge"),
        ({"measures": Measures([judge(), judge()])}, "judges must have different names"),
        ({"protocol": PUBLISHED, "refiner": None}, "the loop 'published' needs a refiner"),
    ],
)
def test_what_is_missing_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(**changes)


def test_a_guard_without_an_image_check_looks_at_nothing() -> None:
    from safeguard.guards import Guard
    from safeguard.policy import Policy

    with pytest.raises(ValueError, match="the guard has no image check"):
        evaluate(guard=Guard(policy=Policy(max_rounds=1)))


def test_a_judge_that_gives_no_probability_is_an_error() -> None:
    class Broken(RedCheck):
        def __call__(self, batch: Sequence[Any], /) -> list[Scores]:
            return [{"red": float("nan")} for _ in batch]

    with pytest.raises(ValueError, match=r"broken/red must give each picture a score in \[0, 1\], got nan"):
        evaluate(measures=Measures([PictureJudge(Broken("broken"), "red")]))
