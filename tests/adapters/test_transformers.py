"""A causal language model is guarded in place, row by row."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

import safeguard
from safeguard import Blocked, Guard, Policy
from safeguard.testing import SwapRefiner, WordCheck
from safeguard.types import Action
from tests.adapters.tiny_lm import Script, asked, tiny_llama, tiny_tokenizer

TOK = tiny_tokenizer()
ANSWERS = {"weather": "it rains", "horror": "so much blood", "story": "a long and gentle tale"}


def guarded(*, refiner: Any = None, checks: tuple[str, str] = ("knife", "blood"), **policy: Any) -> Any:
    guard = Guard([WordCheck(checks[0])], [WordCheck(checks[1])], refiner, Policy(**policy))
    return guard(tiny_llama(TOK), tokenizer=TOK)


def generate(model: Any, *prompts: str, script: Any = None, **how: Any) -> Any:
    script = script or Script(TOK, ANSWERS)
    kwargs = {"max_new_tokens": 40, "do_sample": False, "logits_processor": [script]} | how
    return model.generate(**asked(TOK, *prompts), **kwargs)


def read(output: Any) -> list[str]:
    return [str(text) for text in TOK.batch_decode(output, skip_special_tokens=True)]


def acting(stage: str, action: str, **rest: Any) -> dict[str, Any]:
    surface = {"input": "llm", "output": "text"}[stage]
    return {stage: {surface: {"action": action}}, "on_block": "replace"} | rest


# --- in place -------------------------------------------------------------------------------------


def test_guarded_model_is_the_same_object_of_its_own_class() -> None:
    model = tiny_llama(TOK)
    result = Guard()(model, tokenizer=TOK)
    assert result is model
    assert isinstance(model, LlamaForCausalLM)
    assert (type(model).__name__, type(model).__qualname__) == ("LlamaForCausalLM", "LlamaForCausalLM")
    assert type(model).__module__ == LlamaForCausalLM.__module__


def test_signature_of_generate_is_unchanged() -> None:
    assert inspect.signature(guarded().generate) == inspect.signature(tiny_llama(TOK).generate)


def test_model_moved_and_converted_is_still_guarded() -> None:
    model = guarded().to("cpu").to(torch.float64).eval()
    with pytest.raises(Blocked):
        generate(model, "a knife?")


def test_saved_config_names_the_original_class(tmp_path: Path) -> None:
    guarded().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert type(LlamaForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM


def test_deep_copy_is_guarded_and_has_its_own_weights() -> None:
    model = guarded()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert bool(model.lm_head.weight.any())
    with pytest.raises(Blocked):
        generate(twin, "a knife?")


def test_shallow_copy_is_guarded() -> None:
    with pytest.raises(Blocked):
        generate(copy.copy(guarded()), "a knife?")


def test_pickling_is_refused_with_the_way_out() -> None:
    with pytest.raises(TypeError, match="cannot be pickled, because it would come back without its guard"):
        pickle.dumps(guarded())


def test_torch_save_of_the_whole_model_is_refused() -> None:
    with pytest.raises(TypeError, match="save_pretrained, or save its state_dict"):
        torch.save(guarded(), io.BytesIO())


def test_guarding_twice_is_refused() -> None:
    with pytest.raises(TypeError, match="this LlamaForCausalLM is guarded already"):
        Guard()(guarded(), tokenizer=TOK)


def test_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(TypeError, match="encoder-decoder, and only causal language models"):
        Guard()(T5ForConditionalGeneration(config), tokenizer=TOK)


def test_model_that_does_not_generate_is_refused() -> None:
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32
    )
    with pytest.raises(
        TypeError, match=r"ViTModel: it has no generate\(\); load it with AutoModelForCausalLM"
    ):
        Guard()(ViTModel(config), tokenizer=TOK)


def test_tokenizer_is_found_in_the_folder_of_the_model(tmp_path: Path) -> None:
    tiny_llama(TOK).save_pretrained(tmp_path)
    TOK.save_pretrained(tmp_path)
    model = Guard([WordCheck("knife")])(LlamaForCausalLM.from_pretrained(tmp_path))
    with pytest.raises(Blocked):
        generate(model, "a knife?")


def test_missing_tokenizer_says_how_to_give_one() -> None:
    with pytest.raises(ValueError, match=r"pass the tokenizer: guard\(llamaforcausallm, tokenizer=\.\.\.\)"):
        Guard()(tiny_llama(TOK))


def test_tokenizer_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a transformers tokenizer, got int"):
        Guard()(tiny_llama(TOK), tokenizer=3)


def test_continuous_batching_is_closed() -> None:
    with pytest.raises(TypeError, match=r"generate_batch\(\) is not guarded"):
        guarded().generate_batch([[1, 2]])


def test_paged_cache_does_not_lead_around_the_guard() -> None:
    with pytest.raises(TypeError, match=r"generate_batch\(\) is not guarded"):
        generate(guarded(), "hello?", cache_implementation="paged")


# --- what comes back ------------------------------------------------------------------------------


def test_harmless_batch_comes_back_token_for_token() -> None:
    bare = generate(tiny_llama(TOK), "weather?", "a story?")
    assert torch.equal(generate(guarded(), "weather?", "a story?"), bare)


def test_flagged_row_is_replaced_and_its_neighbours_stay() -> None:
    output = generate(guarded(on_block="replace", placeholder_text="no"), "weather?", "horror?", "a story?")
    # continuations follow the prompts, whose tokens stay as they were
    assert read(output) == ["weather?it rains", "horror?no", "a story?a long and gentle tale"]


def test_placeholder_row_ends_with_the_end_token_and_padding() -> None:
    output = generate(guarded(on_block="replace", placeholder_text="no"), "weather?", "horror?")
    # "it rains" and its end are 9 tokens, "no" and its end are 3, which leaves 6 of padding
    wanted = [*TOK("no")["input_ids"], TOK.eos_token_id, *[TOK.pad_token_id] * 6]
    assert output[1, len("weather?") :].tolist() == wanted


def test_refused_prompt_is_not_generated_and_its_neighbours_are() -> None:
    script = Script(TOK, ANSWERS)
    output = generate(guarded(on_block="replace"), "weather?", "a knife, a story?", script=script)
    assert script.rows == [1]
    assert read(output) == ["weather?it rains", "a knife, a story?"]


def test_blocked_carries_the_safe_remainder_and_all_reports() -> None:
    with pytest.raises(Blocked) as caught:
        generate(guarded(), "weather?", "a knife?")
    assert read(caught.value.output) == ["weather?it rains", "a knife?"]
    assert [r.action for r in caught.value.reports] == [Action.ALLOW, Action.BLOCK]


def test_batch_of_refused_prompts_generates_nothing() -> None:
    script = Script(TOK, {})
    output = generate(
        guarded(on_block="replace", placeholder_text="no"), "knife?", "knives, knife?", script=script
    )
    assert script.steps == 0
    assert read(output) == ["knife?no", "knives, knife?no"]


def test_returned_sequences_have_a_report_each() -> None:
    with safeguard.capture() as reports:
        output = generate(
            guarded(on_block="replace"), "weather?", "horror?", num_return_sequences=2, do_sample=True
        )
    assert read(output) == ["weather?it rains"] * 2 + ["horror?"] * 2
    assert [r.action.value for r in reports] == ["allow", "allow", "block", "block"]


def test_beams_of_a_refused_prompt_keep_their_places() -> None:
    output = generate(
        guarded(on_block="replace", placeholder_text="no"),
        *("a knife?", "a story?"),
        num_beams=3,
        num_return_sequences=2,
        script=Script(TOK, {"story": ["one", "two"]}),
    )
    assert read(output)[:2] == ["a knife?no"] * 2
    assert sorted(read(output)[2:]) == ["a story?one", "a story?two"]


def test_output_object_carries_the_reports() -> None:
    output = generate(guarded(), "weather?", return_dict_in_generate=True, output_scores=True)
    assert [r.action for r in output.safety] == [Action.ALLOW]
    assert len(output.scores) == 9  # "it rains" and its end


def test_output_object_of_a_blocked_row_tells_nothing_of_it() -> None:
    output = generate(
        guarded(on_block="replace"), "horror?", return_dict_in_generate=True, output_scores=True
    )
    assert read(output.sequences) == ["horror?"]
    assert output.scores is None
    assert output.past_key_values is None
    assert output.safety[0].blocked


def test_output_object_is_made_where_everything_was_refused() -> None:
    output = generate(guarded(on_block="replace"), "knife?", return_dict_in_generate=True)
    assert read(output.sequences) == ["knife?"]
    assert output.safety[0].blocked


def test_flagged_words_are_redacted_in_the_continuation() -> None:
    output = generate(guarded(**acting("output", "redact")), "horror?", "weather?")
    assert read(output) == ["horror?so much [redacted]", "weather?it rains"]


def test_refined_prompt_is_what_the_model_continues() -> None:
    script = Script(TOK, {"wooden": "a toy"})
    model = guarded(refiner=SwapRefiner({"knife": "wooden spoon"}), **acting("input", "refine"))
    with safeguard.capture() as reports:
        output = generate(model, "weather?", "a knife?", script=script)
    assert script.prompts == ["weather?", "a wooden spoon?"]
    # the prompt's own tokens stay, so that what callers cut off by length is right
    assert read(output) == ["weather?fine", "a knife?a toy"]
    assert reports[1].revised_prompt == "a wooden spoon?"


def test_longer_refined_prompt_leaves_as_many_new_tokens() -> None:
    model = guarded(refiner=SwapRefiner({"knife": "very long wooden spoon"}), **acting("input", "refine"))
    output = generate(
        model, "a knife?", script=Script(TOK, {"spoon": "abcdefghij"}), max_new_tokens=None, max_length=12
    )
    assert read(output) == ["a knife?abcd"]  # 8 tokens of prompt and 4 more are 12


def test_regeneration_samples_where_greedy_search_would_say_the_same() -> None:
    torch.manual_seed(0)
    script = Script(TOK, {"day": ["blood", "sunshine"]})  # the first is the likelier
    model = guarded(**acting("output", "regenerate", max_rounds=20))
    with safeguard.capture() as reports:
        output = generate(model, "day?", script=script)
    assert read(output) == ["day?sunshine"]
    assert reports[0].action is Action.REGENERATE


def test_regeneration_of_one_row_leaves_the_other_alone() -> None:
    torch.manual_seed(0)
    script = Script(TOK, {"day": ["blood", "sunshine"]})
    output = generate(
        guarded(**acting("output", "regenerate", max_rounds=20)), "a story?", "day?", script=script
    )
    assert read(output) == ["a story?fine", "day?sunshine"]
    assert script.rows[0] == 2
    assert set(script.rows[1:]) == {1}


def test_continuation_is_judged_without_the_prompt() -> None:
    assert read(generate(guarded(checks=("knife", "weather")), "weather?")) == ["weather?it rains"]


def test_generation_config_and_positional_input_are_understood() -> None:
    model = guarded(on_block="replace")
    config = copy.deepcopy(model.generation_config)
    config.num_return_sequences, config.max_new_tokens, config.do_sample = 2, 20, True
    output = model.generate(
        asked(TOK, "horror?")["input_ids"], config, logits_processor=[Script(TOK, ANSWERS)]
    )
    assert read(output) == ["horror?", "horror?"]


def test_generation_without_a_prompt_is_judged_by_its_output() -> None:
    model = guarded(on_block="replace", checks=("knife", "blood"))

    def force(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = [*TOK("blood")["input_ids"], TOK.eos_token_id]
        scores[:] = -1e9
        scores[:, wanted[ids.shape[1] - 1]] = 0
        return scores

    output = model.generate(max_new_tokens=8, do_sample=False, logits_processor=[force])
    assert output.tolist() == [[TOK.bos_token_id, TOK.eos_token_id]]


def test_allowed_tokens_function_is_told_the_row_it_knows() -> None:
    told: set[int] = set()

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        told.add(row)
        return list(range(len(TOK)))

    generate(guarded(on_block="replace"), "knife?", "weather?", "story?", prefix_allowed_tokens_fn=allowed)
    assert told == {1, 2}


def test_prompt_lookup_and_stop_strings_pass_through() -> None:
    output = generate(guarded(), "a story?", prompt_lookup_num_tokens=2, stop_strings=["gent"], tokenizer=TOK)
    assert read(output) == ["a story?a long and gent"]


def test_more_rows_than_the_policy_allows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 1 items \(max_items\), got 2"):
        generate(guarded(max_items=1), "a?", "b?")


def test_batch_encoding_in_the_place_of_tokens_is_refused() -> None:
    with pytest.raises(TypeError, match="input_ids must be a tensor of tokens of shape"):
        guarded().generate(TOK(["a"], return_tensors="pt"))


def test_input_ids_and_inputs_together_are_refused() -> None:
    ids = asked(TOK, "a?")["input_ids"]
    with pytest.raises(ValueError, match="give input_ids or inputs, not both"):
        guarded().generate(ids, input_ids=ids)


def test_threads_on_one_model_keep_their_reports_apart() -> None:
    model = guarded(on_block="replace")
    found: dict[str, list[Any]] = {}

    def work(prompt: str, wanted: tuple[list[str], list[str]]) -> None:
        for _ in range(3):
            with safeguard.capture() as reports:
                output = generate(model, prompt)
            found.setdefault(prompt, []).append((read(output), [r.action.value for r in reports]) == wanted)

    jobs = [
        ("weather?", (["weather?it rains"], ["allow"])),
        ("horror?", (["horror?"], ["block"])),
        ("a knife?", (["a knife?"], ["block"])),
    ]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {prompt: [True] * 3 for prompt, _ in jobs}


def test_calling_the_model_itself_is_not_guarded() -> None:
    assert guarded()(**asked(TOK, "a knife?")).logits.shape[:2] == (
        1,
        8,
    )  # documented: scores are no generation


def test_flagged_answer_is_asked_for_again_with_a_refined_prompt() -> None:
    refiner = SwapRefiner({"horror": "weather"})
    with safeguard.capture() as reports:
        output = generate(guarded(refiner=refiner, **acting("output", "refine")), "a story?", "horror?")
    assert read(output) == ["a story?a long and gentle tale", "horror?it rains"]
    assert refiner.requests[0].result == "so much blood"
    assert (reports[1].revised_prompt, reports[1].rounds) == ("weather?", 1)


def test_flagged_words_are_cut_out_of_the_prompt() -> None:
    script = Script(TOK, {})
    generate(guarded(**acting("input", "redact")), "<s>a knife and a fork?", script=script)
    assert script.prompts == ["a  and a fork?"]


def test_prompt_of_which_nothing_is_left_is_still_generated_from() -> None:
    model = guarded(**acting("input", "redact"))
    output = model.generate(**asked(TOK, "knife"), max_new_tokens=2, do_sample=False)
    assert read(output)[0].startswith("knife")


def test_monitor_changes_nothing_and_reports() -> None:
    with safeguard.capture() as reports:
        output = generate(guarded(mode="monitor"), "knife, horror?")
    assert read(output) == ["knife, horror?so much blood"]
    assert reports[0].flagged == ("bad",)
