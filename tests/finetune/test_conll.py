"""CoNLL files as they are in the wild: comments, blanks and tabs, numbered words; and the files of predictions."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastbert.files import split_lines
from fastbert.finetune import conll

WANTED = [
    {"tokens": ["John", "Smith", "in", "London"], "tags": ["B-PER", "I-PER", "O", "B-LOC"]},
    {"tokens": ["Paris", "."], "tags": ["B-LOC", "O"]},
]


def read(text):
    return [values for _, values in conll.sentences(split_lines(text), "a.conll")]


def tried(function, *arguments):
    """(the result, None), or (None, the sentence of a refusal)."""
    try:
        return function(*arguments), None
    except ValueError as error:
        return None, str(error)


def table(head, separator=" ", middle=(), end=""):
    """The wanted sentences, each below its own lines of `head`."""
    return "\n".join(
        head.format(i)
        + "".join(
            separator.join([word, *middle, tag]) + end + "\n"
            for word, tag in zip(w["tokens"], w["tags"], strict=True)
        )
        for i, w in enumerate(WANTED)
    )


@pytest.mark.parametrize(
    "text",
    [
        table("-DOCSTART- -X- O\n\n"),
        table("-DOCSTART-\tO\n\n", "\t"),
        table("", end="  "),
        table("", end="\t"),
        table("", "\t", end=" \t "),
        table("", "   ", ("_", "_")),
        table("# id 8f2e{} domain=en\n", " ", ("_", "_")),
        table("# id 8f2e{}\tdomain=en\n", " ", ("_", "_")),
        table("# sent_id = {}\n", "\t", ("_", "_")),
        table("# sent_id = {}\n", " ", ("_", "_")),
        table("# sent_id = {}\n# text = John and more O\n", "\t"),
        table("#sent_id={}\n# newpar\n", " ", ("_",)).replace("#sent_id=", "#sent_id = "),
        table("# {}\n"),
        table("###C: newpar\n## {} more words\n"),
        table("").replace("\n\n", "\n \t \n\n"),
    ],
)
def test_layouts_of_words_and_tags(text):
    assert read(text) == WANTED
    assert read(text.replace("\n", "\r\n")) == WANTED


def test_a_hash_is_a_word_too():
    text = "# O\n1 O\n\n#film B-X\n# O\n\n# #\n$ $\n\n#best HT\n"
    assert [values["tokens"] for values in read(text)] == [
        ["#", "1"],
        ["#film", "#"],
        ["#", "$"],
        ["#best"],
    ]
    assert read("#\n#a\nb\n") == [{"tokens": ["#", "#a", "b"]}]


def test_other_blanks_are_part_of_a_word():
    words = ["10\u00a0000", "東京\u3000都", "a\u2028b", "\u00a0", "x\x0cy", "New York"]
    text = "".join(f"{word}\tO\n" for word in words)
    assert read(text) == [{"tokens": words, "tags": ["O"] * 6}]
    assert read(text.replace("New York", "York").replace("\t", " "))[0]["tokens"][:5] == words[:5]


CONLL_U = """# sent_id = 1
# text = Vámonos al mar
1-2\tVámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tVamos\tir\tVERB\t_\tMood=Imp\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\t_\t_\t1\tobj\t_\t_
2.1\tx\ty\tNOUN\t_\t_\t_\t_\t_\t_
3\tal mar\tmar\tNOUN\t_\t_\t1\tobl\t_\tSpaceAfter=No

# text = Hola
1\tHola\thola\tINTJ\t_\t_\t0\troot\t_\t_
"""
GERMEVAL = """#\thttp://de.wikipedia.org/wiki/Manfred_Korfmann [2009-10-17]
1\tAufgrund\tO\tO
2\tTroia\tB-LOC\tB-PER

