"""Folders of sentence-transformers give its vectors, or are refused by the name of what is not supported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from typer.testing import CliRunner

from fastbert.bert import BertConfig, BertModel
from fastbert.cli.app import app
from fastbert.data import save_tokenizer
from fastbert.data.tokenizer import BERT_TOKENS, finish_wordpiece
from fastbert.infer import Embedder

st = pytest.importorskip("sentence_transformers")
models = pytest.importorskip("sentence_transformers.models")

WORDS = "the The a cat Cat sits outside film query : word and deed Q".split()  # noqa: SIM905
TEXTS = ["The cat sits outside", "a film", "word and deed " * 9, "Cat"]
WIDTH = 16
PROMPTS = {"query": "query : Q the ", "none": ""}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A tiny cased BERT with random weights."""
    path = tmp_path_factory.mktemp("encoder")
    vocab = {w: i for i, w in enumerate([*BERT_TOKENS.values(), *WORDS])}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    given = {"max_position_embeddings": 40, "initializer_range": 0.3}
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=len(vocab), hidden_size=WIDTH, **sizes, **given)
    ).save_pretrained(path)
    save_tokenizer(finish_wordpiece(vocab, normalizers.BertNormalizer(lowercase=False)), path)
    return path


def saved(
    encoder: Path, out: Path, modules: list[Any], transformer: Any = None, **model: Any
) -> Any:
    """sentence-transformers' model of an encoder and these modules, saved in `out`."""
    first = models.Transformer(str(encoder), **(transformer or {}))
    found = st.SentenceTransformer(modules=[first, *modules], device="cpu", **model)
    found.save(str(out))
    return found


def pooling(mode: Any = "mean", **settings: Any) -> Any:
    return models.Pooling(WIDTH, pooling_mode=mode, **settings)


def dense(width: int, out: int, activation: Any = None, **settings: Any) -> Any:
    torch.manual_seed(1)
    activation = activation or torch.nn.Tanh()
    return models.Dense(width, out, activation_function=activation, **settings)


def norm() -> Any:
    found = models.LayerNorm(WIDTH)
    torch.nn.init.normal_(found.norm.weight)
    return found


QUERY = {"prompts": PROMPTS, "default_prompt_name": "query"}
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
CASES: dict[str, Any] = {
    **{mode: lambda mode=mode: {"modules": [pooling(mode)]} for mode in MODES},
    **{
        f"{mode} without the prompt": lambda mode=mode: {
            "modules": [pooling(mode, include_prompt=False)],
            **QUERY,
        }
        for mode in MODES
    },
    "several": lambda: {"modules": [pooling(("cls", "mean", "max")), dense(3 * WIDTH, 7)]},
    "normalize": lambda: {"modules": [pooling(), models.Normalize()]},
    "dense": lambda: {"modules": [pooling(), dense(WIDTH, 5), dense(5, 4, torch.nn.Identity())]},
    "dense without bias": lambda: {"modules": [pooling(), dense(WIDTH, 5, bias=False)]},
    "residual": lambda: {"modules": [pooling(), dense(WIDTH, WIDTH, use_residual=True)]},
    "projected residual": lambda: {"modules": [pooling(), dense(WIDTH, 5, use_residual=True)]},
    "gelu": lambda: {"modules": [pooling(), dense(WIDTH, 5, torch.nn.GELU())]},
    "layer norm": lambda: {"modules": [pooling(), norm(), models.Dropout(0.5)]},
    "length": lambda: {"modules": [pooling()], "transformer": {"max_seq_length": 7}},
    "long": lambda: {"modules": [pooling()], "transformer": {"max_seq_length": 40}},
    "lower case": lambda: {"modules": [pooling()], "transformer": {"do_lower_case": True}},
    "default prompt": lambda: {"modules": [pooling()], **QUERY},
}


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_vectors_are_those_of_sentence_transformers(
    name: str, encoder: Path, tmp_path: Path
) -> None:
    theirs = saved(encoder, tmp_path, **CASES[name]())
    ours = Embedder(tmp_path)
    same(ours(TEXTS, batch_size=3), theirs.encode(TEXTS))
    same(Embedder(tmp_path, normalize=True)(TEXTS), theirs.encode(TEXTS, normalize_embeddings=True))
    assert ours.max_length == theirs.max_seq_length
    assert ours([]).shape == (0, theirs.encode(TEXTS).shape[1])


def test_prompts_by_name(encoder: Path, tmp_path: Path) -> None:
    theirs = saved(encoder, tmp_path, [pooling()], **QUERY)
    for name in PROMPTS:
        same(Embedder(tmp_path, prompt=name)(TEXTS), theirs.encode(TEXTS, prompt_name=name))
    same(Embedder(tmp_path, prompt="")(TEXTS), theirs.encode(TEXTS, prompt=""))
    with pytest.raises(ValueError, match="has no prompt 'mine': it has document, none, query"):
        Embedder(tmp_path, prompt="mine")
    with pytest.raises(ValueError, match="has no prompt 'query': it has none"):
        Embedder(encoder, prompt="query")


