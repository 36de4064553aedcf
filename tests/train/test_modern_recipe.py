"""The recipe modern: a run, its files, its parts as options, its ramp and its resumption."""

from dataclasses import replace

import pytest
import tiny_run
import torch

from fastbert.bert import BertForMaskedLM
from fastbert.cli.settings import signature
from fastbert.pretrain.config import load_settings
from fastbert.pretrain.run import _steps
from fastbert.train import PretrainConfig, pretrain

MODERN = {
    "recipe": "modern",
    "tokenizer_kind": "wordpiece",
    "optimiser": "muon",
    "schedule": "wsd",
    "local_attention": 16,
    "accumulate": 3,
    "batch_ramp": 0.5,
    "max_tokens": 128,
    "max_length": 32,
    "backend": None,
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    corpus = tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))
    return tiny_run.tiny_settings(corpus, **MODERN)


def test_a_run_and_its_model_in_transformers(settings, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    result = pretrain(PretrainConfig(**settings), tmp_path / "run", quiet=True)
    assert "nsp_accuracy" not in result.evaluation
    ours = BertForMaskedLM.from_pretrained(result.model)
    theirs = transformers.ModernBertForMaskedLM.from_pretrained(result.model).eval()
    ids = torch.randint(5, 100, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=2e-5)
    # the ramp: a third of three steps with one batch, then two, then three
    lines = [line for line in tiny_run.losses(tmp_path / "run") if line["kind"] == "train"]
    tokens = [
        b["tokens"] - a["tokens"] for a, b in zip([{"tokens": 0}, *lines], lines, strict=False)
    ]
    assert lines[-1]["mlm_loss"] < lines[0]["mlm_loss"] - 0.3
    assert max(tokens[:2]) <= 128 < max(tokens[2:4]) <= 256 < max(tokens[6:]) <= 384


def test_a_recipe_gives_what_is_not_set():
    modern = PretrainConfig(recipe="modern", steps=1)
    assert (modern.mask_prob, modern.eval_mask_prob, modern.dropout) == (0.3, 0.15, 0.0)
    assert (modern.positions, modern.pre_norm, modern.gated, modern.biases) == (
        "rotary",
        True,
        True,
        False,
    )
    # as many parameters as without a gate, about
    assert (modern.ffn, PretrainConfig(steps=1).ffn) == (2048, 3072)
    own = PretrainConfig(recipe="modern", steps=1, biases=True, mask_prob=0.2, gated=False)
    assert (own.biases, own.mask_prob, own.ffn) == (True, 0.2, 3072)
    old = PretrainConfig(steps=1)
    assert (old.next_sentence, old.mask_prob, old.dropout, old.positions) == (
        True,
        0.15,
        0.1,
        "absolute",
    )
    assert PretrainConfig(recipe="roberta", steps=1).next_sentence is False
    # as before the recipe modern, whose losses are judged as those of the others are
    assert PretrainConfig(steps=1, mask_prob=0.3).eval_mask_prob == 0.3


def test_a_loaded_model_keeps_its_form_and_the_run_records_it(settings, tmp_path):
    first = tiny_run.tiny_settings(settings["sources"][0], steps=1, recipe="roberta")
    first |= {"tokenizer_kind": "wordpiece"}
    model = pretrain(PretrainConfig(**first), tmp_path / "first", quiet=True).model
    given = {**settings, "steps": 1, "init_from": str(model), "layers": 5, "max_position": 64}
    result = pretrain(PretrainConfig(**given), tmp_path / "second", quiet=True)
    recorded = PretrainConfig(**load_settings(tmp_path / "second" / "config.toml"))
    assert (recorded.pre_norm, recorded.positions, recorded.biases) == (False, "absolute", True)
    assert (recorded.layers, recorded.recipe, recorded.mask_prob) == (2, "modern", 0.3)
    assert BertForMaskedLM.from_pretrained(result.model).config.model_type == "roberta"
    with pytest.raises(ValueError, match="use recipe roberta or modern"):
        pretrain(PretrainConfig(**{**given, "recipe": "bert"}), tmp_path / "no", quiet=True)


def test_every_part_can_be_switched_off_by_a_flag():
    options = [p.annotation.__metadata__[0] for p in signature(PretrainConfig).parameters.values()]
    # typer keeps a flag's name in one of two places
    flags = [flag for option in options for flag in (*(option.param_decls or ()), option.default)]
    for name in ("pre-norm", "gated", "biases", "next-sentence", "whole-word"):
        assert f"--{name}/--no-{name}" in flags


@pytest.mark.parametrize("accumulate", [2, 5, 8])
@pytest.mark.parametrize("ramp", [0.0, 0.3, 1.0])
def test_the_ramp_of_the_batch(accumulate, ramp):
    config = PretrainConfig(steps=400, accumulate=accumulate, batch_ramp=ramp)
    counts = [config.batches_of(step) for step in range(400)]
    assert counts == sorted(counts)
    assert counts[0] == (1 if ramp else accumulate)
    assert counts[-1] == accumulate
    assert sum(counts) / 400 == pytest.approx(config.batches_a_step, rel=0.01)
    # a length in epochs counts the batches that the ramp takes
    feed = type("Feed", (), {"train": type("Data", (), {"num_batches": lambda self, e: 1000})()})()
    open_ = replace(config, steps=None, epochs=2.0)
    assert _steps(open_, None, feed, None) == int(2000 / config.batches_a_step)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"recipe": "fancy"}, "recipe is 'fancy': choose one of bert, roberta, modern"),
        ({"schedule": "cosine"}, "choose one of linear, wsd, one-cycle"),
        ({"batch_ramp": 0.5}, "accumulate is 1"),
        ({"batch_ramp": 1.5, "accumulate": 2}, "batch_ramp is 1.5"),
        ({"decay": -1.0}, "decay is -1.0"),
        ({"positions": "alibi"}, "positions is 'alibi'"),
        ({"global_every": 0}, "global_every is 0"),
        ({"local_attention": -1}, "local_attention is -1"),
        ({"eval_mask_prob": 0.0}, "eval_mask_prob"),
        # nothing reads these
        ({"decay": 0.5}, "decay is 0.5 and schedule is linear, not wsd"),
        ({"rope_theta": 1e4}, "rope_theta is 10000.0 and positions is absolute, not rotary"),
        ({"global_every": 2}, "global_every is 2 and local_attention is 0"),
        (
            {"recipe": "modern", "local_attention": 0, "local_rope_theta": 1e5},
            "local_attention is 0",
        ),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        PretrainConfig(steps=1, **settings)


def test_neighbours_need_a_table_of_positions(settings, tmp_path):
    with pytest.raises(ValueError, match="rotary positions have none"):
        pretrain(
            PretrainConfig(**{**settings, "start": "neighbours"}), tmp_path / "run", quiet=True
        )
