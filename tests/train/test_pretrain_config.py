"""Settings: files, flags, and the sentence for each invalid value."""

import pytest

from fastbert.pretrain.config import PretrainConfig, load_settings
from fastbert.train.settings import check_length_said, merge


def test_resolved_file_reads_back(tmp_path):
    config = PretrainConfig(
        sources=['a "quoted" name.txt', "b\\ü.txt"],
        minutes=2,
        steps=77,
        lr=1e-3,
        whole_word=True,
        separator="",
    )
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    assert PretrainConfig(**load_settings(file)) == config


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.toml", "lr = 1e-3\nsources = ['x', 'y']\n"), ("a.yaml", "lr: 1.0e-3\nsources: [x, y]\n")],
)
def test_toml_and_yaml(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert load_settings(tmp_path / name) == {"lr": 1e-3, "sources": ["x", "y"]}


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.toml", "lr = \n", "a.toml can't be read"),
        ("a.yaml", "lr: [1\n", "a.yaml can't be read"),
        ("a.yaml", "just text", "holds no settings"),
        ("a.toml", "learning_rate = 1.0", "no setting 'learning_rate': did you mean '"),
        ("a.toml", "bach_size = 1", "no setting 'bach_size': did you mean 'batch_size'"),
        ("a.ini", "lr = 1", "suffix is '.ini'"),
    ],
)
def test_bad_files(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="a\\.") as error:
        load_settings(tmp_path / name)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"recipe": "elmo"}, "recipe is 'elmo': choose one of bert, roberta"),
        ({"precision": "fp16"}, "precision is 'fp16'"),
        ({"backend": "tpu"}, "backend is 'tpu'"),
        ({"optimiser": "adam"}, "optimiser is 'adam': choose one of adamw, lamb, muon"),
        ({"mask_prob": 1.5}, "mask_prob is 1.5: it must be in [0, 1)"),
        ({"heldout": 0.0}, "heldout must be above 0"),
        ({"lr": -1.0}, "lr is -1.0: it must be above 0"),
        ({"steps": 0}, "steps is 0: it must be above 0"),
        ({"lr": float("nan")}, "lr is nan: it must be finite"),
        ({"max_length": 1024}, "max_length 1024 is above max_position 512: raise max_position"),
        ({"max_tokens": 64}, "max_tokens 64 is below max_length 128"),
        ({"max_tokens": 4096, "batch_size": 8}, "max_tokens and batch_size are both set"),
    ],
)
def test_bad_values(settings, sentence):
    with pytest.raises(ValueError, match=r".") as error:
        PretrainConfig(**settings)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": "fast"},
        {"steps": 1.5},
        {"lowercase": 1},
        {"sources": [1]},
        {"steps": True},
        {"seed": None},
    ],
)
def test_bad_types(settings):
    with pytest.raises(TypeError, match=rf"{next(iter(settings))} is .*: it must be a"):
        PretrainConfig(**settings)


def test_defaults_follow_other_settings():
    assert PretrainConfig(hidden=64).ffn == 256
    assert PretrainConfig().max_tokens == 8192
    assert PretrainConfig(batch_size=4).max_tokens is None
    assert PretrainConfig(recipe="roberta").tokenizer_kind == "bpe"


def test_warmup_is_a_part_or_a_number():
    assert PretrainConfig(steps=200, warmup=0.25).warmup_steps == 50
    assert PretrainConfig(steps=200, warmup=30).warmup_steps == 30


def test_flags_win_over_the_file():
    file = {"lr": 1.0, "epochs": 3.0, "steps": 5, "max_tokens": 4096}
    assert merge(file, {"lr": 2.0}) == file | {"lr": 2.0}
    # a flag for the length replaces every setting of the length in a file, such as a run's config.toml
    assert merge(file, {"minutes": 2.0, "batch_size": 8}) == {
        "lr": 1.0,
        "minutes": 2.0,
        "batch_size": 8,
    }


def test_length_must_be_said():
    with pytest.raises(ValueError, match="pass one of steps, epochs and minutes"):
        check_length_said({})
    with pytest.raises(ValueError, match="epochs and minutes are both set"):
        check_length_said({"epochs": 1.0, "minutes": 1.0})
    check_length_said({"steps": 3, "minutes": 1.0})


def test_yaml_floats_without_a_point():
    """YAML 1.1 reads 1e-4 as a string; the setting's type makes it a float."""
    assert PretrainConfig(lr="1e-4").lr == 1e-4
    with pytest.raises(TypeError, match="lr is 'high'"):
        PretrainConfig(lr="high")


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 10**20), ("threads", 100_000), ("epochs", 1e9)]
)
def test_slips_of_the_keyboard(name, value):
    with pytest.raises(ValueError, match=f"{name} is .* at most"):
        PretrainConfig(**{name: value})
