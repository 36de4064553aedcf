"""Our models and transformers' with the same random weights, batches for them, and the comparison."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fastbert import bert
from fastbert.bert import BertConfig

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 44,
    "max_position_embeddings": 24,
}
# our key -> Hugging Face's key inside one layer
LAYERS = {
    "bert": {
        "attention.q": "attention.self.query",
        "attention.k": "attention.self.key",
        "attention.v": "attention.self.value",
        "attention.out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "feed_forward.up": "intermediate.dense",
        "feed_forward.down": "output.dense",
        "output_norm": "output.LayerNorm",
    },
    "distilbert": {
        "attention.q": "attention.q_lin",
        "attention.k": "attention.k_lin",
        "attention.v": "attention.v_lin",
        "attention.out": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "feed_forward.up": "ffn.lin1",
        "feed_forward.down": "ffn.lin2",
        "output_norm": "output_layer_norm",
    },
}
HEADS = {
    "bert": {
        "bert.pooler": "bert.pooler.dense",
        "mlm_head.dense": "cls.predictions.transform.dense",
        "mlm_head.norm": "cls.predictions.transform.LayerNorm",
        "mlm_head.bias": "cls.predictions.bias",
        "mlm_head.decoder": "cls.predictions.decoder",
        "nsp_head": "cls.seq_relationship",
    },
    "roberta": {
        "bert.pooler": "roberta.pooler.dense",
        "mlm_head.dense": "lm_head.dense",
        "mlm_head.norm": "lm_head.layer_norm",
        "mlm_head.bias": "lm_head.bias",
        "pre_classifier": "classifier.dense",
    },
    "distilbert": {
        "mlm_head.dense": "vocab_transform",
        "mlm_head.norm": "vocab_layer_norm",
        "mlm_head.bias": "vocab_projector.bias",
    },
}
CASES = [
    (family, name)
    for family in ("bert", "roberta", "distilbert")
    for name in (
        "Model",
        "ForPreTraining",
        "ForMaskedLM",
        "ForNextSentencePrediction",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
    )
    if hasattr(
        transformers, {"bert": "Bert", "roberta": "Roberta"}.get(family, "DistilBert") + name
    )
]


def hf_key(family: str, name: str, key: str) -> list[str]:
    """The Hugging Face keys that hold our parameter `key` (three for a fused projection)."""
    if name == "Model":
        key = "bert." + key
    key, kind = key.rsplit(".", 1)
    inner = "transformer.layer" if family == "distilbert" else "encoder.layer"
    if key.startswith("bert.layers."):
        _, _, i, part = key.split(".", 3)
        table = LAYERS["distilbert" if family == "distilbert" else "bert"]
        parts = [f"attention.{c}" for c in "qkv"] if part == "attention.qkv" else [part]
        keys = [f"{family}.{inner}.{i}.{table[part]}.{kind}" for part in parts]
    elif key.startswith("bert.embeddings."):
        leaf = key.removeprefix("bert.embeddings.")
        leaf = "LayerNorm" if leaf == "norm" else f"{leaf}_embeddings"
        keys = [f"{family}.embeddings.{leaf}.{kind}"]
    elif f"{key}.{kind}" in HEADS[family]:
        keys = [HEADS[family][f"{key}.{kind}"]]
    else:
        theirs = HEADS[family].get(key, key)
        if name == "ForQuestionAnswering":
            theirs = "qa_outputs"
        if (family, key, name) == ("roberta", "classifier", "ForSequenceClassification"):
            theirs = "classifier.out_proj"
        if name == "ForNextSentencePrediction" and key == "nsp_head":
            theirs = "cls.seq_relationship"
        keys = [f"{theirs}.{kind}"]
    if name == "Model":
        keys = [k.removeprefix(f"{family}.") for k in keys]
    return keys


def build(family: str, name: str, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """The two models with the same random weights, biases and norms included."""
    values = {**SIZES, "num_labels": 3, **settings, "model_type": family}
    if name in ("ForQuestionAnswering", "ForPreTraining"):
        values["num_labels"] = 2
    ours = getattr(bert, f"Bert{name}")(BertConfig(**values))
    kind = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**ours.config.to_dict())
    config._attn_implementation = "eager"
    theirs = getattr(transformers, f"{kind}{name}")(config)
    state = dict(theirs.named_parameters())
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn(p.shape), alpha=0.1)
        for key, p in ours.named_parameters():
            sources = hf_key(family, name, key)
            if sources == ["cls.predictions.bias"] and not ours.config.tie_word_embeddings:
                # where the weight is not tied, transformers' decoder has a bias of its own
                state["cls.predictions.bias"] = state["cls.predictions.decoder.bias"]
            p.copy_(torch.cat([state[k] for k in sources]))
    return ours, theirs


def batch(family: str, name: str, padding: str = "right") -> dict[str, Tensor]:
    """Three sentences of up to 11 tokens, with targets for the class; with right padding 11, 7 and 1 tokens."""
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    mask = torch.ones(3, 11, dtype=torch.int64)
    if padding == "right":
        mask[1, 7:] = mask[2, 1:] = 0
    elif padding == "left":
        mask[1, :4] = mask[2, :10] = 0
    elif padding == "holes":
        mask[1, 2:5] = mask[2, 1::3] = 0
    pad = 1 if family == "roberta" else 0
    values = {"input_ids": draw(2, 61, 3, 11).where(mask == 1, pad), "attention_mask": mask}
    if family == "bert":
        values["token_type_ids"] = draw(0, 2, 3, 11)
    if name in ("ForMaskedLM", "ForPreTraining", "ForTokenClassification"):
        high = 3 if name == "ForTokenClassification" else 61
        chosen = (torch.rand(3, 11, generator=generator) < 0.6) & (mask == 1)
        values["labels"] = draw(0, high, 3, 11).where(chosen, -100)
    if name == "ForPreTraining":
        values["next_sentence_label"] = draw(0, 2, 3)
    if name == "ForNextSentencePrediction":
        values["labels"] = draw(0, 2, 3)
    if name == "ForSequenceClassification":
        values["labels"] = draw(0, 3, 3)
    if name == "ForQuestionAnswering":
        values |= {
            "start_positions": torch.tensor([2, 0, 50]),
            "end_positions": torch.tensor([3, 1, 0]),
        }
    return values


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Assert that the error is at most 1e-5 of the tensor's largest value."""
    ours, theirs = ours.detach(), theirs.detach()
    scale = float(theirs.abs().max())
    error = float((ours - theirs).abs().max())
    assert error <= 1e-5 * scale, (
        f"{what}: error {error:.2e} where the largest value is {scale:.2e}"
    )


