"""`fastbert pretrain --images`: whole runs of both recipes, their files and refusals; `embed` on what they leave."""

import json
import shutil

import numpy as np
import pytest
import ranks
import tiny_images
import tiny_run
import torch
from PIL import Image

from fastbert.cli import app
from fastbert.data import load_tokenizer
from fastbert.infer import ImageTextEmbedder
from fastbert.models.single_stream import BertForImageText
from fastbert.models.two_towers import TwoTowers
from fastbert.pretrain import run
from fastbert.pretrain.captions import read_captions
from fastbert.pretrain.image_feed import shared_image_feed
from fastbert.pretrain.retrieval import both_ways, recalls
from fastbert.train import PretrainConfig, pretrain
from fastbert.train.loop import Stopped
from fastbert.train.metrics import read_metrics
from fastbert.train.world import World


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_images.write_folder(tmp_path_factory.mktemp("images") / "shapes")


@pytest.fixture(scope="module")
def towers(folder, tmp_path_factory):
    """A run long enough to tell colours and shapes apart."""
    settings = tiny_images.tiny_settings(folder, steps=80, eval_every=40, checkpoint_every=40)
    out = tmp_path_factory.mktemp("towers") / "run"
    return pretrain(PretrainConfig(**settings), out, quiet=True)


def test_towers_learn_and_leave_their_files(towers):
    files = {"config.toml", "about.json", "metrics.jsonl", "loss.png", "result.json"}
    assert {p.name for p in towers.out.iterdir()} == files | {
        *("checkpoints", "data", "model", "tensorboard", "tokenizer")
    }
    held = towers.evaluation
    assert towers.baselines["chance R@1"] == pytest.approx(0.1)
    # two of the ten held-out images may have the same words
    assert held["text_to_image_r1"] > 0.5
    assert held["image_to_text_r5"] > 0.8
    lines = read_metrics(towers.out / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [40, 80]
    train = [line for line in lines if line["kind"] == "train"]
    assert train[-1]["contrastive_loss"] < train[0]["contrastive_loss"] - 1
    text = "\n".join(run.summary(towers))
    assert "held out, text to image R@1" in text
    assert "chance R@1 10.0%" in text
    assert Image.open(towers.plot).size[0] > 1000


def test_a_stream_runs_and_judges(folder, tmp_path):
    settings = tiny_images.tiny_settings(folder, "single-stream", shift=1)
    result = pretrain(PretrainConfig(**settings), tmp_path / "run", quiet=True)
    held = result.evaluation
    assert held["masked"] >= 3
    assert 0 <= held["matching_accuracy"] <= 1
    assert {"mlm_loss_masked", "text_to_image_r10", "image_to_text_r1"} <= held.keys()
    line = read_metrics(result.out / "metrics.jsonl")[0]
    assert line["loss"] == pytest.approx(line["mlm_loss"] + line["matching_loss"])
    BertForImageText.from_pretrained(result.model)
    assert "pairs told apart" in "\n".join(run.summary(result))


@pytest.mark.slow
def test_a_stream_learns_to_match(folder, tmp_path):
    sizes = {"layers": 3, "hidden": 64, "heads": 4, "lr": 1e-3, "batch_size": 36}
    settings = tiny_images.tiny_settings(
        folder, "single-stream", steps=1200, eval_every=0, checkpoint_every=0, **sizes
    )
    result = pretrain(PretrainConfig(**settings), tmp_path / "run", quiet=True)
    held = result.evaluation
    assert held["matching_accuracy"] > 0.8
    # two of the held-out images may have the same words
    assert held["text_to_image_r1"] > 0.6
    assert held["mlm_loss_masked"] < 1.0


@pytest.mark.parametrize("recipe", ["two-towers", "single-stream"])
def test_a_resumed_run_has_the_same_losses(folder, tmp_path, monkeypatch, recipe):
    more = {"dropout": 0.1, "shift": 2, "chunk": 5 if recipe == "two-towers" else 0}
    config = PretrainConfig(**tiny_images.tiny_settings(folder, recipe, **more))
    pretrain(config, tmp_path / "whole", quiet=True)
    monkeypatch.setattr("fastbert.train.loop.Signals", stopping_after(3))
    with pytest.raises(Stopped):
        pretrain(config, tmp_path / "part", quiet=True)
    monkeypatch.undo()
    # the images are in the run's own folder
    result = pretrain(None, tmp_path / "part", resume=True, quiet=True)
    assert result.steps == 6
    assert tiny_run.losses(tmp_path / "part") == tiny_run.losses(tmp_path / "whole")


def stopping_after(steps):
    """A class in place of Signals that reports SIGTERM after some steps."""

    class Stop:
        def __init__(self):
            self.asked = 0

        @property
        def caught(self):
            self.asked += 1
            return 15 if self.asked >= steps else None

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    return Stop


def test_a_step_is_that_of_chunks_and_of_parts(folder, tmp_path):
    """The pairs of a batch in chunks, and a step of two parts on one process."""
    losses = {}
    for name, more in {"whole": {}, "chunks": {"chunk": 5}}.items():
        settings = tiny_images.tiny_settings(folder, steps=3, eval_every=0, **more)
        pretrain(PretrainConfig(**settings), tmp_path / name, quiet=True)
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        losses[name] = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses["chunks"] == pytest.approx(losses["whole"], rel=1e-4)


@pytest.mark.parametrize("recipe", ["two-towers", "single-stream"])
def test_two_processes_have_the_losses_of_one(folder, tmp_path, recipe):
    more = {"steps": 3, "shards": 2, "batch_size": 9, "dropout": 0.0}
    more |= {"chunk": 4} if recipe == "two-towers" else {}
    given = tiny_images.tiny_settings(folder, recipe, **more)
    pretrain(PretrainConfig(**given), tmp_path / "one", quiet=True)
    errors = tmp_path / "errors"
    assert ranks.run(2, ranks.train, given, tmp_path / "two", errors=errors) == ([0, 0], {})
    one, two = (
        [line["loss"] for line in read_metrics(tmp_path / n / "metrics.jsonl") if "loss" in line]
        for n in ("one", "two")
    )
    assert one == pytest.approx(two, rel=1e-4)


def opened(folder, out, world=None, recipe="two-towers", **more):
    config = PretrainConfig(**tiny_images.tiny_settings(folder, recipe, **more))
    return shared_image_feed(config, out, world or World(), resume=False)


def test_an_epoch_has_every_image_once(folder, tmp_path):
    feed = opened(folder, tmp_path)
    assert len(feed.held) == 10
    seen = [feed.train.batch(0, n).examples for n in range(feed.train.num_batches())]
    members = [i for some in seen for i in some]
    assert len(members) == len(set(members)) == 36
    assert not set(members) & set(feed.held.tolist())
    again, other = feed.train.batch(0, 0), feed.train.batch(1, 0)
    assert torch.equal(again["patches"], feed.train.batch(0, 0)["patches"])
    assert again.examples != other.examples
    captions = {i: feed.tokenizer.decode(feed.tokens[i][0]) for i in members}
    assert len(set(captions.values())) == 16


def test_parts_of_an_epoch_share_its_images(folder, tmp_path):
    feed = opened(folder, tmp_path, World(0, 1, 2), batch_size=6)
    assert feed.train.num_batches() == 3
    seen = [next(batches).examples for batches in [feed.batches.stream()] for _ in range(6)]
    assert all(len(some) == 6 for some in seen)
    assert len({i for some in seen for i in some}) == 36


def test_half_of_a_streams_pairs_have_another_image(folder, tmp_path):
    feed = opened(folder, tmp_path, recipe="single-stream", batch_size=36, shift=1)
    batches = [feed.train.batch(epoch, 0) for epoch in range(8)]
    labels = torch.cat([b["matching_label"] for b in batches])
    assert 0.4 < (labels != -100).double().mean() < 0.6
    assert 0.35 < labels[labels != -100].double().mean() < 0.65
    mask = feed.masker.special.mask
    for batch in batches:
        texts = torch.arange(36).repeat_interleave(batch["cu_seqlens"].long().diff())
        # a mask would be an answer
        asked = batch["matching_label"][texts] != -100
        assert not (batch["labels"][asked] != -100).any()
        assert not (batch["input_ids"][asked] == mask).any()
        assert (batch["labels"][~asked] != -100).any()
        assert torch.equal((batch["labels"] != -100).nonzero().flatten(), batch["label_rows"])


def test_recalls_are_counted():
    scores = torch.tensor(
        [[0.9, 0.1, 0.5], [0.8, 0.7, 0.1], [0.2, 0.2, 0.2], [0.0, 1.0, float("nan")]]
    )
    found = recalls(scores, torch.tensor([0, 1, 2, 1]), ranks=(1, 2, 3))
    # ties count against the right key, and NaN finds nothing
    assert found == {"r1": 0.25, "r2": 0.5, "r3": 0.75}
    # keys of the same owner do not stand before each other
    both = both_ways(torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.3, 0.7]]), torch.tensor([0, 0, 1]))
    assert both == dict.fromkeys(both, 1.0)
    assert recalls(torch.ones(1, 2), torch.tensor([5]))["r10"] == 0.0


