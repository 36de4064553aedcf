"""The HTML page of an explained text in a real browser, Debian's chromium, where it is installed."""

import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from fastbert.interpret import Attribution, write_html
from fastbert.interpret.pages import rgb

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="the browser needs `apt-get install chromium`"),
]
TEXT = "Ein schönes <b>Bild</b> & 映画"
WORDS = ["Ein", "schönes", "<b>Bild</b>", "&", "映画"]
SCORES = [0.0, 2.0, -1.0, 0.25, 0.5]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a text with markup and Chinese in it, and one layer of two heads."""
    starts = [TEXT.index(word) for word in WORDS]
    offsets = tuple((s, s + len(w)) for s, w in zip(starts, WORDS, strict=True))
    n = len(WORDS)
    found = Attribution(
        tokens=tuple(WORDS),
        offsets=offsets,
        owners=(0,) * n,
        words=tuple(range(n)),
        scores=torch.tensor(SCORES),
        target="logit of positive",
        method="integrated",
        value=1.5,
        error=0.01,
        texts=(TEXT,),
    )
    path = tmp_path_factory.mktemp("page") / "why.html"
    write_html(found, path, {3: torch.full((2, n, n), 1 / n)})
    return path


def chromium(page, *arguments: str) -> str:
    """The output of a headless browser that may reach nothing but the page."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,900"]
    command += [
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={page.parent / 'profile'}",
    ]
    run = subprocess.run(
        [*command, *arguments, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return run.stdout


def test_the_browser_reads_every_word_and_line(page):
    dom = chromium(page, "--dump-dom")
    # the text's own markup is text
    assert "&lt;b&gt;Bild&lt;/b&gt;</span>" in dom
    assert "<b>" not in dom
    assert dom.count("<tr>") == 1 + len(WORDS)
    assert "映画" in dom
    assert dom.count("<line ") == 2 * len(WORDS) ** 2
    for element in ("<script", "<link", "src="):
        assert element not in dom


def test_words_have_the_colours_of_their_scores(page):
    picture = page.parent / "page.png"
    chromium(page, f"--screenshot={picture}")
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    for score in (2.0, -1.0):
        painted = int((pixels == rgb(score, 2.0)).all(1).sum())
        # the background of a word of some letters, 20 pixels high
        assert painted > 300, (score, painted)
