"""The forwards that accelerate() gives to the heads of transformers' models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as tnf

from fastbert import functional as F
from fastbert.backend.torch_private import exporting
from fastbert.integrations import images, recognise
from fastbert.integrations.families import module_at
from fastbert.integrations.handing import handing
from fastbert.nn.packing import find_labelled
from fastbert.nn.watch import hooked, log_once, why_not_bypassed

Stock = Callable[..., Any]
_LABELLED_PADDING = (
    "accelerate: labels at padding are not -100 and count in transformers' loss: transformers' code runs, on padding "
    "too"
)


def token_labels(self: Any, stock: Stock, given: dict[str, Any]) -> Any:
    """A head with one label per token. Nothing is packed if padding is labelled: outputs there count in the loss."""
    tensors = values(given), given.get("labels"), given.get("attention_mask")
    known = all(isinstance(t, Tensor) for t in tensors) and not exporting()
    if known and _labelled(given)[1]:
        return _stock_for(self, None, stock, given)
    return stock(self, **given)


def joined_labels(self: Any, stock: Stock, given: dict[str, Any]) -> Any:
    """VisualBERT's masked LM, with a label for each token of text and image: as token_labels."""
    labels, text = given.get("labels"), values(given)
    known = all(isinstance(t, Tensor) for t in (labels, text, given.get("visual_embeds")))
    if known and not exporting():
        mask = images.joined_mask(given, text)
        if mask is not None and find_labelled(labels, mask, text)[1].shape[0]:
            log_once(_LABELLED_PADDING)
            return _stock_for(self, None, stock, given)
    return stock(self, **given)


def first_token(self: Any, stock: Stock, given: dict[str, Any]) -> Any:
    """A head that reads only the first column: the last layer computes only that, unless other code may see more."""
    family, base = self.fastbert_family, self.base_model_prefix
    for name, m in self.named_children():
        # a module that the user put there, or a hook, may read other columns too
        own = type(m).__module__ == family.module or type(m) in (nn.Linear, nn.Dropout)
        if name != base and (not own or hooked(m)):
            return stock(self, **given)
    pooling = getattr(self.config, "classifier_pooling", "cls")
    if pooling not in ("cls", "bos"):
        return stock(self, **given)
    return _stock_for(self, "first", stock, given)


def _stock_for(self: Any, tokens: Any, stock: Stock, given: dict[str, Any]) -> Any:
    """Run `stock`, the head's forward in transformers, and tell the encoder which tokens the head reads.

    `tokens` are "all", "first" of each sequence, or positions; None makes the encoder run transformers' code.
    """
    base = getattr(self, self.base_model_prefix, None)
    if not hasattr(type(base), "fastbert_family"):
        return stock(self, **given)
    if self.fastbert_family.passes:
        return stock(self, **given, fastbert=tokens)
    with handing(tokens):
        return stock(self, **given)


def values(given: dict[str, Any]) -> Any:
    """The batch that the caller passed: ids (B, S) or embeddings (B, S, C); None without either."""
    ids = given.get("input_ids")
    return given.get("inputs_embeds") if ids is None else ids


def _labelled(given: dict[str, Any]) -> tuple[Tensor, int, int]:
    """Positions in the flat (B * S) of labels other than -100, how many are at padding, 1 if labels is misshaped."""
    mask = given.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) else None
    rows, sizes = find_labelled(given["labels"], mask, values(given))
    outside, misshaped = sizes.shape[:2]
    if outside:
        log_once(_LABELLED_PADDING)
    return rows, outside, misshaped


# --- masked LM ---


def masked_lm(self: Any, stock: Stock, given: dict[str, Any]) -> Any:
    """In training with labels the decoder runs on labelled rows only, without logits; else as in transformers."""
    return _with_mlm_loss(self, stock, given, ())


def pretraining(self: Any, stock: Stock, given: dict[str, Any]) -> Any:
    """As masked_lm, plus the next-sentence loss. As in transformers, a loss needs both kinds of labels."""
    return _with_mlm_loss(self, stock, given, ("next_sentence_label",))


def _with_mlm_loss(self: Any, stock: Stock, given: dict[str, Any], others: tuple[str, ...]) -> Any:
    logits_wanted = given.pop("return_logits", False)
    targets = [given.get(name) for name in ("labels", *others)]
    if logits_wanted or not self.training or any(t is None for t in targets):
        return token_labels(self, stock, given)
    reason = _why_not_labelled_rows(self, given)
    if reason is None:
        rows, outside, misshaped = _labelled(given)
        reason = "labels is not (B, S)" if misshaped else None
    if reason is not None:
        log_once(f"accelerate: {type(self).__name__} computes all logits: {reason}")
        return token_labels(self, stock, given)
    if outside:
        return _stock_for(self, None, stock, given)
    as_dict = given.pop("return_dict", None)
    inputs = {k: v for k, v in given.items() if k not in ("labels", *others)}
    encoded = _stock_for(
        self, "all" if others else rows, _base_forward, inputs | {"return_dict": True}
    )
    # labels are read only after the encoder ran: torch.compile would make one more graph of work before it
    labels = given["labels"].reshape(-1).index_select(0, rows)
    rows, labels = (t.to(encoded[0].device) for t in (rows, labels))
    fields = {
        "loss": _mlm_loss(self, encoded[0].flatten(0, 1).index_select(0, rows), labels),
        "hidden_states": encoded.get("hidden_states"),
        "attentions": encoded.get("attentions"),
    }
    if others:
        scores = self.cls.seq_relationship(encoded[1])
        fields["loss"] = fields["loss"] + tnf.cross_entropy(
            scores.view(-1, 2), given["next_sentence_label"].view(-1)
        )
        fields["seq_relationship_logits"] = scores
    output = self.fastbert_output(**fields)
    as_dict = getattr(self.config, "return_dict", True) if as_dict is None else as_dict
    return output if as_dict else output.to_tuple()


