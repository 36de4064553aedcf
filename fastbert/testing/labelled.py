"""Real labelled data for tests and benchmarks, as files that `fastbert finetune` reads."""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path

import numpy as np

from fastbert.data import rng
from fastbert.data.fetch import fetch
from fastbert.files import split_lines

_ARCHIVE, _RATINGS = "hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt"
# sentences rated nearer to 0 are neither positive nor negative; ratings go from -4 to 4
_NEUTRAL = 0.5
MOVIE_FLOOR = 0.806


def movie_sentences(folder: Path) -> tuple[Path, Path]:
    """train.csv and test.csv (80/20) of movie sentences with columns text and label, positive or negative.

    10,604 sentences rated by people, from vaderSentiment 0.5 (Hutto and Gilbert 2014, MIT). MOVIE_FLOOR is the accuracy
    of tf-idf and a logistic regression.
    """
    with tarfile.open(fetch("vader-sentiment") / _ARCHIVE) as archive:
        file = archive.extractfile(f"hutto_ICWSM_2014/{_RATINGS}")
        assert file is not None
        lines = split_lines(file.read().decode("utf-8", errors="replace"))
    rows = []
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= _NEUTRAL:
            rows.append((text.strip(), "positive" if float(rating) > 0 else "negative"))
    order = rng.bits(rng.derive(0), np.arange(len(rows))).argsort(kind="stable").tolist()
    cut = len(rows) // 5
    paths = folder / "test.csv", folder / "train.csv"
    for path, numbers in zip(paths, (order[:cut], order[cut:]), strict=True):
        path.write_text(_csv([rows[i] for i in numbers]), encoding="utf-8")
    return paths[1], paths[0]


def _csv(rows: list[tuple[str, str]]) -> str:
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["text", "label"])
    table.writerows(rows)
    return text.getvalue()


def conll2003() -> tuple[Path, Path, Path]:
    """The training, validation and test files of CoNLL-2003 (Tjong Kim Sang and De Meulder); research only."""
    folder = fetch("conll2003")
    return folder / "train.txt", folder / "valid.txt", folder / "test.txt"