def test_recalls_of_noise_are_chance():
    scores = torch.rand(2000, 50, generator=torch.Generator().manual_seed(0))
    found = recalls(scores, torch.arange(2000) % 50)
    assert found["r1"] == pytest.approx(1 / 50, abs=0.01)
    assert found["r10"] == pytest.approx(10 / 50, abs=0.03)


# --- embed ---


def test_embed_gives_vectors_of_both_towers(towers, folder, tmp_path, capsys):
    def command(*words):
        with pytest.raises(SystemExit) as end:
            app.main(["embed", str(towers.model), *map(str, words)])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    code, out, _ = command("a red square", "a blue bar")
    assert code == 0
    texts = [json.loads(line) for line in out.splitlines()]
    assert [line["text"] for line in texts] == ["a red square", "a blue bar"]
    images = [folder / "red-square-0.png", folder / "blue-bar-1.png"]
    code, out, _ = command("--images", images[0], "--images", images[1])
    shown = [json.loads(line) for line in out.splitlines()]
    assert [line["image"] for line in shown] == [str(path) for path in images]
    a, b = (torch.tensor([line["vector"] for line in lines]) for lines in (shown, texts))
    assert (a @ b.T).argmax(1).tolist() == [0, 1]
    code, _, err = command("--images", folder, "--out", tmp_path / "v.npy", "--batch-size", 7)
    assert np.load(tmp_path / "v.npy").shape == (48, 256), err
    model = TwoTowers.from_pretrained(towers.model)
    embedder = ImageTextEmbedder(towers.model)
    assert torch.equal(embedder.images(images), embedder.images(images, 1))
    assert model.config.to_dict() == embedder.model.config.to_dict()
    for words, message in (
        (["x", "--images", folder], "texts and --images are both given: pass one of them"),
        (["x", "--pooling", "cls"], "has two towers, without it: leave it out"),
        (["--images", tmp_path / "no"], "no does not exist: name an image file"),
        (["--images", folder / "captions.jsonl"], "captions.jsonl can't be read as an image"),
    ):
        code, _, err = command(*words)
        assert code == 2
        assert message in err


