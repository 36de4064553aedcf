"""`fastbert trim` and `fastbert quantize` on the folder of a GPT: what they write goes on with texts."""

import pytest
import torch
from tokenizers import Tokenizer, models

from fastbert.bert import BertConfig, GPTForCausalLM
from fastbert.cli.app import main
from fastbert.data import load_tokenizer, save_tokenizer, train_tokenizer
from fastbert.infer import Embedder, Writer

TEXT = "the cat sat on the mat and the dog ran away"


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path):
    """A random GPT with a WordPiece tokenizer of more pieces than TEXT has."""
    tokenizer = train_tokenizer(
        [TEXT, "a house on the hill is old and new"], "wordpiece", 120, min_frequency=1
    )
    torch.manual_seed(0)
    sizes = {"vocab_size": 130, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    config = BertConfig(model_type="gpt2", num_attention_heads=2, **sizes)
    config.tie_word_embeddings = request.param
    GPTForCausalLM(config).save_pretrained(tmp_path / "gpt")
    save_tokenizer(tokenizer, tmp_path / "gpt")
    return tmp_path / "gpt"


def command(*words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert not stop.value.code


def test_trim_keeps_the_scores_of_kept_pieces(folder, tmp_path):
    (tmp_path / "texts.txt").write_text(TEXT)
    command("trim", folder, tmp_path / "small", "--texts", tmp_path / "texts.txt")
    tokenizers = [load_tokenizer(f) for f in (folder, tmp_path / "small")]
    encodings = [t.encode(TEXT, add_special_tokens=False) for t in tokenizers]
    assert encodings[0].tokens == encodings[1].tokens
    gpts = [GPTForCausalLM.from_pretrained(f).eval() for f in (folder, tmp_path / "small")]
    with torch.no_grad():
        before, after = (
            m(torch.tensor([e.ids])).logits[0] for m, e in zip(gpts, encodings, strict=True)
        )
    pieces = sorted(tokenizers[1].get_vocab().items(), key=lambda item: item[1])
    kept = [tokenizers[0].token_to_id(piece) for piece, _ in pieces]
    assert len(kept) == after.shape[1] < before.shape[1]
    torch.testing.assert_close(after, before[:, kept], rtol=1e-6, atol=1e-6)


def test_a_folder_of_int8_weights_has_its_head(folder, tmp_path):
    command("quantize", folder, tmp_path / "int8")
    assert Writer(tmp_path / "int8")(["the cat"], 5) == Writer(folder, int8=True)(["the cat"], 5)


def test_vectors_of_a_gpt_without_special_tokens_are_refused_with_a_remedy(folder):
    assert Embedder(folder)(["the cat"]).shape == (1, 32)
    plain = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    plain.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"holds a GPT and .*: take an encoder for vectors"):
        Embedder(folder)
