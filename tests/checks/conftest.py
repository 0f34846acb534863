"""Small parts that checks are tested with: a word tokenizer and models whose answers can be worked out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from safeguard.checks.readout import Readout
from safeguard.manifest import ImagePreprocess
from safeguard.testing import FakeBackend

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "rude", "good", "day", "the", "a", "##a", "kitchen", "knife"]
RUDE = WORDS.index("rude")


@pytest.fixture
def tokenizer() -> Tokenizer:
    """WordPiece over a dozen words, lower case, dressed as [CLS] ... [SEP]."""
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    return made


def rude_logits(inputs: Any) -> dict[str, Any]:
    """Logits (text, 2): 4 for "toxic" where an unmasked token is "rude", else -4; "calm" is the opposite."""
    rude = ((inputs["input_ids"] == RUDE) & (inputs["attention_mask"] == 1)).any(axis=1)
    toxic = np.where(rude, 4.0, -4.0).astype(np.float32)
    return {"logits": np.stack([toxic, -toxic], axis=1)}


@pytest.fixture
def rude_backend() -> FakeBackend:
    return FakeBackend(rude_logits)


@pytest.fixture
def readout() -> Readout:
    return Readout(["toxic", "calm"], ignored=["calm"])


@pytest.fixture
def plain_image() -> ImagePreprocess:
    """Pixels in [0, 1], 16 x 16, NCHW."""
    return ImagePreprocess(size=16, resize=16, mode="squash", resample="bilinear")


def red_logits(inputs: Any) -> dict[str, Any]:
    """Logits (picture, 2): 8 * mean of red - 4 for "red", its opposite for "other"."""
    red = 8 * inputs["pixel_values"][:, 0].mean(axis=(1, 2)) - 4
    return {"logits": np.stack([red, -red], axis=1)}


@pytest.fixture
def red_backend() -> FakeBackend:
    return FakeBackend(red_logits)
