"""The contrasts on tiny models: runs are kept, sizes are equal, tasks ask what they say, the page is filled in."""

import json
import shutil
import sys

import pytest
import tiny_run
import tiny_tasks
import torch

from benchmarks.models import contrasts, contrasts_learning, contrasts_tasks, equal_time
from benchmarks.models.contrasts_tasks import FORMS, SIZES, SMALL, SYMBOLS
from fastbert.bert import BertConfig, BertForMaskedLM, GPTForCausalLM


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command with parts, on data of this test."""
    monkeypatch.setattr(equal_time, "peaks", lambda seconds: {"fma_gflops_fp32": 1.0})
    monkeypatch.setattr(contrasts_tasks, "DISTANCES", (2, 4))
    monkeypatch.setattr(contrasts_tasks, "LENGTHS", (8, 16))
    monkeypatch.setattr(contrasts_tasks, "DELAYS", (1, 2))
    monkeypatch.setattr(contrasts_learning, "POINTS", 2)
    monkeypatch.setattr(contrasts_learning, "PLACES", 5)
    texts = tiny_run.write_corpus(tmp_path / "texts", documents=20)
    files = {}
    for work, rows in (("movies", tiny_tasks.texts), ("entities", tiny_tasks.sentences)):
        for seed, part in enumerate(("sources", "validation", "test")):
            file = tmp_path / f"{work}-{part}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows(24, seed)))
            files.setdefault(work, {})[part] = [str(file)] if part == "sources" else str(file)
    monkeypatch.setattr(contrasts_learning, "labelled", lambda work, runs: files[work])
    out, runs = tmp_path / "contrasts.json", tmp_path / "runs"
    given = ["x", "--quick", "--copy-steps", "2", "--copy-rates", "1e-3", "--delay-steps", "2"]
    given += ["--delay-rates", "1e-3", "--minutes", "0.001", "--rates", "1e-3", "--steps", "3"]
    given += ["--tuning-rates", "1e-3", "--seeds", "2", "--texts", str(texts)]
    given += ["--runs", str(runs), "--out", str(out)]

    def command(*parts):
        monkeypatch.setattr(sys, "argv", [*given, "--parts", *parts])
        contrasts.main()
        return json.loads(out.read_text())

    command.out, command.runs = out, runs
    return command


@pytest.mark.slow
def test_runs_are_kept_and_the_page_is_left_alone(run, monkeypatch, tmp_path):
    page = contrasts.PAGE.read_text()
    for part in contrasts.PARTS:
        found = run(part)
    assert found["costs"]["ratios"]["training"]["BERT"] == 1.0
    assert found["copy"]["BiLSTM"]["accuracy"].keys() == {"2", "4"}
    assert found["delay"]["GPT"].keys() == {"1", "2"}
    models = found["learning"]["models"]
    assert models.keys() == FORMS.keys()
    for m in models.values():
        assert len(m["points"]) >= 2
        assert m["tokens"] > 0
        assert 0 < m["loss"] < 10
        assert (m["fill_in"]["texts"], m["fill_in"]["choices"]) == (5, 5)
        assert [r["seed"] for r in m["movies"]] == [0, 1]
    text = contrasts.report(found)
    for line in ("| copy: accuracy after d tokens", "| delay: accuracy d", "| the article | here"):
        assert line in text
    contrasts.draw(found, tmp_path / "plot.png")
    assert found["machines"].keys() == {*contrasts.PARTS}
    assert f"copy, delay, costs, learning: {found['machines']['copy']['date']}, " in text
    assert contrasts.PAGE.read_text() == page
    # in a checkout without the folders of the runs, parts are put together again and nothing is trained
    shutil.rmtree(run.runs)
    run.out.write_text(
        json.dumps({k: v for k, v in found.items() if k not in ("delay", "learning")})
    )
    with monkeypatch.context() as patch:
        patch.setattr(equal_time, "pretrain", lambda *_, **__: pytest.fail("trained again"))
        patch.setattr(contrasts_learning, "finetune", lambda *_, **__: pytest.fail("tuned again"))
        patch.setattr(contrasts_tasks, "learned", lambda *_: pytest.fail("learned again"))
        again = run("delay", "learning")
    assert again["learning"] == found["learning"]
    # a model that a missing fine-tuning starts from is trained again
    name = next(iter(found["tuned"]))
    del again["tuned"][name], again["learning"]
    run.out.write_text(json.dumps(again))
    assert run("learning")["tuned"][name] == found["tuned"][name]


def test_models_have_one_size_within_5_percent(tmp_path):
    for sizes, vocabulary in ((SIZES, 8000), (SMALL, SYMBOLS + 1), (SMALL, SYMBOLS)):
        counts = [
            sum(p.numel() for p in contrasts_tasks.encoder(kind, sizes, vocabulary).parameters())
            for kind in FORMS.values()
        ]
        assert max(counts) < 1.05 * min(counts)
    options = type(
        "Options", (), {"quick": False, "texts": tmp_path, "runs": tmp_path, "threads": 1}
    )
    configs = [contrasts_learning.settings(arm, options, steps=10) for arm in FORMS]
    # what is the same for all three
    for name in ("max_tokens", "vocab_size", "tokenizer_kind", "dropout", "beta2", "schedule"):
        assert len({getattr(c, name) for c in configs}) == 1


def test_the_question_is_the_first_token():
    ids, wanted = contrasts_tasks.copies(5, 3, torch.Generator().manual_seed(0))
    assert ids.shape == (3, 7)
    assert torch.equal(ids[:, 0], wanted)
    assert (ids[:, -1] == contrasts_tasks.ASKED).all()


def test_a_delay_is_learned(monkeypatch):
    monkeypatch.setattr(contrasts_tasks, "SPAN", 16)
    assert contrasts_tasks.delayed("gpt2", 1, 120, 1e-2)["accuracy"] > 0.9
    assert contrasts_tasks.delayed("lstm", 1, 3, 1e-2)["accuracy"] < 0.5


def test_words_are_scored_with_the_text_around_them():
    """By the definition: the log-probability of each whole text, and the logits behind [MASK]."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    gpt = GPTForCausalLM(BertConfig(model_type="gpt2", initializer_range=0.5, **sizes)).eval()
    text, offered, place = torch.randint(5, 50, (12,)), torch.tensor([7, 9, 30]), 5
    with torch.no_grad():
        guess, scores = contrasts_learning._from_left(gpt, text, place, offered)
        whole = []
        for word in offered:
            ids = text.clone()
            ids[place] = word
            whole.append(-11 * gpt(ids[None], labels=ids[None]).loss)
        assert guess == int(gpt(text[None, :place]).logits[0, -1].argmax())
    # the words before the place add the same to all
    torch.testing.assert_close(scores - scores[0], torch.stack(whole) - whole[0])
    bert = BertForMaskedLM(BertConfig(**sizes)).eval()
    special = type("Special", (), {"cls": 1, "sep": 2, "mask": 3})
    with torch.no_grad():
        guess, scores = contrasts_learning._behind_mask(bert, text, place, offered, special)
        ids = torch.cat([torch.tensor([1]), text, torch.tensor([2])])
        ids[place + 1] = 3
        logits = bert(ids[None]).logits[0, place + 1]
    assert guess == int(logits.argmax())
    assert torch.equal(scores, logits[offered])


def test_choices_are_different_words_with_the_answer_first():
    answers = torch.tensor([4, 4, 4, 4, 8, 9, 6])
    found = contrasts_learning.choices(answers, 3)
    assert torch.equal(found[:, 0], answers)
    assert all(len({*row}) == 3 for row in found.tolist())
