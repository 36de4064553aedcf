"""The demo's parts; `make demo` runs the whole."""

import tiny_run

from fastbert.cli import demo
from fastbert.data import fetch
from fastbert.pretrain.config import load_settings
from fastbert.train import PretrainConfig
from fastbert.train.settings import check_length_said


def test_recipe_is_valid():
    settings = load_settings(demo.RECIPE)
    check_length_said(settings)
    config = PretrainConfig(**settings)
    assert (config.minutes, config.goal) == (10.0, 0.8)


def test_older_runs_are_kept_unless_told(tmp_path):
    out = tmp_path / "demo"
    assert demo.fresh_folder(out, overwrite=False) == out
    out.mkdir()
    (out / "config.toml").write_text("")
    assert demo.fresh_folder(out, overwrite=False) == tmp_path / "demo-2"
    (tmp_path / "demo-2").mkdir()
    assert demo.fresh_folder(out, overwrite=False) == tmp_path / "demo-3"
    assert demo.fresh_folder(out, overwrite=True) == out
    assert not out.exists()


def test_demo_on_a_tiny_corpus(tmp_path, monkeypatch, capsys):
    corpus = tiny_run.write_corpus(tmp_path / "corpus")
    monkeypatch.setattr(fetch, "fetch", lambda name: corpus)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        PretrainConfig(**tiny_run.tiny_settings(corpus, sources=[], steps=2)).to_toml()
    )
    monkeypatch.setattr(demo, "RECIPE", recipe)
    recipe.write_text(recipe.read_text().replace("sources = []\n", ""))
    demo.demo(tmp_path / "demo", minutes=None, overwrite=False)
    text = capsys.readouterr().out
    for part in ("unigram entropy at the same places", "loss.png", "probability", "fill-mask"):
        assert part in text
    for sentence in demo.SENTENCES:
        assert sentence in text


def test_the_demo_says_in_one_sentence_that_the_goal_was_missed(tmp_path, monkeypatch, capsys):
    corpus = tiny_run.write_corpus(tmp_path / "corpus")
    monkeypatch.setattr(fetch, "fetch", lambda name: corpus)
    recipe = tmp_path / "recipe.toml"
    settings = tiny_run.tiny_settings(corpus, steps=2, goal=5.0)
    recipe.write_text(PretrainConfig(**settings).to_toml().replace("sources = ", "# "))
    monkeypatch.setattr(demo, "RECIPE", recipe)
    demo.demo(tmp_path / "demo", minutes=None, overwrite=False)
    text = capsys.readouterr().out
    assert "5 nats below that of a model that knows word frequencies alone" in text
    assert "4. no words for [MASK]: after 2 steps the held-out loss is " in text
    for part in ("probability", "fill-mask", *demo.SENTENCES):
        assert part not in text
