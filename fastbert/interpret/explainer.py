"""A model folder and plain text as a question that the methods explain."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert.data.tokenizer import SpecialIds
from fastbert.files import quoted
from fastbert.finetune.config import trained_model
from fastbert.finetune.predict import Predictor
from fastbert.finetune.tag import Words
from fastbert.infer import Embedder, Filler
from fastbert.interpret.attributions import Attribution, explain
from fastbert.interpret.question import Question, Target
from fastbert.interpret.targets import (
    answer_target,
    class_number,
    class_target,
    similarity_target,
    tag_target,
    word_target,
)
from fastbert.models.config import BertConfig

_FINETUNED = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_MASKED = ("ForMaskedLM", "ForPreTraining")
_GPT = "LMHeadModel"


class Explainer:
    """Explains the model in a folder: a run of `fastbert finetune`, a masked LM, or a sentence encoder.

    A call takes a text, with a second one for a model of pairs, for the text that a question is answered from, and for
    a sentence encoder. `target` is by default what the model predicts: of a classifier the name or number of a class;
    of a tagger a tag; of a model of answers start, end or span; of a masked LM a word. `at` numbers, from 0, the word
    that is tagged (by default the first whose tag is not O), or the [MASK]. `probability` explains probabilities, not
    logits. Raises ValueError or FileNotFoundError for folders, texts and targets that do not fit.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = trained_model(folder)
        name = ""
        if not (folder / "modules.json").is_file():
            name = str(*(BertConfig.from_file(folder).extra.get("architectures") or [])[:1])
        self._user: Any
        if name.endswith(_FINETUNED):
            self._user = Predictor(folder)
            self.kind = self._user.options.task
        elif name.endswith(_MASKED):
            self._user, self.kind = Filler(folder), "mask"
        elif name.endswith(_GPT):
            raise ValueError(
                f"{folder} holds a GPT, whose next words are not explained: pass a fine-tuned model, a masked LM or a "
                "sentence encoder"
            )
        else:
            self._user, self.kind = Embedder(folder), "sentences"
        self.model: Any = self._user.model.eval()
        self.tokenizer: Any = self._user.tokenizer
        self.mask_id = SpecialIds.of(self.tokenizer).mask
        self.max_length: int = self.model.config.max_length
        if self.kind == "sentences":
            self.max_length = self._user.max_length
        elif self.kind != "mask":
            self.max_length = min(self.max_length, self._user.options.max_length)

    def __call__(
        self,
        text: str,
        pair: str | None = None,
        *,
        target: str | int | None = None,
        at: int | None = None,
        method: str = "integrated",
        **options: Any,
    ) -> Attribution:
        """The scores of the texts' tokens; `options` are the method's own."""
        return explain(self.question(text, pair, target=target, at=at), method, **options)

    def question(
        self,
        text: str,
        pair: str | None = None,
        *,
        target: str | int | None = None,
        at: int | None = None,
        probability: bool = False,
    ) -> Question:
        """The question that a call explains."""
        self._check(text, pair, target, at)
        if self.kind == "classify":
            return self._classes(text, pair, target, probability)
        if self.kind == "tag":
            return self._tags(
                Words.of_text(text, self._user.options.characters), target, at, probability, text
            )
        if self.kind == "answer":
            assert pair is not None
            return self._answers(text, pair, target)
        if self.kind == "mask":
            return self._words(text, target, at or 0, probability)
        assert pair is not None
        return self._similarity(text, pair)

    def tagged(
        self,
        words: Sequence[str],
        at: int | None = None,
        target: str | None = None,
        probability: bool = False,
    ) -> Question:
        """The question for the tag of a word of a sentence in words; the arguments are those of a call."""
        return self._tags(Words(tuple(words)), target, at, probability, " ".join(words))

    def _check(self, text: str, pair: str | None, target: Any, at: int | None) -> None:
        for each in (text, pair):
            if each is not None and not each.strip():
                raise ValueError("a text is empty: pass one with words")
        second = {
            "answer": "the text that the question is answered from",
            "sentences": "the text that the first is compared with",
        }
        pairs = self.kind == "classify" and self._user.options.pair is not None
        if pair is None and (pairs or self.kind in second):
            raise ValueError(
                f"the model takes two texts: pass also {second.get(self.kind, 'the second of the pair')}"
            )
        if pair is not None and self.kind in ("tag", "mask"):
            raise ValueError("two texts are given and the model takes one: leave the second out")
        if self.kind == "sentences" and target is not None:
            raise ValueError(
                f"the target is {quoted(target)} and a sentence encoder has one, similarity: leave it out"
            )
        if at is not None and self.kind not in ("tag", "mask"):
            raise ValueError(
                f"at is {at} and only words that are tagged, or [MASK], are numbered: leave it out"
            )

    # --- the kinds of models ---

    def _classes(self, text: str, pair: str | None, target: Any, probability: bool) -> Question:
        encoding = self._encoded(text, pair)
        if target is None:
            target = int(self._output(*_ids(encoding)).logits[0].argmax())
        k = class_number(self.model.config.labels, target)
        return self._question(class_target(self.model, k, probability), [encoding], text, pair)

    def _tags(
        self, words: Words, target: Any, at: int | None, probability: bool, text: str
    ) -> Question:
        if not words.words:
            raise ValueError(f"the text is {quoted(text)}, which has no word: pass another")
        task = self._user.task
        features = task.encode(self.tokenizer, [words])
        if len(features) > 1 or features.cut:
            raise ValueError(
                f"the text has more tokens than the {self.max_length} that the model takes: shorten it"
            )
        ids, firsts = torch.from_numpy(features.ids[0]), features.places[0].tolist()
        logits = self._output(ids, torch.zeros_like(ids)).logits[firsts]
        names = self.model.config.labels
        if at is None:
            tagged = [i for i, k in enumerate(logits.argmax(-1).tolist()) if names[k] != "O"]
            at = tagged[0] if tagged else 0
        if not 0 <= at < len(firsts):
            raise ValueError(f"there is no word {at}: the text has {len(firsts)}, numbered from 0")
        k = int(logits[at].argmax()) if target is None else class_number(names, target)
        aim = tag_target(self.model, firsts[at], k, probability)
        aim = Target(f"{aim.name} at {words.words[at]}", aim.score, aim.places)
        spans = words.spans or _spans(words.words)
        numbers: list[int | None] = [None] * len(ids)
        for w, (first, last) in enumerate(pairwise([*firsts, len(ids) - 1])):
            numbers[first:last] = [w] * (last - first)
        fixed = torch.tensor([w is None for w in numbers])
        return Question(
            self.model,
            aim,
            ids,
            torch.zeros_like(ids),
            fixed,
            self.mask_id,
            [self.tokenizer.id_to_token(i) for i in ids.tolist()],
            (text,),
            [(0, 0) if w is None else spans[w] for w in numbers],
            numbers,
            [0] * len(ids),
        )

    def _answers(self, question: str, context: str, target: Any) -> Question:
        encoding = self._encoded(question, context)
        if target not in (None, "start", "end", "span"):
            raise ValueError(f"the target is {quoted(target)}: choose start, end or span")
        output = self._output(*_ids(encoding))
        inside = torch.tensor([s == 1 for s in encoding.sequence_ids])
        if not inside.any():
            raise ValueError(
                "the text that the question is answered from has no token: pass another"
            )
        start, end = output.start_logits.cpu(), output.end_logits.cpu()
        sums = start[:, None] + end[None, :]
        allowed = (inside[:, None] & inside[None, :]).triu()
        allowed = allowed.tril(self._user.options.longest_answer - 1)
        first, last = divmod(int(sums.masked_fill(~allowed, float("-inf")).argmax()), len(sums))
        aim = answer_target(None if target == "end" else first, None if target == "start" else last)
        words = context[encoding.offsets[first][0] : encoding.offsets[last][1]]
        aim = Target(f"{aim.name} of {words}", aim.score, aim.places)
        return self._question(aim, [encoding], question, context)

    def _words(self, text: str, target: Any, at: int, probability: bool) -> Question:
        token = self.tokenizer.id_to_token(self.mask_id)
        text = text.replace("[MASK]", token)
        encoding = self._encoded(text)
        places = [i for i, token_id in enumerate(encoding.ids) if token_id == self.mask_id]
        if not places:
            raise ValueError(
                f"there is no [MASK] in {quoted(text)}: write one where a word is to be explained"
            )
        if not 0 <= at < len(places):
            raise ValueError(
                f"there is no [MASK] {at}: the text has {len(places)}, numbered from 0"
            )
        if target is None:
            logits = self._output(*_ids(encoding)).logits[places[at]]
            k = int(logits[: self.tokenizer.get_vocab_size()].argmax())
        else:
            k = target if isinstance(target, int) else self._token(target)
        name = self._user._word(k)
        aim = word_target(self.model, places[at], k, name, probability)
        return self._question(aim, [encoding], text, None)

    def _token(self, word: str) -> int:
        """The number of a word of one token."""
        found = [self.tokenizer.token_to_id(w) for w in (f"Ġ{word}", word, word.lower())]
        if not (known := [k for k in found if k is not None]):
            raise ValueError(
                f"the target {quoted(word)} is no token of the model: choose a word of one token"
            )
        return known[0]

    def _similarity(self, text: str, other: str) -> Question:
        user = self._user
        encodings = [self._encoded(user.prompt + t) for t in (text, other)]
        ids = torch.cat([_ids(e)[0] for e in encodings])
        lengths = (len(encodings[0].ids), len(encodings[1].ids))
        aim = similarity_target(ids, lengths, user.pooling, user.skipped, user.about.layers)
        return self._question(aim, encodings, user.prompt + text, user.prompt + other, user.skipped)

    # --- tokens ---

    def _encoded(self, text: str, pair: str | None = None) -> Any:
        self.tokenizer.no_truncation()
        encoding = self.tokenizer.encode(text, pair)
        if len(encoding.ids) > self.max_length:
            raise ValueError(
                f"the text has {len(encoding.ids)} tokens and the model takes {self.max_length}: shorten it"
            )
        return encoding

    @torch.no_grad()
    def _output(self, ids: Tensor, types: Tensor) -> Any:
        """The model's output for one sequence, packed."""
        device, single = self.model.device, (self.model.config.type_vocab_size or 0) < 2
        types = torch.zeros_like(types) if single else types
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32, device=device)
        given = {"cu_seqlens": bounds, "max_seqlen": len(ids)}
        return self.model(ids.to(device), token_type_ids=types.to(device), **given)

    def _question(
        self, aim: Target, encodings: list[Any], text: str, pair: str | None, skipped: int = 0
    ) -> Question:
        """The question of one encoding, of a text or a pair, or of two encodings of a text each."""
        apart = len(encodings) > 1
        special = [
            bool(mark) or (i < skipped)
            for e in encodings
            for i, mark in enumerate(e.special_tokens_mask)
        ]
        owners = [
            number if apart else (sequence or 0)
            for number, e in enumerate(encodings)
            for sequence in e.sequence_ids
        ]
        words = [w for e in encodings for w in e.word_ids]
        return Question(
            self.model,
            aim,
            torch.cat([_ids(e)[0] for e in encodings]),
            torch.cat([_ids(e)[1] for e in encodings]),
            torch.tensor(special),
            self.mask_id,
            [t for e in encodings for t in e.tokens],
            (text,) if pair is None else (text, pair),
            [o for e in encodings for o in e.offsets],
            [None if mark else w for w, mark in zip(words, special, strict=True)],
            owners,
            tuple(len(e.ids) for e in encodings),
        )


def _ids(encoding: Any) -> tuple[Tensor, Tensor]:
    return torch.tensor(encoding.ids), torch.tensor(encoding.type_ids)


def _spans(words: Sequence[str]) -> list[tuple[int, int]]:
    """The words' places in their text, with a blank between two."""
    starts = [0]
    for word in words:
        starts.append(starts[-1] + len(word) + 1)
    return [(a, b - 1) for a, b in pairwise(starts)]
