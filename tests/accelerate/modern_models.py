"""Small models of transformers 5's newer encoder families with random weights, and ragged batches for them."""

from typing import Any

import torch
import transformers

from fastbert.integrations import layers

B, S, V = 5, 23, 97
LENGTHS = torch.tensor([23, 4, 11, 1, 17])
MASK = (torch.arange(S) < LENGTHS[:, None]).long()
SIZES = {
    "vocab_size": V,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 64,
}
# by family, the ids of special tokens that fit the small vocabulary, and the options that SIZES leaves out
CHANGES: dict[str, dict[str, Any]] = {
    "Esm": {
        "pad_token_id": 1,
        "mask_token_id": 5,
        "position_embedding_type": "rotary",
        "token_dropout": True,
    },
    "MPNet": {"pad_token_id": 1},
    "Albert": {"embedding_size": 16, "num_hidden_groups": 2},
    "ModernBert": {
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "pad_token_id": 0,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "NomicBert": {},
    "EuroBert": {
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "mask_token_id": 3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "Ernie": {"use_task_id": True},
    "Data2VecText": {"pad_token_id": 1},
    "Splinter": {"question_token_id": 4},
    "MarkupLM": {"pad_token_id": 0, "max_depth": 5},
    "RobertaPreLayerNorm": {"pad_token_id": 1},
    "MegatronBert": {},
    "LayoutLM": {},
    "CLIPText": {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    "XLMRobertaXL": {"pad_token_id": 1},
    "JinaEmbeddingsV3": {"pad_token_id": 1},
    "Deberta": {
        "relative_attention": True,
        "max_relative_positions": 9,
        "pos_att_type": "c2p|p2c",
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    # as DeBERTa-v3's; distances up to 4 have buckets of their own
    "DebertaV2": {
        "relative_attention": True,
        "pos_att_type": "p2c|c2p",
        "position_buckets": 8,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
}
FAMILIES = tuple(CHANGES)


def build(family: str, head: str = "Model", **changes: Any) -> Any:
    """A model in eval mode whose every part changes the outputs; it drops nothing in training mode either."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}Config")
    known = SIZES | CHANGES[family]
    known["num_labels"] = 2 if head == "ForQuestionAnswering" else 3
    return randomised(getattr(transformers, family + head)(kind(**known | changes)))


def randomised(model: Any) -> Any:
    """The model in eval mode with random weights of every part, and without dropout."""
    model.eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(0.2 * torch.randn_like(p))
            else:
                p.copy_(0.3 * torch.randn_like(p) + ("norm" in name.lower() and "weight" in name))
    return without_dropout(model)


def without_dropout(model: Any) -> Any:
    """The model with dropout rates of 0, of modules and of the numbers that some families keep."""
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(m, name, None), float):
                setattr(m, name, 0.0)
    return model


def batch(model: Any, head: str = "Model") -> dict[str, torch.Tensor]:
    """A ragged batch with the labels that the head takes."""
    torch.manual_seed(1)
    ids = torch.randint(6, V, (B, S)).where(MASK.bool(), model.config.pad_token_id or 0)
    given = {"input_ids": ids, "attention_mask": MASK}
    if type(model).__name__.startswith("LayoutLM"):
        corners = torch.randint(0, 200, (B, S, 4)).cumsum(2)
        given["bbox"] = corners * MASK[..., None]
    some = (torch.rand(B, S) < 0.4) & MASK.bool()
    if head in ("ForMaskedLM", "ForTokenClassification"):
        given["labels"] = torch.randint(0, 3, (B, S)).where(some, -100)
    if head == "ForSequenceClassification":
        given["labels"] = torch.randint(0, 3, (B,))
    if head == "ForQuestionAnswering":
        given |= {"start_positions": LENGTHS // 3, "end_positions": LENGTHS - 1}
    return given


def count_layers(monkeypatch: Any) -> list[int]:
    """The number of calls of our layer, counted from now on."""
    calls: list[int] = []
    run = layers.run
    monkeypatch.setattr(layers, "run", lambda *args: calls.append(1) or run(*args))
    return calls


def close(
    ours: torch.Tensor, stock: torch.Tensor, truth: torch.Tensor, name: str, floor: float = 0.0
) -> None:
    """ours is as near to the fp64 truth as transformers' own result is, or 1e-5 of the largest element."""
    largest = truth.abs().max().item()
    error, allowed = ((t.double() - truth).abs().max().item() for t in (ours, stock))
    assert error <= 3 * allowed + 1e-5 * largest + floor, (name, error, allowed, largest)
