from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safeguard.checks.clip_heads import (
    ClipHeads,
    Concepts,
    Head,
    Perceptron,
    PromptPair,
    read_arrays,
    read_heads,
    write_heads,
)
from safeguard.errors import PackError
from safeguard.manifest import ImagePreprocess
from safeguard.testing import FakeBackend

WEIGHTS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "weights"
SIZE = ImagePreprocess(size=32, resize=32)
PICTURES = [np.random.default_rng(i).integers(0, 256, (40, 48, 3), np.uint8) for i in range(5)]


def weights(name: str) -> Path:
    path = WEIGHTS / name
    if not path.is_file():
        pytest.skip(f"no published head weights at {path.parent}")
    return path


def heads_check(embeddings: Any, *heads: Head) -> ClipHeads:
    """A check whose tower gives these embeddings, whatever the pictures are."""
    return ClipHeads(FakeBackend(lambda _: {"image_embeds": np.asarray(embeddings)}), heads, SIZE)


def test_a_prompt_pair_is_the_sigmoid_of_a_hundred_times_the_difference_of_cosines() -> None:
    # v = (3, 4) / 5; harmless (2, 0) -> (1, 0): cosine 0.6; harmful (0, 7) -> (0, 1): cosine 0.8
    check = heads_check([[3.0, 4.0]], PromptPair("q16", np.array([[2.0, 0.0], [0.0, 7.0]]), scale=10.0))

    assert check.raw(PICTURES[:1])[0]["q16"] == pytest.approx(10 * (0.8 - 0.6))
    assert check(PICTURES[:1])[0].scores["q16"] == pytest.approx(1 / (1 + math.exp(-2)))


def test_concepts_give_the_largest_margin_over_their_thresholds() -> None:
    head = Concepts(
        "sexual",
        np.array([[1.0, 0.0], [0.0, 2.0]]),
        np.array([0.5, 0.9]),
        np.array([[-1.0, 0.0]]),
        np.array([0.1]),
    )

    # v = (0.6, 0.8): margins 0.6 - 0.5 = 0.1 and 0.8 - 0.9 = -0.1; special cosine -0.6 is below 0.1
    check = heads_check([[3.0, 4.0]], head)

    assert check.raw(PICTURES[:1])[0]["sexual"] == pytest.approx(0.1)
    assert check(PICTURES[:1])[0].scores["sexual"] == pytest.approx(1 / (1 + math.exp(-10)))


def test_a_special_concept_adds_a_hundredth() -> None:
    head = Concepts(
        "sexual", np.array([[1.0, 0.0]]), np.array([0.605]), np.array([[0.0, 1.0]]), np.array([0.7])
    )

    # cosine 0.6 - 0.605 = -0.005 alone; the special one is 0.8 - 0.7 > 0, so 0.01 is added
    assert heads_check([[3.0, 4.0]], head).raw(PICTURES[:1])[0]["sexual"] == pytest.approx(0.005)


def test_a_perceptron_works_on_the_embedding_as_it_is() -> None:
    # hidden = relu((3 - 1, -4)) = (2, 0); logit = 2 * 0.5 + 0 * 9 - 0.25 = 0.75
    head = Perceptron(
        "nsfw", np.array([[1.0, 0.0], [0.0, -1.0]]), np.array([-1.0, 0.0]), np.array([0.5, 9.0]), -0.25
    )
    check = heads_check([[3.0, 4.0]], head)

    assert check.raw(PICTURES[:1])[0]["nsfw"] == pytest.approx(0.75)
    assert check(PICTURES[:1])[0].scores["nsfw"] == pytest.approx(1 / (1 + math.exp(-0.75)))


def test_batch_norm_is_folded_into_the_second_layer() -> None:
    state = {
        "0.weight": np.array([[2.0]]),
        "0.bias": np.array([1.0]),
        "3.weight": np.array([3.0]),
        "3.bias": np.array([0.5]),
        "3.running_mean": np.array([4.0]),
        "3.running_var": np.array([4.0 - 1e-5]),  # with epsilon 1e-5 the deviation is exactly 2
        "4.weight": np.array([[10.0]]),
        "4.bias": np.array([-1.0]),
    }

    # relu(2 * 1.5 + 1) = 4; norm: 3 * (4 - 4) / 2 + 0.5 = 0.5; out: 10 * 0.5 - 1 = 4
    assert Perceptron.from_state("x", state).raw(np.array([[1.5]]))[0] == pytest.approx(4.0)


