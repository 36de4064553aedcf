"""The recipe gpt: its blocks, a run, its files in transformers, resumption, text from it, and what is refused."""

import json
from itertools import pairwise

import numpy as np
import pytest
import tiny_run
import torch
from typer.testing import CliRunner

from fastbert.bert import BertForMaskedLM, GPTForCausalLM
from fastbert.cli.app import app
from fastbert.data import DataSettings, PretrainingData, Shards, load_tokenizer
from fastbert.data.pairs import blocks
from fastbert.infer import Writer
from fastbert.pretrain.trainer import PretrainTrainer
from fastbert.train import PretrainConfig, pretrain

GPT = {"recipe": "gpt", "max_length": 32, "max_tokens": 128, "backend": None, "vocab_size": 300}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    corpus = tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))
    return tiny_run.tiny_settings(corpus, **GPT, steps=40, lr=1e-2)


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    return pretrain(PretrainConfig(**settings), tmp_path_factory.mktemp("run") / "out", quiet=True)


def test_a_run_and_its_model_in_transformers(finished, settings):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    assert finished.evaluation.keys() == {"lm_loss", "perplexity", "accuracy", "labelled"}
    lines = [line for line in tiny_run.losses(finished.out) if line["kind"] == "train"]
    assert lines[-1]["lm_loss"] < lines[0]["lm_loss"] - 1.0
    # the corpus has a rule that bigrams see, and the model has made its first steps towards it
    baselines = finished.baselines
    assert baselines["left bigrams"] < baselines["unigram entropy"] - 1.0
    assert finished.evaluation["lm_loss"] < baselines["unigram entropy"]
    ours = GPTForCausalLM.from_pretrained(finished.model)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(finished.model).eval()
    ids = torch.randint(5, 100, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=2e-5)
    config = json.loads((finished.model / "config.json").read_text())
    sep = load_tokenizer(finished.model).token_to_id("</s>")
    assert (config["model_type"], config["eos_token_id"]) == ("gpt2", sep)
    # the evaluation is the loss of transformers' model on the held-out blocks
    shards = Shards.open(finished.out / "data")
    given = DataSettings("gpt", max_length=32, max_tokens=128, heldout=0.2)
    data = PretrainingData(shards, load_tokenizer(finished.model), given, part="heldout")
    total = count = 0
    for number in range(data.num_batches()):
        batch = data.batch(0, number)
        for block in batch["input_ids"].split(batch["cu_seqlens"].diff().tolist()):
            if count < finished.evaluation["labelled"]:
                total += theirs(block[None], labels=block[None]).loss.item() * (len(block) - 1)
                count += len(block) - 1
    assert count == finished.evaluation["labelled"]
    assert total / count == pytest.approx(finished.evaluation["lm_loss"], rel=1e-4)


def test_blocks_hold_every_token_once_in_order(finished):
    shards = Shards.open(finished.out / "data")
    documents = np.arange(len(shards.documents) - 1)
    for length in (7, 32, 10_000):
        found = blocks(shards, documents, max_length=length, seed=3, epoch=1)
        sizes = found.lengths()
        assert set(sizes[:-1].tolist()) <= {length}
        assert 1 < sizes[-1] <= length
        tokens = len(shards.tokens)
        assert sizes.sum() in (tokens + len(documents), tokens + len(documents) - 1)
        assert found.closed.sum() in (len(documents), len(documents) - 1)
    given = DataSettings("gpt", max_length=32, max_tokens=64)
    tokenizer = load_tokenizer(finished.model)
    batch = PretrainingData(shards, tokenizer, given).batch(0, 0)
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["label_rows"].tolist() == [*range(31), *range(32, 63)]
    assert "token_type_ids" not in batch
    # a document's last token is followed by [SEP], and the next document begins
    whole = [PretrainingData(shards, tokenizer, given).batch(0, i)["input_ids"] for i in range(9)]
    stream = torch.cat(whole)
    assert (stream == tokenizer.token_to_id("<s>")).sum() == 0
    one = PretrainingData(
        shards, tokenizer, DataSettings("gpt", max_length=10_000, max_tokens=10_000)
    )
    stream = one.batch(0, 0)["input_ids"].numpy()
    ends = np.flatnonzero(stream == tokenizer.token_to_id("</s>"))
    pieces = [piece.tolist()[1:] for piece in np.split(np.append(0, stream), ends + 1)]
    starts = shards.sentences[shards.documents]
    texts = [shards.tokens[a:b].tolist() for a, b in pairwise(starts)]
    assert all(piece in texts for piece in pieces[1:-1])


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_run_that_breaks_off_goes_on_bitwise(settings, optimiser, tmp_path, monkeypatch):
    given = {**settings, "steps": 8, "optimiser": optimiser, "tokenizer_kind": "wordpiece"}
    whole = pretrain(PretrainConfig(**given), tmp_path / "whole", quiet=True)
    step = PretrainTrainer.train_step

    def broken(self):
        if self.at.step == 6:
            raise RuntimeError("the power is off")
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "train_step", broken)
        with pytest.raises(RuntimeError, match="power"):
            pretrain(PretrainConfig(**given), tmp_path / "part", quiet=True)
    part = pretrain(None, tmp_path / "part", resume=True, quiet=True)
    assert tiny_run.losses(part.out) == tiny_run.losses(whole.out)
    first, second = (GPTForCausalLM.from_pretrained(r.model).state_dict() for r in (whole, part))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_positions_are_those_that_blocks_train(settings):
    short = {k: v for k, v in settings.items() if k != "max_position"}
    assert PretrainConfig(**short).max_position == short["max_length"]
    assert PretrainConfig(**{**short, "recipe": "roberta"}).max_position == 512