#\thttp://de.wikipedia.org/wiki/X [2009-10-17]
1\tBerlin\tB-LOC\tO
"""


def test_numbered_words():
    words, hello = read(CONLL_U)
    assert words == {"tokens": ["Vamos", "nos", "al mar"], "tags": ["VERB", "PRON", "NOUN"]}
    assert hello == {"tokens": ["Hola"], "tags": ["INTJ"]}
    first, second = read(GERMEVAL)
    assert first == {"tokens": ["Aufgrund", "Troia"], "tags": ["O", "B-LOC"]}
    assert second == {"tokens": ["Berlin"], "tags": ["B-LOC"]}
    # no tags are known where all are _
    unknown = CONLL_U.replace("VERB", "_").replace("PRON", "_").replace("NOUN", "_")
    assert read(unknown.replace("INTJ", "_"))[1] == {"tokens": ["Hola"]}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("One O\nTwo\n", "a.conll:2 has 1 columns and the lines before it 2: repair it"),
        ("One\tO\n\tO\n", "a.conll:2 has no word in column 1: repair it"),
        ("1\ta" + "\t_" * 8 + "\n2\t " + "\t_" * 8, "a.conll:2 has no word in column 2"),
        ("One O\n#x\n", "a.conll:2 has 1 columns"),
        (
            "A x y O\n# text = B\nC x y O\n",
            "a.conll:2 is a comment inside a sentence, '# text = B'",
        ),
        ("#begin document (a); part 000\na 0 0 x O\n", "a.conll:1 is a line of CoNLL-2012"),
        (
            "1 One O\n2 Two B-X\n",
            "a.conll has numbers in its first column and is neither CoNLL-U nor",
        ),
        ("x " * 50_000 + "\ny O\n", "a.conll:2 has 2 columns"),
        ("A O\n# text = " + "B " * 50_000, "is a comment inside a sentence, '# text = B B"),
    ],
)
def test_what_is_refused(text, sentence):
    with pytest.raises(ValueError, match=r"a\.conll") as caught:
        read(text)
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 300


letters = st.sampled_from(" \t\r\n\u00a0\u3000\u2028\x85\ufeff#=-_.1aé")
word = st.one_of(
    st.text(letters, min_size=1, max_size=4),
    st.sampled_from(["-DOCSTART-", "#", "# a = ", "#begin"]),
)
pair = st.tuples(word, st.sampled_from(["O", "B-X", "_", "B-a b", "#"]))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(pair, min_size=1, max_size=3), min_size=1, max_size=3))
@example([[("New York", "B-X"), ("is", "O")]])
@example([[("a\tb", "O")]])
@example([[("x", "O")], [("-DOCSTART-", "O")]])
@example([[("\ufeffx", "O")]])
@example([[("#", "O"), ("1", "O")], [("#", "B-X")]])
def test_predictions_are_read_back_or_refused(rows):
    sentences = [tuple(zip(*row, strict=True)) for row in rows]
    text, refusal = tried(conll.encoded, sentences)
    if refusal:
        assert refusal.endswith("choose .jsonl or .csv")
        assert len(refusal) < 300
        # words of letters and digits are never refused
        assert not all(w.isalnum() and t in ("O", "B-X") for row in rows for w, t in row)
        return
    # also by a reader of another file, which has other tags
    assert read(text) == [{"tokens": list(w), "tags": list(t)} for w, t in sentences]


def test_a_refusal_names_the_word():
    rows = [(["a", "b\tc"], ["O", "B-X"])]
    with pytest.raises(
        ValueError, match=r"can't hold the word .* of sentence 1 with the tag 'B-X'"
    ):
        conll.encoded(rows)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab#=_-1. \t\u00a0"), max_size=12), max_size=8))
def test_any_lines_are_read_or_refused_in_a_sentence(lines):
    found, refusal = tried(lambda: list(conll.sentences(lines, "a.conll")))
    assert len(refusal or "") < 300
    for number, values in found or []:
        assert lines[number - 1].strip(" \t")
        assert all(values["tokens"])
        assert len(values.get("tags", values["tokens"])) == len(values["tokens"])
