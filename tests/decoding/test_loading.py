"""The policy's `decoding` part guides a guarded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import safeguard
from safeguard import Guard, PackNotFound, Policy, PolicyError
from safeguard.decoding.contrastive import ContrastiveProcessor
from safeguard.decoding.value_model import ValueModel
from safeguard.testing import WordCheck
from tests.adapters.tiny_lm import asked, tiny_llama, tiny_tokenizer
from tests.decoding import tables

TOK = tiny_tokenizer()


def other(folder: Path, seed: int = 1, vocabulary: int | None = None) -> Any:
    """A model of the guarded model's vocabulary, saved, and as it is loaded."""
    model = tables.tiny_llama(seed, vocabulary or len(TOK))
    model.save_pretrained(folder)
    return model


def guarded(decoding: dict[str, Any], folder: Path | None = None) -> Any:
    guard = Guard(outputs=[WordCheck("blood")], policy=Policy(decoding=decoding), folder=folder)
    return guard(tiny_llama(TOK), tokenizer=TOK)


def answer(model: Any, *prompts: str, **how: Any) -> Any:
    return model.generate(**asked(TOK, *prompts), max_new_tokens=8, do_sample=False, **how)


def test_guarded_model_generates_as_with_the_processor_by_hand(tmp_path: Path) -> None:
    anti = other(tmp_path / "anti")
    model = guarded({"method": "contrastive", "anti_expert": "anti"}, tmp_path)
    batch = asked(TOK, "one?", "a longer one?")
    by_hand = ContrastiveProcessor(anti, attention_mask=batch["attention_mask"])
    bare = tiny_llama(TOK)
    wanted = bare.generate(**batch, max_new_tokens=8, do_sample=False, logits_processor=[by_hand])
    assert torch.equal(answer(model, "one?", "a longer one?"), wanted)
    assert not torch.equal(answer(bare, "one?", "a longer one?"), wanted)


def test_dexperts_takes_nucleus_and_expert_from_the_policy(tmp_path: Path) -> None:
    anti, expert = other(tmp_path / "anti"), other(tmp_path / "expert", 2)
    names = {"anti_expert": str(tmp_path / "anti"), "expert": str(tmp_path / "expert")}
    model = guarded({"method": "dexperts", "strength": 1.5, **names})
    by_hand = ContrastiveProcessor(anti, expert, strength=1.5, plausibility=None, top_p=0.9)
    assert torch.equal(answer(model, "one?"), answer(tiny_llama(TOK), "one?", logits_processor=[by_hand]))


def test_rectify_uses_the_value_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ValueModel(tables.tiny_llama(3, len(TOK)).model, len(TOK), width=8).save(tmp_path / "value")
    model = guarded({"method": "rectify", "value_model": "value", "epsilon": 0.3}, tmp_path)
    assert answer(model, "one?").shape[1] > 4


def test_reports_name_the_method(tmp_path: Path) -> None:
    other(tmp_path / "anti")
    model = guarded({"method": "contrastive", "anti_expert": "anti"}, tmp_path)
    with safeguard.capture() as reports:
        output = answer(model, "one?", return_dict_in_generate=True)
    assert [r.decoding for r in reports] == ["contrastive"]
    assert output.safety[0].to_dict()["decoding"] == "contrastive"


def test_reports_without_a_method_name_none() -> None:
    with safeguard.capture() as reports:
        answer(guarded({}), "one?")
    assert [r.decoding for r in reports] == [None]


def test_processors_of_the_caller_are_kept(tmp_path: Path) -> None:
    other(tmp_path / "anti")
    model = guarded({"method": "contrastive", "anti_expert": "anti"}, tmp_path)

    class Always:
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(scores, -torch.inf)
            forced[:, 65] = 0.0
            return forced

    given = [Always()]
    assert answer(model, "one?", logits_processor=given)[0, 4:].tolist() == [65] * 8
    assert len(given) == 1


def test_padding_without_a_mask_is_seen_as_generate_sees_it(tmp_path: Path) -> None:
    other(tmp_path / "anti")
    model = guarded({"method": "contrastive", "anti_expert": "anti"}, tmp_path)
    ids = asked(TOK, "one?", "a longer one?")["input_ids"]
    bare = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(bare, answer(model, "one?", "a longer one?"))


def test_a_missing_model_is_said_when_the_model_is_wrapped(tmp_path: Path) -> None:
    with pytest.raises(
        PackNotFound, match=r"no model pack named 'nowhere'(.|\n)*decoding\.anti_expert takes"
    ):
        guarded({"method": "contrastive", "anti_expert": "nowhere"}, tmp_path)
    with pytest.raises(PackNotFound, match=r"'nowhere'(.|\n)*decoding\.value_model takes a folder"):
        guarded({"method": "rectify", "value_model": "nowhere"}, tmp_path)


def test_a_model_with_fewer_tokens_is_refused_when_wrapped(tmp_path: Path) -> None:
    other(tmp_path / "anti", vocabulary=100)
    with pytest.raises(
        ValueError, match=f"'anti' has 100 tokens, the tokenizer of the guarded model {len(TOK)}"
    ):
        guarded({"method": "contrastive", "anti_expert": "anti"}, tmp_path)


def test_a_larger_padded_table_is_cut_to_the_tokenizer(tmp_path: Path) -> None:
    other(tmp_path / "anti", vocabulary=len(TOK) + 7)
    model = guarded({"method": "contrastive", "anti_expert": "anti"}, tmp_path)
    assert answer(model, "one?").max() < len(TOK)


def test_tokens_that_mean_something_else_are_refused(tmp_path: Path) -> None:
    other(tmp_path / "anti")
    changed = tiny_tokenizer()
    changed.save_pretrained(tmp_path / "anti")
    file = tmp_path / "anti" / "tokenizer.json"
    file.write_text(file.read_text().replace('"a": 64', '"a": 65', 1).replace('"b": 65', '"b": 64', 1))
    with pytest.raises(ValueError, match="'anti' has another vocabulary: 2 tokens mean something else"):
        guarded({"method": "contrastive", "anti_expert": "anti"}, tmp_path)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"method": "contrastive"}, "method 'contrastive' needs anti_expert"),
        ({"method": "rectify"}, "method 'rectify' needs value_model"),
        ({"anti_expert": "x"}, "decoding.anti_expert says nothing to method 'none'"),
        ({"method": "contrastive", "anti_expert": "x", "expert": "y"}, "expert says nothing to method"),
        ({"method": "contrastive", "anti_expert": "x", "strength": 0}, "strength.*greater than 0"),
    ],
)
def test_a_decoding_part_that_makes_no_sense_is_refused(part: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        Policy.from_data({"decoding": part})


def test_a_decoding_part_survives_a_file(tmp_path: Path) -> None:
    policy = Policy.from_data({"decoding": {"method": "dexperts", "anti_expert": "a", "strength": 1.0}})
    policy.to_file(tmp_path / "p.yaml")
    assert Policy.from_file(tmp_path / "p.yaml") == policy