def test_a_half_precision_tower_keeps_the_arithmetic_of_the_heads_wide() -> None:
    embedding = np.random.default_rng(0).normal(0, 30, (1, 768)).astype(np.float16)
    prompts = np.random.default_rng(1).normal(0, 1, (2, 768))
    wide = embedding.astype(np.float64)[0]
    wide /= math.sqrt(sum(x * x for x in wide))
    e0, e1 = (row / math.sqrt(sum(x * x for x in row)) for row in prompts)

    raw = heads_check(embedding, PromptPair("q16", prompts)).raw(PICTURES[:1])[0]["q16"]

    assert raw == pytest.approx(100 * (wide @ e1 - wide @ e0), abs=1e-9)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_an_embedding_without_direction_or_not_finite_gives_nan(value: float) -> None:
    check = heads_check([[value, value]], PromptPair("q16", np.eye(2)))

    assert np.isnan(check(PICTURES[:1])[0].scores["q16"])


def test_a_tower_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"embeddings of shape \(1, 3\), the heads need \(1, 2\)"):
        heads_check([[1.0, 2.0, 3.0]], PromptPair("q16", np.eye(2)))(PICTURES[:1])


def test_heads_of_different_widths_or_the_same_category_are_refused() -> None:
    with pytest.raises(ValueError, match=r"heads of one tower have one dimension, got \[2, 3\]"):
        heads_check([[0.0]], PromptPair("a", np.eye(2)), PromptPair("b", np.ones((2, 3))))
    with pytest.raises(ValueError, match="each head needs a category of its own"):
        heads_check([[0.0]], PromptPair("a", np.eye(2)), PromptPair("a", np.eye(2)))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_heads_survive_writing_and_reading(tmp_path: Path, suffix: str) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed (extra torch)")
    generator = np.random.default_rng(0)
    heads: list[Any] = [
        Concepts(
            "c",
            generator.normal(size=(17, 8)),
            np.full(17, 0.2),
            generator.normal(size=(3, 8)),
            np.full(3, 0.2),
        ),
        Perceptron("p", generator.normal(size=(4, 8)), np.ones(4), np.ones(4), 0.5),
        PromptPair("q", generator.normal(size=(2, 8)), scale=50.0),
    ]
    embeddings = generator.normal(size=(6, 8))
    write_heads(tmp_path / f"heads{suffix}", heads)

    read = read_heads(tmp_path / f"heads{suffix}")

    assert [head.category for head in read] == ["c", "p", "q"]
    for before, after in zip(heads, read, strict=True):
        np.testing.assert_array_equal(after.raw(embeddings), before.raw(embeddings))


def test_a_file_of_pickled_objects_is_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "heads.npz", a=np.array([{"x": 1}], dtype=object))

    with pytest.raises(PackError, match=r"heads.npz holds no plain arrays"):
        read_heads(tmp_path / "heads.npz")


def test_a_file_with_other_keys_or_half_a_head_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", prompts=np.eye(2))
    np.savez(tmp_path / "b.npz", allow_pickle=False, **{"x:concepts:concepts": np.eye(2)})

    with pytest.raises(PackError, match="'prompts' must be category:kind:field"):
        read_heads(tmp_path / "a.npz")
    with pytest.raises(PackError, match="holds no complete head"):
        read_heads(tmp_path / "b.npz")


