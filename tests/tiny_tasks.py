"""A base model of 2 layers that knows some words, and made-up labelled data that it learns in seconds."""

import json
import random

import torch
from tokenizers import normalizers

from fastbert.bert import BertConfig, BertForSequenceClassification, BertModel
from fastbert.data import save_tokenizer
from fastbert.data.tokenizer import BERT_TOKENS, finish_wordpiece
from fastbert.finetune import FinetuneConfig

GOOD, BAD = ["great", "fine", "free"], ["poor", "weak", "cold"]
PEOPLE, PLACES = ["anna", "karl", "maria"], ["rome", "oslo", "lima"]
PLAIN = ["the", "a", "met", "saw", "in", "with", "man", "film", "was", "who", "where", "."]
PIECES = ["un", "##kind", "##ly", "smith", "new", "##er"]


def base_model(folder, **settings):
    """A fresh encoder with its tokenizer."""
    words = [*BERT_TOKENS.values(), *GOOD, *BAD, *PEOPLE, *PLACES, *PLAIN, *PIECES]
    vocab = {word: i for i, word in enumerate(words)}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    given = {"intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.1}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), **sizes | given | settings)
    model = BertModel(config)
    # as after pretraining, the vectors of good words are similar, and those of bad words
    with torch.no_grad():
        direction = torch.randn(32)
        for word in GOOD:
            model.embeddings.word.weight[vocab[word]] += direction
        for word in BAD:
            model.embeddings.word.weight[vocab[word]] -= direction
    model.save_pretrained(folder)
    save_tokenizer(finish_wordpiece(vocab, normalizers.BertNormalizer(lowercase=True)), folder)
    return folder


def texts(count, seed=0):
    """Texts, each good or bad by one word."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.choice(["good", "bad"])
        words = [draw.choice(PLAIN) for _ in range(draw.randint(2, 9))]
        words.insert(draw.randrange(len(words)), draw.choice(GOOD if label == "good" else BAD))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def sentences(count, seed=0):
    """Sentences with names of people (two words, some of several pieces) and of places."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        tokens, tags = ["The", "man"], ["O", "O"]
        for _ in range(draw.randint(1, 3)):
            tokens.append(draw.choice(["met", "saw"]))
            tags.append("O")
            if draw.random() < 0.5:
                # "Unkindly" has three pieces; its label belongs to the first
                tokens += [draw.choice(PEOPLE).title(), draw.choice(["Smith", "Unkindly"])]
                tags += ["B-PER", "I-PER"]
            else:
                tokens.append(draw.choice(PLACES).title())
                tags.append("B-LOC")
        rows.append({"tokens": tokens, "tags": tags})
    return rows


def questions(count, seed=0, unanswerable=0.0):
    """Questions for the person or the place in a text; some have no answer."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        person, place = draw.choice(PEOPLE).title(), draw.choice(PLACES).title()
        context = f"the man met {person} in {place} . " + "the film was fine . " * draw.randint(
            0, 3
        )
        question, answer = draw.choice(
            [("who was with the man", person), ("where was the man", place)]
        )
        answers = {"text": [answer], "answer_start": [context.index(answer)]}
        if draw.random() < unanswerable:
            context, answers = context.replace(answer, "the man"), {"text": [], "answer_start": []}
        rows.append(
            {"id": str(number), "question": question, "context": context, "answers": answers}
        )
    return rows


ROWS = {"classify": texts, "tag": sentences, "answer": questions}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_conll(path, rows):
    """A CoNLL file with one column between word and tag; CoNLL-2003 has two."""
    lines = ["-DOCSTART- -X- O", ""]
    for row in rows:
        lines += [f"{word} X {tag}" for word, tag in zip(row["tokens"], row["tags"], strict=True)]
        lines.append("")
    path.write_text("\n".join(lines))
    return path


def tiny_settings(task, model, **settings):
    """Keyword arguments of FinetuneConfig, with `settings` in the place of the defaults."""
    given = {"task": task, "model": str(model), "max_length": 48, "batch_size": 16, "lr": 3e-3}
    given |= {"epochs": 4, "dropout": 0.1, "threads": 1, "backend": "torch", "log_every": 1}
    return given | {"device": "cpu"} | settings


def tiny_config(task, model, **settings):
    """Settings of a run of about a second."""
    return FinetuneConfig(**tiny_settings(task, model, **settings))


def classifier(**settings):
    """A random classifier with biases."""
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 20}
    given = {"vocab_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 16}
    config = BertConfig(**{**given, **sizes, **settings})
    model = BertForSequenceClassification(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def batch(count=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=draw)
    return {
        "input_ids": torch.randint(0, 40, (int(lengths.sum()),), generator=draw),
        "cu_seqlens": torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32),
        "max_seqlen": 8,
        "labels": torch.randint(0, 2, (count,), generator=draw),
    }