def test_embed_needs_two_towers_for_images(folder, tmp_path, capsys):
    config = PretrainConfig(**tiny_images.tiny_settings(folder, "single-stream", steps=1))
    result = pretrain(config, tmp_path / "run", quiet=True)
    with pytest.raises(SystemExit):
        app.main(["embed", str(result.model), "--images", str(folder)])
    assert "is not of two towers: train them with" in capsys.readouterr().err
    # its words are those of a BERT
    with pytest.raises(SystemExit) as end:
        app.main(["embed", str(result.model), "a red bar"])
    assert end.value.code == 0


# --- refusals ---


def edited(folder, tmp_path, name, content):
    """A copy of the folder with another file."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    if name == "captions.tsv":
        (copy / "captions.jsonl").unlink()
    (copy / name).write_bytes(content)
    return copy


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "captions.jsonl",
            b"",
            "captions.jsonl holds no record: it is empty or has a heading only",
        ),
        ("captions.tsv", b"file\tcaption\n", "captions.tsv holds no record: it is empty"),
        ("captions.tsv", b"path\twords\na\tb\n", "captions.tsv:2 has the fields path, words: name"),
        (
            "captions.tsv",
            b"file\tcaption\nz.png\tb\n",
            "captions.tsv:2: there is no image z.png in",
        ),
        ("captions.tsv", b"file\tcaption\nred-bar-0.png\t \n", "captions.tsv:2: caption is ' '"),
        (
            "captions.tsv",
            b"file\tcaption\nred-bar-0.png\ta red bar\n",
            "black-bar-0.png has no line in",
        ),
        (
            "red-bar-1.png",
            b"no image",
            "red-bar-1.png can't be read as an image: its format is not known",
        ),
        ("captions.csv", b"file,caption\n", "has captions.csv, captions.jsonl: put one of"),
    ],
)
def test_bad_folders_are_refused_before_anything_is_written(
    folder, tmp_path, name, content, message, capsys
):
    copy = edited(folder, tmp_path, name, content)
    words = ["--images", copy, "--recipe", "two-towers", "--steps", 1, "--out", tmp_path / "run"]
    words += ["--patch", 4, "--max-patches", 4, "--layers", 1, "--hidden", 32, "--heads", 2]
    with pytest.raises(SystemExit) as end:
        app.main(["pretrain", *map(str, words), "--quiet", "--vocab-size", "100"])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert message in error
    if name == "red-bar-1.png":
        # the line of its first caption
        assert "captions.jsonl:9: " in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"recipe": "bert"},
            "images is set and recipe is bert: choose two-towers or single-stream",
        ),
        ({"images": None}, "images is not set and recipe is two-towers: name a folder of images"),
        ({"mask_prob": 0.2}, "recipe is two-towers, which masks no words: leave mask_prob"),
        (
            {"max_tokens": 100, "batch_size": None},
            "max_tokens is set and recipe is two-towers, which has no use",
        ),
        ({"sources": ["a"]}, "sources is set and recipe is two-towers, which has no use for it"),
        ({"goal": 1.0}, "goal is 1.0 and recipe is two-towers, which reads images: leave it out"),
        (
            {"recipe": "single-stream", "chunk": 4},
            "chunk is 4 and recipe is single-stream, not two",
        ),
        ({"positions": "rotary"}, "positions is rotary: choose absolute or sinusoidal"),
        ({"contrast": "hinge"}, "contrast is 'hinge': choose one of softmax, sigmoid"),
        ({"heldout": 0.0}, "heldout is 0: set it above 0, or name eval_images to judge on"),
        (
            {"recipe": "bert", "images": None, "patch": 8},
            "patch is 8 and recipe is bert, which reads",
        ),
        ({"shift": -1}, "shift is -1: it must be at least 0"),
    ],
)
def test_settings_that_do_not_fit(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**tiny_images.tiny_settings(folder, **settings))


def test_images_are_not_rebuilt(towers):
    with pytest.raises(ValueError, match="rebuild is set and the run reads images"):
        pretrain(None, towers.out, resume=True, rebuild=True, quiet=True)


def test_too_few_images_and_too_large_ones(folder, tmp_path):
    with pytest.raises(ValueError, match=r"captions.jsonl:1: .*red-square-0.png is 12 x 12 pixels"):
        opened(folder, tmp_path / "a", max_patches=2)
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(folder / "red-bar-0.png", one)
    (one / "captions.csv").write_text("file_name,text\nred-bar-0.png,a bar\n")
    assert read_captions(one)[0].captions == ["a bar"]
    with pytest.raises(ValueError, match="there are 48 images to train on and 1 held out: give at"):
        opened(folder, tmp_path / "b", eval_images=str(one))


def test_a_folder_for_evaluation(folder, tmp_path):
    other = tiny_images.write_folder(tmp_path / "other", copies=1, size=9)
    feed = opened(folder, tmp_path / "out", eval_images=str(other))
    assert feed.held.tolist() == [*range(48, 64)]
    assert feed.pictures.pixels(50).shape == (9, 9, 3)
    assert load_tokenizer(tmp_path / "out" / "tokenizer").encode("a red bar").ids[0] == 2
