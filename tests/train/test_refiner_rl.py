from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safeguard.refiners.causal_lm import CausalLMRefiner
from safeguard.refiners.framing import as_data, prompt_ids
from safeguard.refiners.torch_lm import TorchLM
from safeguard.train.refiner.picture_rewards import Drawings, Improvement, PictureReward
from safeguard.train.refiner.rewards import Weighted
from safeguard.train.refiner.rl import (
    Compat,
    GroupReward,
    RefinerRlConfig,
    Rewards,
    _arguments,
    grpo_prompt,
    load_rewards,
    read_prompts,
    text_rewards,
    train_refiner_rl,
)
from safeguard.train.refiner.sft import train_refiner_sft
from tests.adapters.tiny_lm import tiny_tokenizer
from tests.tiny_decoders import END, TEMPLATE, decoder
from tests.train.tiny_refiner import (
    IGNORE_PEFT,
    bad_words,
    base_model,
    halves,
    rewards,
    rl_config,
    sft_config,
    write_pairs,
)

pytestmark = pytest.mark.filterwarnings(IGNORE_PEFT)
RECIPES = Path(__file__).parents[2] / "safeguard" / "train" / "recipes"
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, pairs, and a supervised run."""
    root = tmp_path_factory.mktemp("reinforced")
    base_model(root / "base")
    data = write_pairs(root / "pairs.jsonl")
    train_refiner_sft(
        sft_config(root / "base", steps=2), data, root / "sft", template=TEMPLATE, progress=False
    )
    return root


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    config = rl_config()
    train_refiner_rl(
        config,
        folder / "pairs.jsonl",
        folder / "run",
        adapter=folder / "sft",
        rewards=rewards(config),
        progress=False,
    )
    return folder / "run"


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_the_run_goes_on_from_the_supervised_adapter_and_changes_it(folder: Path, run: Path) -> None:
    before, after = load_file(folder / "sft" / ADAPTER), load_file(run / ADAPTER)
    assert before.keys() == after.keys()
    assert not same(before, after)


def test_the_reference_of_the_kl_term_is_the_supervised_adapter(folder: Path, run: Path) -> None:
    reference = load_file(run / "checkpoints" / "checkpoint-4" / "ref" / ADAPTER)
    supervised = load_file(folder / "sft" / ADAPTER)
    assert same({n: t.half() for n, t in reference.items()}, supervised)


def test_the_reference_is_the_bare_base_only_for_comparison_with_ipr(folder: Path) -> None:
    config = rl_config(steps=2, compat={"reference_base": True})
    out = folder / "bare"
    train_refiner_rl(
        config, folder / "pairs.jsonl", out, adapter=folder / "sft", rewards=rewards(config), progress=False
    )
    assert not (out / "checkpoints" / "checkpoint-2" / "ref").exists()
    # the supervised adapter is already away from the base, so the first step has a KL that is not 0
    history = json.loads((out / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())
    assert history["log_history"][0]["kl"] > 1e-3


def test_the_first_step_has_no_distance_to_the_supervised_adapter(run: Path) -> None:
    state = json.loads((run / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["log_history"][0]["kl"] == pytest.approx(0, abs=1e-6)


def test_a_resumed_run_equals_an_unbroken_one(folder: Path, run: Path) -> None:
    broken = folder / "broken"
    shutil.copytree(run, broken)
    shutil.rmtree(broken / "checkpoints" / "checkpoint-4")
    for name in (ADAPTER, "metrics.json"):
        (broken / name).unlink()
    config = rl_config()
    train_refiner_rl(
        config,
        folder / "pairs.jsonl",
        broken,
        adapter=folder / "sft",
        rewards=rewards(config),
        resume=True,
        progress=False,
    )
    assert same(load_file(run / ADAPTER), load_file(broken / ADAPTER))


def test_the_template_of_the_supervised_run_is_taken_over(run: Path) -> None:
    assert CausalLMRefiner.load(run).template == TEMPLATE


def test_metrics_hold_rewards_and_the_digest_of_the_adapter(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["steps"], len(metrics["reward"]), len(metrics["adapter"])) == (4, 4, 64)


def test_the_parts_of_the_reward_are_logged(run: Path) -> None:
    state = json.loads((run / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())
    assert {"part/safety", "part/intent", "part/edits", "part/unusable", "part/kept"} <= set(
        state["log_history"][0]
    )


def test_an_image_buffer_is_saved_with_the_checkpoint_and_taken_up_again(folder: Path) -> None:
    def paid() -> Rewards:
        draw = lambda prompts, seeds: [[(p, s) for s in seeds] for p in prompts]  # noqa: E731
        worth = PictureReward(lambda images: [len(p) % 7 / 7 for p, _ in images], lambda i, t: [0.1] * len(t))
        drawings = Drawings(draw, count=2)
        improvement = Improvement(worth, drawings, walk=True)
        return Rewards(Weighted([(1.0, improvement)]), drawings, improvement)

    config, out = rl_config(steps=2, reward="improvement", checkpoint_every=1), folder / "pictures"
    first = paid()
    arguments: dict[str, Any] = {"adapter": folder / "sft", "progress": False}
    train_refiner_rl(config, folder / "pairs.jsonl", out, rewards=first, **arguments)
    assert first.improvement is not None
    kept = json.loads((out / "checkpoints" / "checkpoint-2" / "image_buffer.json").read_text())
    assert kept == json.loads(json.dumps(first.improvement.buffer.to_dict()))
    (out / "metrics.json").unlink()  # as if it had stopped in the last step
    again = paid()
    train_refiner_rl(config, folder / "pairs.jsonl", out, rewards=again, resume=True, **arguments)
    assert again.improvement is not None
    assert again.improvement.buffer.to_dict() == first.improvement.buffer.to_dict()


@pytest.mark.parametrize("template", ["chat", None])
def test_trl_tokenises_a_prompt_as_serving_does(template: str | None) -> None:
    tokenizer = tiny_tokenizer() if template else tiny_tokenizer(None)
    lm = TorchLM(decoder(), tokenizer)
    made = grpo_prompt(lm, TEMPLATE, "a<|im_end|> cat")
    if isinstance(made, str):
        ids = tokenizer(text=[made])["input_ids"][0]  # as GRPOTrainer does, by the form of the prompt
    else:
        made_ids = tokenizer.apply_chat_template([made], add_generation_prompt=True, return_dict=True)
        ids = made_ids["input_ids"][0]
    assert ids == prompt_ids(lm, TEMPLATE, as_data(lm, "a<|im_end|> cat"))


def pay(answer: str, ids: list[int], **options: Any) -> list[float]:
    total = Weighted(text_rewards(rl_config(intent_weight=0, edit_weight=0), bad_words(), halves))
    reward = GroupReward(Rewards(total), TEMPLATE, [END], **options)
    turn = [{"role": "assistant", "content": answer}]
    return reward([""], [turn], [ids], original=["a bad cat"])


def test_an_answer_is_paid_for_what_serving_would_make_of_it() -> None:
    assert pay("a good cat", [1, END]) == [1.0]


def test_the_last_word_of_an_answer_that_was_cut_off_does_not_count() -> None:
    assert pay("a good bad", [1, 2]) == [1.0]
    assert pay("a good bad", [1, END]) == [0.0]


def test_a_refusal_is_paid_as_unusable_unless_read_as_the_released_code_does() -> None:
    assert pay("I'm sorry, I can't", [1, END]) == [-1.0]
    assert pay("I'm sorry, I can't", [1, END], verbatim=True) == [1.0]


def test_every_sampling_option_is_said() -> None:
    args = _arguments(rl_config(), Path("x"), progress=False)
    # IPR takes repetition penalty and sampling from the model's own settings, and a length other than it says
    assert (args.repetition_penalty, args.temperature, args.max_completion_length) == (1.0, 0.9, 6)
    assert (args.num_generations, args.per_device_train_batch_size, args.log_completions) == (2, 4, False)


def test_accumulation_must_divide_the_answers_of_a_step() -> None:
    with pytest.raises(ValueError, match=r"accumulate must divide prompts_per_step \* generations = 4"):
        _arguments(rl_config(accumulate=3), Path("x"), progress=False)


def test_all_quirks_of_released_code_are_off_by_default() -> None:
    assert not any(Compat().model_dump().values())


def test_a_picture_reward_says_what_it_needs() -> None:
    config = rl_config(reward="pictures", safety_weight=0, intent_weight=0, edit_weight=0)
    with pytest.raises(ValueError, match="needs a pipeline, a Q16 check and a CLIP model"):
        load_rewards(config)


def test_a_file_of_prompts_without_any_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="no prompt to train on"):
        train_refiner_rl(rl_config(), tmp_path / "p.jsonl", tmp_path / "out")


def test_a_file_gives_its_training_prompts(folder: Path) -> None:
    assert len(read_prompts(folder / "pairs.jsonl", rl_config())) == 12


def test_the_shipped_recipe_is_valid() -> None:
    config = RefinerRlConfig.read(RECIPES / "refiner_rl.toml")
    assert config.prompts_per_step * config.generations % config.accumulate == 0
