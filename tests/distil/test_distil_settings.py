"""The command of distillation, and settings that can not be."""

import json
import shutil

import pytest
import tiny_tasks
from tiny_distil import distilled, settings
from typer.testing import CliRunner

from fastbert.bert import BertConfig, BertForSequenceClassification
from fastbert.cli.app import app, main
from fastbert.distil import DistilConfig, distil
from fastbert.distil.models import Models, chosen_layers, filled_in
from fastbert.train.settings import with_whole_paths


def test_the_command(teachers, corpus, tmp_path):
    data = tiny_tasks.write_jsonl(tmp_path / "train.jsonl", tiny_tasks.texts(64))
    flags = ["--student", "1x32", "--steps", "2", "--threads", "1", "--backend", "torch"]
    arguments = [
        "distill",
        str(teachers("classify")),
        str(data),
        *flags,
        "--out",
        str(tmp_path / "run"),
    ]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "teacher" in found.output
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files >= {"model", "config.toml", "metrics.jsonl", "result.json", "curves.png"}
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["parameters"]["student"] < result["parameters"]["teacher"]


REFUSED = {
    "no student": ({"student": None}, "pass its sizes"),
    "student of no sizes": ({"student": "small"}, "LAYERSxHIDDEN"),
    "more layers": ({"student": "5x32"}, "--start fresh"),
    "heads": ({"student": "2x32x5"}, "divisible"),
    "a loss that there is not": ({"losses": "soft,mlm"}, "write one of soft"),
    "a weight that is none": ({"losses": "soft:-1"}, "above 0"),
    "a loss of other data": ({"losses": "vectors"}, "data is labelled"),
    "cosine of another width": ({"student": "2x16", "losses": "cosine"}, "equal widths"),
    "attention of other heads": ({"student": "2x16x1", "losses": "attention"}, "equal numbers"),
    "relation heads": ({"losses": "relations", "relation_heads": 3}, "must divide"),
    "a layer that there is not": ({"losses": "relations", "teacher_layer": 4}, "layers 0 to 3"),
    "layers": ({"layers": "0,9"}, "name 2 of"),
    "tokens of a batch": ({"batch_size": None, "max_tokens": 99}, "pass batch_size"),
    "a teacher that is none": ({"teacher": "nowhere"}, "no directory nowhere"),
    "positions": ({"max_length": 65}, "teacher has 64 positions"),
    "a short length": ({"max_length": 2}, "at least 8"),
    "a temperature": ({"temperature": 1e30}, "at most"),
    "int8 on another backend": ({"int8": True}, "integers need a CPU"),
    "layers of fresh weights": ({"layers": "0,1", "start": "fresh"}, "leave one of them out"),
    "standard input": ({"sources": ["-"]}, "name a file"),
    "a metric": ({"metric": "exact"}, "accuracy, f1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_can_not_be(teachers, tmp_path, name):
    changed, message = REFUSED[name]
    given = settings(teachers("classify"), sources=[str(tmp_path)]) | changed
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        distil(DistilConfig(**given), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_student_of_another_vocabulary(teachers, corpus, tmp_path):
    other = BertForSequenceClassification(
        BertConfig(
            vocab_size=31,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
        )
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="need one vocabulary"):
        distilled(teachers, corpus, "labelled", tmp_path / "run", student=str(tmp_path / "other"))
    # as many tokens, but others
    folder = shutil.copytree(teachers("classify") / "model", tmp_path / "same_size")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"lima"', '"bonn"'))
    with pytest.raises(ValueError, match=r"another vocabulary .*bonn"):
        distilled(teachers, corpus, "labelled", tmp_path / "run", student=str(folder))


def test_other_labels_than_the_teachers(teachers, tmp_path):
    rows = [{**row, "label": f"very {row['label']}"} for row in tiny_tasks.texts(32)]
    with pytest.raises(ValueError, match="pass data with the teacher's labels"):
        distil(
            DistilConfig(**settings(teachers("classify"))), tmp_path / "run", train=rows, quiet=True
        )


def test_the_kind_of_data_follows_from_the_teacher(teachers):
    for name, kind in {"classify": "labelled", "text": "text", "sentences": "sentences"}.items():
        config = DistilConfig(**settings(teachers(name)))
        assert filled_in(config, Models.of(config)).data == kind
    with pytest.raises(SystemExit):
        main(["distill", "nowhere", "x", "--student", "1x8", "--out", "run"])


def test_a_run_that_can_not_be_leaves_nothing(teachers, corpus, tmp_path):
    """Text is not tokenised for a student of another vocabulary, and OUT is no folder of a model."""
    folder, _ = corpus
    other = shutil.copytree(teachers("text"), tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"lima"', '"bonn"'))
    given = settings(teachers("text"), sources=[str(folder)])
    for changed, out, message in (
        ({"student": str(other)}, "run", "another vocabulary"),
        ({"teacher": str(other)}, "other", "teacher's folder"),
        ({"student": str(other)}, "other", "student's folder"),
        ({"teacher": str(teachers("classify")), "data": "text"}, "run", "without the masked LM"),
        ({"metric": "f1"}, "run", "leave it out, the data is text"),
    ):
        files = sorted(other.iterdir())
        with pytest.raises(ValueError, match=message):
            distil(DistilConfig(**given | changed), tmp_path / out, quiet=True)
        assert not (tmp_path / "run").exists()
        assert sorted(other.iterdir()) == files


def test_a_map_that_nothing_trains(teachers, corpus, tmp_path):
    with pytest.raises(ValueError, match="add vectors"):
        distilled(teachers, corpus, "sentences", tmp_path / "run", student="2x16", losses="hidden")


def test_a_student_with_fewer_positions(teachers, corpus, tmp_path):
    """max_length is by default the student's; a larger one is refused."""
    base = tiny_tasks.base_model(tmp_path / "short", max_position_embeddings=16)
    config = DistilConfig(**settings(teachers("sentences"), student=str(base)))
    assert filled_in(config, Models.of(config)).max_length == 16
    with pytest.raises(ValueError, match="the student has 16 positions"):
        distilled(teachers, corpus, "sentences", tmp_path / "run", student=str(base))


def test_validation_without_a_sentence(teachers, corpus, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no sentence"):
        distilled(teachers, corpus, "sentences", tmp_path / "run", validation=str(empty))


def test_a_students_folder_is_recorded_as_a_whole_path(tmp_path, monkeypatch):
    """A run is resumed from another working directory too; sizes are no path."""
    monkeypatch.chdir(tmp_path)
    found = with_whole_paths({"student": "small"}, DistilConfig)
    assert found == {"student": str(tmp_path / "small")}
    assert with_whole_paths({"student": "3x384"}, DistilConfig) == {"student": "3x384"}


def test_help_names_all_sizes(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    assert "xHEADSxFFN" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("most", "count", "numbers"),
    [(6, 3, [0, 3, 5]), (12, 6, [0, 2, 4, 7, 9, 11]), (6, 6, [0, 1, 2, 3, 4, 5]), (6, 1, [5])],
)
def test_default_layers_are_evenly_spaced_from_the_first_to_the_last(most, count, numbers):
    config = DistilConfig(teacher="t", student=f"{count}x32")
    assert chosen_layers(config, BertConfig(num_hidden_layers=most), count) == numbers