@pytest.fixture(scope="module")
def tower() -> Any:
    """A tiny random CLIP vision tower of the real class, its embedding 768 wide as that of ViT-L/14."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra torch)")
    from safeguard.backends.torch import ModuleBackend

    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=768,
    )
    module = transformers.CLIPVisionModelWithProjection(config).eval()
    return ModuleBackend(module, inputs=("pixel_values",), outputs=("image_embeds",))


def test_published_heads_on_a_random_tower_equal_the_formulas_of_their_papers(tower: Any) -> None:
    q16 = read_arrays(weights("q16__prompts_ViT-L-14.npz"))["prompts"]
    violence = read_arrays(weights("laion__violence_detection_vit_l_14.npy"))["array"]
    state = read_arrays(weights("ethical_lens__nude.npz"))
    heads: list[Head] = [
        PromptPair("q16", q16),
        PromptPair("violence", violence),
        Perceptron.from_state("nude", state),
    ]
    from safeguard.images import preprocess

    v = tower({"pixel_values": preprocess(PICTURES, SIZE)})["image_embeds"].astype(np.float64)
    found = ClipHeads(tower, heads, SIZE, batch_size=2)(PICTURES)

    for name, prompts in (("q16", q16.astype(np.float64)), ("violence", violence.astype(np.float64))):
        cosines = (v @ prompts.T) / np.linalg.norm(v, axis=1)[:, None] / np.linalg.norm(prompts, axis=1)
        shares = np.exp(100 * cosines)  # softmax over both prompts, as Q16's code has it
        expected = shares[:, 1] / shares.sum(axis=1)
        np.testing.assert_allclose([f.scores[name] for f in found], expected, atol=1e-5)
    hidden = np.maximum(v @ state["0.weight"].T + state["0.bias"], 0)
    normed = (hidden - state["3.running_mean"]) / np.sqrt(state["3.running_var"] + 1e-5)
    normed = normed * state["3.weight"] + state["3.bias"]
    logit = (normed @ state["4.weight"].T + state["4.bias"])[:, 0]
    np.testing.assert_allclose([f.scores["nude"] for f in found], 1 / (1 + np.exp(-logit)), atol=1e-5)


def test_concepts_agree_with_the_safety_checker_of_diffusers() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
    pytest.importorskip("diffusers", reason="diffusers is not installed (extra diffusers)")
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config=vision | {"image_size": 32, "patch_size": 16},
        text_config=vision | {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1},
        projection_dim=8,
    )
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(config).eval()
    pixels = torch.randn(24, 3, 32, 32)
    with torch.no_grad():
        for parameter in checker.vision_model.parameters():
            parameter.normal_(0, 0.5)  # as initialised, all embeddings point the same way
        checker.concept_embeds.normal_()
        checker.special_care_embeds.normal_()
        embeddings = checker.visual_projection(checker.vision_model(pixels)[1])
        unit = torch.nn.functional.normalize(embeddings)
        for name, share in (("concept_embeds", 0.95), ("special_care_embeds", 0.8)):  # some above, most below
            cosines = unit @ torch.nn.functional.normalize(getattr(checker, name)).T
            getattr(checker, f"{name}_weights").copy_(cosines.quantile(share, dim=0))
        _, unsafe = checker(pixels, [np.zeros((2, 2, 3)) for _ in pixels])
    head = Concepts(
        "sexual",
        *(
            getattr(checker, name).double().numpy()
            for name in (
                "concept_embeds",
                "concept_embeds_weights",
                "special_care_embeds",
                "special_care_embeds_weights",
            )
        ),
    )

    raw = head.raw(embeddings.double().numpy())

    assert 0 < sum(unsafe) < len(unsafe)
    clear = np.abs(raw) > 5e-4  # the original rounds to three digits
    assert clear.sum() > len(raw) / 2
    np.testing.assert_array_equal((raw > 0)[clear], np.array(unsafe)[clear])


def test_a_tensor_reaches_a_tower_of_its_device_as_a_tensor(plain_image: ImagePreprocess) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
    kinds: list[type] = []

    def mean_colour(inputs: Any) -> dict[str, Any]:
        kinds.append(type(inputs["pixel_values"]))
        return {"image_embeds": np.asarray(inputs["pixel_values"]).mean(axis=(2, 3)) + 0.01}

    head = PromptPair("red", np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), scale=4.0)
    red = torch.zeros(3, 20, 30)
    red[0] = 1.0
    kept, host = (
        ClipHeads(FakeBackend(mean_colour, tensor_device=where), [head], plain_image)([red])[0]
        for where in ("cpu", None)
    )

    assert kinds == [torch.Tensor, np.ndarray]
    assert kept.scores["red"] == pytest.approx(host.scores["red"], abs=1e-6)