def test_the_command_takes_a_prompt(encoder: Path, tmp_path: Path) -> None:
    theirs = saved(encoder, tmp_path, [pooling("max")], **QUERY)
    result = CliRunner().invoke(app, ["embed", str(tmp_path), "a film", "--prompt", "none"])
    assert result.exit_code == 0, result.output
    vector = torch.tensor(json.loads(result.stdout)["vector"])
    same(vector, theirs.encode("a film", prompt_name="none"))


def test_older_files(encoder: Path, tmp_path: Path) -> None:
    """Switches for the pooling, the encoder in a folder of its own, no class path but `models`."""
    theirs = saved(encoder, tmp_path / "a", [pooling(("cls", "mean"))], {"max_seq_length": 6})
    new, old = tmp_path / "a", tmp_path / "b"
    (old / "0_Transformer").mkdir(parents=True)
    (old / "1_Pooling").mkdir()
    for file in (encoder / "config.json", encoder / "model.safetensors", *encoder.glob("tok*")):
        (old / "0_Transformer" / file.name).write_bytes(file.read_bytes())
    length = {"max_seq_length": 6, "do_lower_case": False}
    switches = {"cls_token": True, "mean_tokens": True, "max_tokens": False, "lasttoken": False}
    written = {f"pooling_mode_{name}": value for name, value in switches.items()}
    files = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{p[2:]}"}
            for i, p in enumerate(("0_Transformer", "1_Pooling"))
        ],
        "0_Transformer/sentence_bert_config.json": length,
        "1_Pooling/config.json": {"word_embedding_dimension": WIDTH, **written},
    }
    for name, content in files.items():
        (old / name).write_text(json.dumps(content))
    same(Embedder(old)(TEXTS), theirs.encode(TEXTS))
    same(Embedder(new)(TEXTS), theirs.encode(TEXTS))


def test_a_pooling_that_does_not_fit_the_layers(encoder: Path, tmp_path: Path) -> None:
    saved(encoder, tmp_path, [pooling(("cls", "mean")), dense(2 * WIDTH, 5)])
    with pytest.raises(ValueError, match=r"pooling by cls gives 16 numbers and the folder's files"):
        Embedder(tmp_path, pooling="cls")


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("modules.json", "{}", "it holds a dict"),
        ("modules.json", "[", "is not valid JSON"),
        ("modules.json", [{"type": "sentence_transformers.models.BoW"}], "the modules are BoW"),
        ("modules.json", [{"type": "mine.Pooling", "path": ""}], "a module is 'mine.Pooling'"),
        ("modules.json", [3], "an entry is no object"),
        ("sentence_bert_config.json", {"max_seq_length": "x"}, "max_seq_length is 'x'"),
        ("sentence_bert_config.json", {"do_lower_case": 1}, "do_lower_case is 1"),
        ("sentence_bert_config.json", {"model_args": {"a": 1}}, "model_args is"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task is"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "pooling_mode is 'median'"),
        ("1_Pooling/config.json", {"include_prompt": "no"}, "include_prompt is 'no'"),
        ("1_Pooling/config.json", {"embedding_dimension": None}, "embedding_dimension is None"),
        ("1_Pooling/config.json", {"weights": [1]}, "weights is"),
        ("2_Dense/config.json", {"in_features": 3}, "a layer from 3 to 5 numbers follows 16"),
        ("2_Dense/config.json", {"activation_function": "mine.Act"}, "activation_function is"),
        (
            "2_Dense/config.json",
            {"activation_function": "torch.nn.Bilinear"},
            "activation_function",
        ),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name is"),
        ("2_Dense/config.json", {"out_features": 6}, "linear.weight is"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type is"),
        ("config_sentence_transformers.json", {"prompts": {"a": 1}}, "prompts is no object"),
        (
            "config_sentence_transformers.json",
            {"default_prompt_name": "b"},
            "default_prompt_name is",
        ),
        ("config_sentence_transformers.json", {"default_prompt_name": []}, "default_prompt_name"),
    ],
)
def test_other_settings_are_refused(
    file: str, change: Any, sentence: str, encoder: Path, tmp_path: Path
) -> None:
    saved(encoder, tmp_path, [pooling(), dense(WIDTH, 5)])
    if isinstance(change, dict):
        change = {**json.loads((tmp_path / file).read_text()), **change}
    (tmp_path / file).write_text(change if isinstance(change, str) else json.dumps(change))
    with pytest.raises(ValueError, match=sentence) as refusal:
        Embedder(tmp_path)
    assert Path(file).name in str(refusal.value) or "2_Dense" in str(refusal.value)
    assert len(str(refusal.value)) < 600