def per_token(x: Any, mask: Tensor) -> bool:
    return isinstance(x, Tensor) and x.shape[:2] == mask.shape


def compare(ours: Any, theirs: Any, mask: Tensor, tokens_only: bool) -> None:
    """Compare every field of theirs at tokens; ours must be zero at padding."""
    skipped = {"past_key_values", "cross_attentions"}
    for name, value in theirs.items():
        whole = not per_token(value, mask) and not isinstance(value, tuple)
        if name in skipped or (tokens_only and whole):
            continue
        mine = ours[name]
        values = zip(mine, value, strict=True) if isinstance(value, tuple) else [(mine, value)]
        for i, (a, b) in enumerate(values):
            assert a.shape == b.shape, name
            if name == "attentions":
                a, b = a.transpose(1, 2), b.transpose(1, 2)
            if not whole:
                assert a[mask == 0].eq(0).all(), f"{name} is not zero at padding"
                a, b = a[mask == 1], b[mask == 1]
            close(a, b, f"{name}[{i}]")


def compare_gradients(family: str, name: str, ours: nn.Module, theirs: nn.Module) -> None:
    """Compare every gradient; q, k and v as one tensor, since that of the key bias is rounding error only."""
    state = dict(theirs.named_parameters())
    if "cls.predictions.decoder.bias" in state:
        state["cls.predictions.bias"] = state["cls.predictions.decoder.bias"]
    # a shift of all positions' scores does not change a softmax over positions: these gradients are rounding error
    shifts = {"classifier.bias", "bert.layers.1.output_norm.bias"}
    for key, p in ours.named_parameters():
        sources = [state[k] for k in hf_key(family, name, key)]
        if all(t.grad is None for t in sources):
            assert p.grad is None or p.grad.eq(0).all(), f"{key} has a gradient"
            continue
        if not p.requires_grad:  # the sinusoidal table: fixed here, trained in transformers
            continue
        assert p.grad is not None, f"{key} has no gradient"
        expected = torch.cat([torch.zeros_like(t) if t.grad is None else t.grad for t in sources])
        if name == "ForQuestionAnswering" and key in shifts:
            assert p.grad.abs().max() < 1e-6
            assert expected.abs().max() < 1e-6
        else:
            close(p.grad, expected, f"gradient of {key}")


def scalar_loss(out: Any, mask: Tensor) -> Tensor:
    """The loss, or for a bare model the sum of squares over its outputs at tokens."""
    if "loss" in out:
        return out["loss"]
    total = (out["last_hidden_state"] * mask[..., None]).square().sum()
    return total + (out["pooler_output"].sum() if "pooler_output" in out else 0.0)
