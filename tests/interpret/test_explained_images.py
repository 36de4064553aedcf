"""Scores of patches: they add up to the similarity, are zero where the image is white, and find what the text names."""

import numpy as np
import pytest
import tiny_images
import torch
from PIL import Image

from fastbert.bert import BertConfig
from fastbert.data.images import image_batch
from fastbert.interpret import explain_image, write_patches_png
from fastbert.models.images import with_patches
from fastbert.models.two_towers import ImageTextConfig, TwoTowers


def towers():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "type_vocab_size": 0, "initializer_range": 0.2}
    text = BertConfig(vocab_size=20, **sizes)
    image = BertConfig(vocab_size=1, max_position_embeddings=1, pre_norm=True, **sizes)
    return TwoTowers(ImageTextConfig(text, with_patches(image, 4, 8), 16)).train()


@pytest.mark.parametrize("most", [16384, 20])
def test_scores_add_up_and_white_patches_have_none(most, monkeypatch):
    monkeypatch.setattr("fastbert.interpret.images._MOST_PATCHES", most)
    model, pixels = towers(), tiny_images.drawn("red", "square", 12)
    vector = torch.nn.functional.normalize(torch.randn(16), dim=0)
    found = explain_image(model, pixels, vector, "a red square", steps=64)
    assert found.scores.shape == (3, 3)
    assert found.error < 0.02
    white = (pixels.reshape(3, 4, 3, 4, 3).min((1, 3, 4)) == 255).tolist()
    assert (found.scores == 0).tolist() == white
    batch = image_batch([pixels], 4)
    cosine = float((model.eval().embed_images(**batch)[0] @ vector).detach())
    assert found.value == pytest.approx(cosine, abs=1e-5)
    assert not [name for name, p in model.named_parameters() if p.grad is not None]


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps is 0: it must be at least 1"):
        explain_image(towers(), np.zeros((4, 4, 3), np.uint8), torch.eye(16)[0], steps=0)


def test_the_picture(tmp_path):
    model, pixels = towers(), tiny_images.drawn("blue", "cross", 14)
    found = explain_image(model, pixels, torch.eye(16)[0], "a blue $cross$", steps=4)
    write_patches_png(found, tmp_path / "a.png")
    shown = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert shown.shape[1] > shown.shape[0] > 300
    # the image itself is in its left half
    assert (np.abs(shown[:, : shown.shape[1] // 2] - np.array([30, 30, 220])).max(2) < 8).any()
