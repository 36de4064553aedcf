"""Debian's installation guide in 19 languages as texts: `python guide.py FOLDER-OF-THE-GUIDE OUT`.

OUT/train/LANGUAGE.txt has the pages: each paragraph of another language is followed by the English one. OUT/test has
the paragraphs of every eighth page, line by line the same ones in all languages.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """The texts of the <p> of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.inside = 0
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "p":
            self.inside += 1
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside -= tag == "p"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[-1] += data


def read(file: Path) -> list[str]:
    """The paragraphs of a page; none where the language lacks it."""
    texts = Page(file).texts if file.is_file() else []
    return [" ".join(text.split()) for text in texts if text.strip()]


def main(guide: Path, out: Path) -> None:
    languages = sorted(folder.name for folder in guide.iterdir() if folder.is_dir())
    names = sorted(file.name for file in (guide / "en").glob("*.html"))
    pages = {n: {code: read(guide / code / n) for code in languages} for n in names}
    for part in ("train", "test"):
        (out / part).mkdir(parents=True, exist_ok=True)
    aligned = [n for n in names[::8] if len({len(texts) for texts in pages[n].values()}) == 1]
    for code in languages:
        documents = []
        for name in sorted({*names} - {*names[::8]}):
            texts, english = pages[name][code], pages[name]["en"]
            if code != "en" and len(texts) == len(english):
                texts = [text for pair in zip(texts, english, strict=True) for text in pair]
            documents.append("\n".join(texts))
        (out / "train" / f"{code}.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
        lines = [text for name in aligned for text in pages[name][code]]
        (out / "test" / f"{code}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