def test_one_document_is_refused_with_advice(settings, tmp_path):
    (tmp_path / "one.txt").write_text("\n\n".join(["The union needs the law."] * 30))
    given = {**settings, "sources": [str(tmp_path / "one.txt")], "steps": 2}
    with pytest.raises(ValueError, match=r"has 1 document, .* name the line between .* separator"):
        pretrain(PretrainConfig(**given), tmp_path / "out", quiet=True)
    found = pretrain(PretrainConfig(**given, separator=""), tmp_path / "parts", quiet=True)
    assert found.steps == 2


def test_the_command_goes_on_with_texts(finished):
    prompts = ["The great union", "The law serves the"]
    words = [w for p in prompts for w in ("--prompt", p)]
    # OUT of the run is as good as OUT/model
    given = ["generate", str(finished.out), "--max-new-tokens", "12"]
    run = CliRunner().invoke(app, [*given, *words])
    assert run.exit_code == 0, run.output
    writer = Writer(finished.model)
    texts = writer(prompts, 12)
    assert run.stdout == "".join(f"{text}\n" for text in texts)
    assert all(text.startswith(p) for text, p in zip(texts, prompts, strict=True))
    # a text does not depend on the others, also where it is drawn
    drawn = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    assert writer(prompts[1:], 12, **drawn) == writer(prompts, 12, **drawn)[1:]
    again = CliRunner().invoke(
        app,
        [*given, "--json", "--temperature", "1", "--top-p", "0.9", "--seed", "7"],
        input=prompts[1],
    )
    assert json.loads(again.stdout) == {
        "prompt": prompts[1],
        "text": writer(prompts[1:], 12, **drawn)[0],
    }


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--prompt", "a", "--top-k", "3"], "set temperature"),
        (["--prompt", " "], "text 1 of the command line is empty"),
        (["--prompt", "the", "--max-new-tokens", "64"], "the model has 64 positions"),
        (["--prompt", "the", "--temperature", "-1"], "it must be at least 0"),
    ],
)
def test_a_bad_command_gets_a_sentence(given, sentence, finished):
    run = CliRunner().invoke(app, ["generate", str(finished.model), *given])
    assert isinstance(run.exception, ValueError)
    assert sentence in str(run.exception)
    assert not run.stdout


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mask_prob": 0.2}, "mask_prob is set and recipe is gpt"),
        ({"next_sentence": True}, "next_sentence is set and recipe is gpt"),
        ({"whole_word": True}, "whole_word is set"),
        ({"start": "neighbours"}, "tokens see none after them"),
        ({"heldout": 0.0}, "heldout must be above 0"),
        ({"recipe": "gpt3"}, "choose one of bert, roberta, modern, gpt"),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        PretrainConfig(**{"recipe": "gpt", "steps": 1, **settings})


def test_other_forms_and_models_are_refused_before_anything_is_written(
    settings, finished, tmp_path
):
    for changed, sentence in (
        ({"gated": True}, "a gpt2 of another form"),
        ({"positions": "rotary"}, "a gpt2 of another form"),
        (
            {"init_from": str(finished.model), "recipe": "roberta"},
            "is a gpt2 and recipe is roberta",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            pretrain(PretrainConfig(**{**settings, **changed}), tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="load a gpt2 with GPTForCausalLM"):
        BertForMaskedLM.from_pretrained(finished.model)
    more = {**settings, "init_from": str(finished.model), "steps": 2, "lr": 1e-4}
    result = pretrain(PretrainConfig(**more), tmp_path / "more", quiet=True)
    assert result.evaluation["lm_loss"] < finished.evaluation["lm_loss"] + 0.2
