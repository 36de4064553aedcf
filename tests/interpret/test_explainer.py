"""fastbert explain-text and what it writes, on models that are trained in seconds."""

import json
from html.parser import HTMLParser

import pytest
import tiny_tasks
import torch
from typer.testing import CliRunner

from fastbert.bert import BertConfig, BertForMaskedLM
from fastbert.cli import app as cli
from fastbert.data import load_tokenizer, save_tokenizer, train_tokenizer
from fastbert.finetune import finetune
from fastbert.interpret import Explainer, write_html, write_png
from fastbert.interpret.rollout import heads_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{task: the folder of a run}, a masked LM and an encoder."""
    folder = tmp_path_factory.mktemp("runs")
    base = tiny_tasks.base_model(folder / "encoder")
    for task, rows in tiny_tasks.ROWS.items():
        data = tiny_tasks.write_jsonl(folder / f"{task}.jsonl", rows(120))
        config = tiny_tasks.tiny_config(task, base, sources=[str(data)])
        finetune(config, folder / task, quiet=True)
    torch.manual_seed(0)
    masked = BertForMaskedLM(BertConfig.from_file(base))
    masked.save_pretrained(folder / "mask")
    save_tokenizer(load_tokenizer(base), folder / "mask")
    return folder


def test_integrated_gradients_of_a_trained_classifier_add_up(runs):
    explainer = Explainer(runs / "classify")
    found = explainer("the film was great with a man .")
    assert found.target == "good"
    assert found.error < 0.01
    words = {word: score for word, *_, score in found.of_words()}
    assert max(words, key=words.get) == "great"
    poor = explainer("the film was great .", target="bad", method="shap")
    assert min(poor.of_words(), key=lambda w: w[-1])[0] == "great"


def test_pieces_are_joined_and_words_have_their_places(runs):
    text = "The man met Anna Unkindly in Rome."
    found = Explainer(runs / "tag")(text, method="gradient")
    assert found.target == "B-PER at Anna"
    words = found.of_words()
    assert [w for w, *_ in words] == ["The", "man", "met", "Anna", "Unkindly", "in", "Rome", "."]
    assert all(text[a:b] == word for word, _, (a, b), _ in words)
    other = Explainer(runs / "tag")(text, method="permutation", at=6, target="B-LOC")
    assert other.target == "B-LOC at Rome"


def test_answers_masks_and_pairs(runs):
    asked = Explainer(runs / "answer")("where was the man", "the man met Karl in Oslo .")
    assert asked.target.startswith("span of ")
    assert {owner for _, owner, *_ in asked.of_words()} == {0, 1}
    masked = Explainer(runs / "mask")("the [MASK] was fine .", target="film", method="permutation")
    assert masked.target == "film"
    assert masked.scores[2] == 0.0
    alike = Explainer(runs / "encoder")("the film was fine", "a film was great", method="shap")
    assert alike.target == "similarity"
    assert alike.error < 1e-4
    assert [owner for _, owner, *_ in alike.of_words()] == [0] * 4 + [1] * 4


class Page(HTMLParser):
    """The tags and the visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def test_a_page_escapes_its_text_and_needs_nothing_else(runs, tmp_path):
    explainer = Explainer(runs / "classify")
    text = '<script>alert("a film")</script> was great & fine <img src=x>'
    q = explainer.question(text)
    found = explainer(text, method="gradient")
    write_html(found, tmp_path / "page.html", heads_of(q, [1]))
    page = Page((tmp_path / "page.html").read_text())
    assert text in page.text
    assert not {"script", "img", "link", "iframe"} & page.tags
    assert not {"src", "href", "onload"} & {name for name, _ in page.attributes}
    assert {"svg", "line", "span", "table"} <= page.tags
    write_png(found, tmp_path / "page.png", heads_of(q, [0]))
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def run(*words):
    return CliRunner().invoke(cli.app, ["explain-text", *map(str, words)])


def test_the_command(runs, tmp_path):
    result = run(
        runs / "classify", "the film was great", "--out", tmp_path / "a.html", "--attention", 0
    )
    assert result.exit_code == 0, result.output
    assert "great" in result.output
    assert "completeness error" in " ".join(result.output.split())
    assert "Attention of layer 0" in (tmp_path / "a.html").read_text()
    result = run(
        *(runs / "encoder", "a film was great", "the film was fine", "--method", "permutation"),
        *("--samples", 3, "--seed", 1, "--absent", "remove", "--out", tmp_path / "a.json"),
    )
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "a.json").read_text())
    # the sum of Shapley values is right by construction: no error is printed
    assert "completeness" not in result.output
    assert content["target"] == "similarity"
    assert len(content["words"]) == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("classify", "a film", "--target", "ugly"), "no class of the model"),
        (("classify", "a film", "--target", "7"), "no class of the model"),
        # `random` is for comparisons alone
        (("classify", "a film", "--method", "lrp"), "choose gradient,.* gradient-rollout$"),
        (
            ("classify", "a film", "--method", "shap", "--steps", "5"),
            "no option of the method shap",
        ),
        (("classify", "a film", "--at", "1"), "at is 1"),
        (("classify", "a film", "--out", "a.txt"), "choose one of .html"),
        (("classify", "a film", "--attention", "0"), "pass --out"),
        (("classify", "a film", "--out", "{}/a.html", "--attention", "2"), "no layer 2"),
        (("classify", " "), "it must be a text"),
        (("classify", "film " * 70), "72 tokens and the model takes 48"),
        (("tag", "anna saw rome", "--at", "3"), "no word 3"),
        (("answer", "where"), "pass also the text"),
        (("mask", "a film"), "there is no \\[MASK\\]"),
        (("mask", "a [MASK]", "--target", "zebra"), "no token of the model"),
        (("mask", "a [MASK]", "--at", "1"), "no \\[MASK\\] 1"),
        (("encoder", "a film"), "takes two texts"),
        (("encoder", "a film", "a man", "--target", "x"), "has one, similarity"),
        (("nothing", "a film"), "there is no directory"),
    ],
)
def test_bad_input_gets_a_sentence_before_anything_is_written(words, said, runs, tmp_path):
    name, *rest = (w.format(tmp_path) for w in words)
    result = run(runs / name, *rest)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        raise result.exception
    assert not [*tmp_path.iterdir()]


def test_a_byte_level_masked_model(tmp_path):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the state of the union"] * 9, "bpe", 300)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(
        model_type="roberta", vocab_size=320, pad_token_id=1, type_vocab_size=1, **sizes
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    found = Explainer(tmp_path)("the [MASK] of the union", target="union", method="gradient")
    assert found.target == "union"
    words = [word.strip() for word, *_ in found.of_words()]
    assert [words[0], *words[2:]] == ["the", "of", "the", "union"]


def test_a_gpt_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'
    )
    with pytest.raises(ValueError, match="holds a GPT, whose next words are not explained"):
        Explainer(tmp_path)
