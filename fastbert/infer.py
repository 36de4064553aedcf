"""A trained model on plain text and images: the words behind [MASK], vectors, and texts that go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as tnf

from fastbert.data import Batch, load_tokenizer
from fastbert.data.images import image_batch, read_image
from fastbert.data.tokenizer import SpecialIds, is_roberta
from fastbert.files import quoted
from fastbert.integrations.sentence_transformers import SentenceModel, lower_first, pool
from fastbert.models.checkpoint import check_whole
from fastbert.models.decoder import GPTForCausalLM
from fastbert.models.encoder import BertModel
from fastbert.models.heads import BertForMaskedLM
from fastbert.models.images import patch_sizes
from fastbert.models.two_towers import TwoTowers
from fastbert.runners.freeze import freeze, quantize_loaded
from fastbert.runners.generate import generate


def packed(encodings: Sequence[Any]) -> dict[str, Any]:
    """Tokenised texts, laid end to end, as the keyword arguments of a model."""
    lengths = torch.tensor([len(e.ids) for e in encodings])
    return {
        "input_ids": torch.tensor([i for e in encodings for i in e.ids]),  # (T,)
        "token_type_ids": torch.tensor([i for e in encodings for i in e.type_ids]),  # (T,)
        "cu_seqlens": tnf.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),  # (B + 1,)
        "max_seqlen": int(lengths.max()),
    }


def _cut_to(most: int, tokenizer: Any, texts: Sequence[str]) -> tuple[list[Any], int]:
    """Texts, tokenised, of at most so many tokens, and how many of them were longer."""
    tokenizer.no_truncation()
    encodings = tokenizer.encode_batch(texts)
    cut = sum(len(e.ids) > most for e in encodings)
    if cut:
        # the tokenizer cuts the texts itself, so that the special token at the end is kept
        tokenizer.enable_truncation(most)
        encodings = tokenizer.encode_batch(texts)
    return encodings, cut


class Filler:
    """Fills masks with the model in a folder; `int8` quantises its encoder (fastbert.quantize)."""

    def __init__(self, model: str | Path, int8: bool = False) -> None:
        self.model = BertForMaskedLM.from_pretrained(model).eval()
        if int8:
            quantize_loaded(self.model)
        check_whole(self.model, model)
        self.tokenizer: Any = load_tokenizer(model)
        self.mask = SpecialIds.of(self.tokenizer).mask

    @torch.no_grad()
    def __call__(self, text: str, top: int = 5) -> list[list[tuple[str, float]]]:
        """The `top` most probable words with their probabilities, for each mask of a text in order.

        Raises ValueError for a text without [MASK], or one that is longer than the model's positions.
        """
        if top < 1:
            raise ValueError(f"top is {top}: it must be at least 1")
        token = self.tokenizer.id_to_token(self.mask)
        encoding = self.tokenizer.encode(text.replace("[MASK]", token))
        rows = [i for i, token_id in enumerate(encoding.ids) if token_id == self.mask]
        if not rows:
            raise ValueError(
                f"there is no [MASK] in {quoted(text)}: write one where a word is to be guessed"
            )
        logits: Tensor = self.model(**packed([encoding])).logits[rows]  # (masks, V)
        known = min(self.tokenizer.get_vocab_size(), logits.shape[1])
        found = logits.float().softmax(-1)[:, :known].topk(min(top, known))
        return [
            [(self._word(i), p) for i, p in zip(ids, probabilities, strict=True)]
            for ids, probabilities in zip(
                found.indices.tolist(), found.values.tolist(), strict=True
            )
        ]

    def _word(self, token_id: int) -> str:
        # byte-level tokens write bytes as other characters; WordPiece's ## marks a piece that continues a word
        if is_roberta(self.tokenizer):
            return str(self.tokenizer.decode([token_id], skip_special_tokens=False)).strip()
        return str(self.tokenizer.id_to_token(token_id))


class Writer:
    """Goes on with texts, by the GPT in a folder; `int8` quantises its layers (fastbert.quantize).

    A text is read without special tokens and ends at the `eos_token_id` of config.json, if it has one.
    """

    def __init__(self, model: str | Path, int8: bool = False) -> None:
        self.model = GPTForCausalLM.from_pretrained(model)
        int8 = int8 or self.model.config.int8_bits is not None
        (quantize_loaded if int8 else freeze)(self.model)
        check_whole(self.model, model)
        self.tokenizer: Any = load_tokenizer(model, special=False)
        self.eos = self.model.config.extra.get("eos_token_id")

    def __call__(
        self, prompts: Sequence[str], max_new_tokens: int = 32, **settings: Any
    ) -> list[str]:
        """Every prompt with its continuation, as fastbert.generate makes it with these `settings`.

        Raises ValueError for a prompt that has no token, and as generate does.
        """
        encodings = self.tokenizer.encode_batch(list(prompts), add_special_tokens=False)
        for prompt, encoding in zip(prompts, encodings, strict=True):
            if not encoding.ids:
                raise ValueError(f"{quoted(prompt)} has no token: write a word")
        ids = [e.ids for e in encodings]
        found = generate(self.model, ids, max_new_tokens, eos=self.eos, **settings)
        texts = [[*first, *new.tolist()] for first, new in zip(ids, found, strict=True)]
        decoded: list[str] = self.tokenizer.decode_batch(texts, skip_special_tokens=True)
        return decoded


class Embedder:
    """Makes vectors with the model in a folder; `cut` counts the texts that were too long for it.

    A folder of sentence-transformers gives the vectors that sentence-transformers gives, with its pooling, length
    limit, layers and prompts; another gives the mean of a text's tokens. `pooling`, mean or cls, replaces the folder's
    own. `prompt` names the prompt that is put before every text: None is the folder's default, if any, and "" is none.
    `int8` quantises the encoder (fastbert.quantize).
    """

    def __init__(
        self,
        model: str | Path,
        pooling: str | None = None,
        normalize: bool = False,
        prompt: str | None = None,
        int8: bool = False,
    ) -> None:
        if pooling not in ("mean", "cls", None):
            raise ValueError(f"pooling is {quoted(pooling)}: choose mean or cls")
        self.about = SentenceModel.read(model)
        self.prompt = self.about.prompt(prompt)
        # the pooled output is not used, and many checkpoints have none
        self.model = BertModel.from_pretrained(self.about.encoder, add_pooler=False).eval()
        if int8:
            quantize_loaded(self.model)
        self.tokenizer: Any = self._own_tokenizer()
        if self.about.lower_case:
            lower_first(self.tokenizer)
        self.max_length: int = self.model.config.max_length
        if self.about.max_length is not None:
            self.max_length = min(self.max_length, self.about.max_length)
        self.pooling = self.about.pooling if pooling is None else (pooling,)
        self.normalize = normalize
        self.skipped = 0 if self.about.include_prompt else self._prompt_tokens()
        self._check_width()
        self.cut = 0

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """(N, C) fp32, a row per text in order."""
        _check_size(batch_size)
        texts = [self.prompt + text for text in texts]
        encodings, self.cut = _cut_to(self.max_length, self.tokenizer, texts)
        order = sorted(range(len(encodings)), key=lambda i: len(encodings[i].ids))
        rows = torch.tensor(order, dtype=torch.int64)
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        found = [self._vectors([encodings[i] for i in batch]) for batch in batches]
        if not found:
            return self._vectors(self.tokenizer.encode_batch(["x"]))[:0]
        vectors = torch.empty(len(order), found[0].shape[1])
        vectors[rows] = torch.cat(found)
        return tnf.normalize(vectors) if self.normalize else vectors

    def _vectors(self, encodings: Sequence[Any]) -> Tensor:
        batch = packed(encodings)
        hidden = (
            self.model(**Batch(batch).to(self.model.device)).last_hidden_state.float().cpu()
        )  # (T, C)
        lengths = batch["cu_seqlens"].long().diff()
        vectors: Tensor = self.about.layers(pool(hidden, lengths, self.pooling, self.skipped))
        return vectors

    def _own_tokenizer(self) -> Any:
        try:
            return load_tokenizer(self.about.encoder)
        except ValueError as error:
            if not self.model.config.causal:
                raise
            raise ValueError(
                f"{self.about.encoder} holds a GPT and {error}: take an encoder for vectors, or a GPT of fastbert "
                "pretrain"
            ) from None

    def _prompt_tokens(self) -> int:
        """The tokens of the prompt with the first special one, which are left out of the pooling."""
        if not self.prompt:
            return 0
        encoding = self.tokenizer.encode(self.prompt)
        count = len(encoding.ids) - (encoding.special_tokens_mask[-1] if encoding.ids else 0)
        if count >= self.max_length - 1:
            raise ValueError(
                f"the prompt has {count} tokens and the model takes {self.max_length}: shorten it"
            )
        return count

    def _check_width(self) -> None:
        """Refuse layers that do not fit the encoder and the pooling."""
        width = self.model.config.hidden_size * len(self.pooling)
        if self.about.width not in (None, width):
            raise ValueError(
                f"pooling by {', '.join(self.pooling)} gives {width} numbers and the folder's files say "
                f"{self.about.width}: choose another pooling, or correct the pooling's config.json"
            )


class ImageTextEmbedder:
    """Makes vectors of images and of texts, in one space and of length 1, with the two towers in a folder.

    `cut` counts the texts that were too long for the model.
    """

    def __init__(self, model: str | Path) -> None:
        self.model = TwoTowers.from_pretrained(model)
        self.patch_size, self.sides = patch_sizes(self.model.config.image)
        self.tokenizer: Any = load_tokenizer(model)
        self.max_length: int = self.model.config.text.max_length
        self.cut = 0

    @torch.no_grad()
    def texts(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """(N, D) fp32, a row per text in order."""
        _check_size(batch_size)
        encodings, self.cut = _cut_to(self.max_length, self.tokenizer, texts)
        found = []
        for i in range(0, len(encodings), batch_size):
            batch = Batch(packed(encodings[i : i + batch_size]))
            del batch["token_type_ids"]
            found.append(self.model.embed_texts(**batch.to(self.model.device)).cpu())
        return torch.cat([torch.empty(0, self.model.config.projection_dim), *found])

    @torch.no_grad()
    def images(self, files: Sequence[str | Path], batch_size: int = 32) -> Tensor:
        """(N, D) fp32, a row per image in order.

        Raises FileNotFoundError, or ValueError naming the file, for an image that can't be read or is too large.
        """
        _check_size(batch_size)
        found = []
        for i in range(0, len(files), batch_size):
            some = files[i : i + batch_size]
            pixels = [read_image(file, self.patch_size, self.sides) for file in some]
            batch = Batch(image_batch(pixels, self.patch_size))
            found.append(self.model.embed_images(**batch.to(self.model.device)).cpu())
        return torch.cat([torch.empty(0, self.model.config.projection_dim), *found])


def _check_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