def _base_forward(self: Any, **given: Any) -> Any:
    return getattr(self, self.base_model_prefix)(**given)


def _why_not_labelled_rows(self: Any, given: dict[str, Any]) -> str | None:
    """Why a masked-LM head must compute all logits; None if the labelled rows are enough."""
    if not all(isinstance(t, Tensor) for t in (values(given), given["labels"])):
        return "labels is not (B, S)"
    family = self.fastbert_family
    for name in (*family.transform, family.decoder):
        if name == "gelu":
            continue
        top, *inner = name.split(".")
        if not hasattr(self, top):
            return f"it has no {top}"
        holder = self
        for step in (top, *inner)[:-1]:
            holder = getattr(holder, step, None)
            if type(holder).__module__ != family.module:
                return f"its {step} is a {type(holder).__name__}"
        for m in getattr(self, top).modules():
            if hooked(m, *recognise.RECORDERS, recognise.SHARDING):
                return f"hooks are attached to its {top}"
        m = module_at(self, name)
        parts = m.children() if type(m).__module__ == family.module else (m,)
        if not all(recognise.tokenwise(part) or recognise.elementwise(part) for part in parts):
            return f"its {name} is not transformers' own"
    return why_not_bypassed()


def _mlm_loss(self: Any, x: Tensor, labels: Tensor) -> Tensor:
    """The mean loss over labelled rows x (R, C); without any, a 0 that is connected to the graph."""
    family = self.fastbert_family
    for name in family.transform:
        x = tnf.gelu(x) if name == "gelu" else module_at(self, name)(x)
    decoder = module_at(self, family.decoder)
    if (own := recognise.plain(decoder)) is not None:
        return F.mlm_loss(x, *own, labels, compacted=True)
    # an adapter or another module is called on the labelled rows
    total = F.cross_entropy(decoder(x), labels, reduction="sum")
    return total / max(labels.shape[0], 1)


# --- extractive question answering ---


def question_answering(self: Any, stock: Stock, given: dict[str, Any]) -> Any:
    """Set start and end scores at padding to the dtype's lowest value, so that no softmax or argmax picks padding."""
    mask, batch = given.get("attention_mask"), values(given)
    if (
        not isinstance(mask, Tensor)
        or mask.dim() != 2
        or not isinstance(batch, Tensor)
        or exporting()
        or getattr(getattr(self, self.base_model_prefix), "fastbert_at_padding", "") == "stock"
    ):
        return stock(self, **given)
    ends = {name: given.pop(name, None) for name in ("start_positions", "end_positions")}
    as_dict = given.pop("return_dict", None)
    output = stock(self, **given, return_dict=True)
    # compared after the encoder: torch.compile would make one more graph of a comparison before it
    if mask.shape != output.start_logits.shape:
        return stock(self, **given, **ends, return_dict=as_dict)
    log_once(
        "accelerate: answer scores at padding are set to the lowest value, and the loss runs over tokens only"
    )
    token = (mask != 0).to(output.start_logits.device)
    fields = dict(output)
    losses = []
    for name, position in zip(("start_logits", "end_logits"), ends.values(), strict=True):
        scores = fields[name]
        fields[name] = scores = scores.masked_fill(~token, torch.finfo(scores.dtype).min)
        losses.append(_position_loss(scores, token, position) if position is not None else None)
    if losses[0] is not None and losses[1] is not None:
        fields["loss"] = (losses[0] + losses[1]) / 2
    output = type(output)(**fields)
    as_dict = getattr(self.config, "return_dict", True) if as_dict is None else as_dict
    return output if as_dict else output.to_tuple()


def _position_loss(scores: Tensor, token: Tensor, position: Tensor) -> Tensor:
    """Cross-entropy of scores (B, S) over each sequence's tokens; other positions are ignored, as in transformers."""
    if position.dim() > 1:
        position = position.squeeze(-1)
    length = scores.shape[1]
    position = position.to(scores.device).clamp(0, length)
    inside = token.gather(1, position.clamp(max=length - 1)[:, None]).squeeze(1)
    position = torch.where(inside, position, length)
    return tnf.cross_entropy(scores, position, ignore_index=length)
