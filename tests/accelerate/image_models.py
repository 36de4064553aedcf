"""Small models of images, and of images and text, with random weights, and batches for them."""

from typing import Any

import torch
import transformers
from modern_models import SIZES, randomised

B, PATCH, SIDE = 5, 8, 24
TEXT = torch.tensor([11, 3, 7, 1, 9])
MASK = (torch.arange(11) < TEXT[:, None]).long()
# heights and widths of the images in a mixed batch
IMAGES = ((24, 24), (8, 16), (16, 8), (24, 8), (8, 8))
REGIONS = (torch.arange(4) < torch.tensor([4, 2, 1, 3, 1])[:, None]).long()
_LAYERS = {n: s for n, s in SIZES.items() if n not in ("vocab_size", "max_position_embeddings")}
_IMAGES = {"image_size": SIDE, "patch_size": PATCH}
_IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_TEXT = {"vocab_size": 97, "max_position_embeddings": 16}
# by the beginning of a model's class name: the configuration's class and its settings
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViTConfig", _LAYERS | _IMAGES | {"encoder_stride": PATCH}),
    "CLIPVision": ("CLIPVisionConfig", _LAYERS | _IMAGES),
    "CLIPText": ("CLIPTextConfig", _LAYERS | _TEXT | _IDS),
    "SiglipVision": ("SiglipVisionConfig", _LAYERS | _IMAGES),
    "SiglipText": ("SiglipTextConfig", _LAYERS | _TEXT | _IDS | {"projection_size": 48}),
    "Vilt": (
        "ViltConfig",
        _LAYERS | _IMAGES | _TEXT | {"num_images": 2, "modality_type_vocab_size": 3},
    ),
    "VisualBert": ("VisualBertConfig", _LAYERS | _TEXT | {"visual_embedding_dim": 12}),
}
for _pair in ("CLIP", "Siglip"):
    _towers = {f"{t.lower()}_config": CONFIGS[_pair + t][1] for t in ("Text", "Vision")}
    CONFIGS[_pair] = f"{_pair}Config", _towers


def build(name: str, **changes: Any) -> Any:
    """A model in eval mode whose every part changes the outputs and that drops nothing; `name` is its class's."""
    torch.manual_seed(0)
    family = max((f for f in CONFIGS if name.startswith(f)), key=len)
    if name == "CLIPForImageClassification":
        family = "CLIP"
    config, known = CONFIGS[family]
    labels = {"num_labels": 3}
    return randomised(
        getattr(transformers, name)(getattr(transformers, config)(**known | labels | changes))
    )


def batch(name: str) -> dict[str, torch.Tensor]:
    """A ragged batch, with the labels that a head of this class takes."""
    torch.manual_seed(1)
    pad = 0 if name.startswith("V") else 1
    ids = torch.randint(3, 97, MASK.shape).where(MASK.bool(), pad)
    text = {"input_ids": ids, "attention_mask": MASK}
    images = {"pixel_values": torch.randn(B, 3, SIDE, SIDE)}
    if name.startswith("VisualBert"):
        regions = {"visual_embeds": torch.randn(B, 4, 12), "visual_attention_mask": REGIONS}
        return _visual_labels(name, text | regions)
    if name.startswith("Vilt"):
        shown = torch.zeros(B, SIDE, SIDE, dtype=torch.long)
        for mask, (height, width) in zip(shown, IMAGES, strict=True):
            mask[:height, :width] = 1
        given = text | images | {"pixel_mask": shown}
        if name == "ViltForImagesAndTextClassification":
            both = {
                n: torch.stack([given[n], given[n].flip(0)], 1)
                for n in ("pixel_values", "pixel_mask")
            }
            return given | both | {"labels": torch.randint(0, 3, (B,))}
        if name == "ViltForQuestionAnswering":
            return given | {"labels": torch.rand(B, 3)}
        if name in ("ViltForMaskedLM", "ViltForTokenClassification"):
            return given | {"labels": torch.randint(0, 3, MASK.shape).where(MASK.bool(), -100)}
        return given
    if "Text" in name:
        return text
    if name in ("CLIPModel", "SiglipModel"):
        return text | images | {"return_loss": True}
    if name == "ViTForMaskedImageModeling":
        return images | {"bool_masked_pos": torch.rand(B, (SIDE // PATCH) ** 2) < 0.5}
    return images | ({"labels": torch.randint(0, 3, (B,))} if "Classification" in name else {})


def _visual_labels(name: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if name == "VisualBertForPreTraining":
        joined = torch.cat([MASK, REGIONS], 1).bool()
        labels = torch.randint(0, 3, joined.shape).where(joined, -100)
        return given | {"labels": labels, "sentence_image_labels": torch.randint(0, 2, (B,))}
    if name == "VisualBertForMultipleChoice":
        given = {n: torch.stack([t, t.flip(0)], 1) for n, t in given.items()}
        return given | {"labels": torch.randint(0, 2, (B,))}
    if name == "VisualBertForVisualReasoning":
        return given | {"labels": torch.randint(0, 3, (B,))}
    if name == "VisualBertForQuestionAnswering":
        return given | {"attention_mask": MASK.clamp(min=1), "labels": torch.rand(B, 3)}
    if name == "VisualBertForRegionToPhraseAlignment":
        places = torch.tensor([[1, 2], [0, 2], [3, 1], [0, 0], [4, 2]])
        labels = torch.rand(B, 2, 4) * REGIONS[:, None]
        labels = labels / labels.sum(-1, keepdim=True)
        return given | {"region_to_phrase_position": places, "labels": labels}
    return given
