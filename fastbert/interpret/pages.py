"""An explained text to look at: a page of HTML without anything from elsewhere, a picture, a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from fastbert.files import json_lines, write_text
from fastbert.interpret.attributions import Attribution
from fastbert.train.plot import figure, save

# red, green and blue of words that speak for the target, and against it
FOR, AGAINST = (0, 114, 178), (213, 94, 0)
_STYLE = """
body { font-family: sans-serif; line-height: 1.9; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #111;
       background: #fff; }
.text { font-size: 1.2em; white-space: pre-wrap; }
.text span { border-radius: 0.2em; padding: 0.1em 0; }
td, th { padding: 0 0.8em; text-align: left; line-height: 1.4; }
td + td { text-align: right; font-variant-numeric: tabular-nums; }
svg { display: block; margin: 0.5em 0 1.5em; }
svg text { font-size: 12px; }
"""
# an attention weight below this is no line
_FAINT = 0.02
_HEAD_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#999900",
)

# {layer: weights (heads, S, S)} of the tokens
Heads = Mapping[int, Tensor]


def rgb(score: float, most: float) -> tuple[int, int, int]:
    """A word's background: white for 0, the full colour for a score of the size `most`."""
    share = 0.75 * min(abs(score) / most, 1.0) if most else 0.0
    colour = FOR if score > 0 else AGAINST
    r, g, b = (round(255 + (c - 255) * share) for c in colour)
    return r, g, b


def summary(a: Attribution) -> str:
    """What is explained, by which method, in one line."""
    # of Shapley values the sum is right by construction
    shown = a.error is not None and a.method == "integrated"
    error = f", completeness error {a.error:.2%}" if shown else ""
    return f"{a.target}: {a.value:.4f}, by {a.method}{error}"


def write_html(a: Attribution, path: str | Path, heads: Heads | None = None) -> None:
    """Write a page: the texts with coloured words, a table of scores, and with `heads` lines of attention."""
    words = a.of_words()
    most = max((abs(score) for *_, score in words), default=0.0)
    rows = "\n".join(
        f"<tr><td>{escape(word)}</td><td>{score:+.4f}</td></tr>" for word, _, _, score in words
    )
    drawn = "".join(_head_view(a.tokens, layer, maps) for layer, maps in (heads or {}).items())
    texts = "\n".join(f'<p class="text">{_coloured(a, n, most)}</p>' for n in range(len(a.texts)))
    title = escape(summary(a))
    write_text(
        Path(path),
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{texts}\n"
        "<p>Blue words speak for the target, orange ones against it.</p>\n"
        f"<table>\n<tr><th>word</th><th>score</th></tr>\n{rows}\n</table>\n{drawn}</body>\n</html>\n",
    )


def _coloured(a: Attribution, number: int, most: float) -> str:
    """A text as HTML, its words on their colours."""
    text, done, parts = a.texts[number], 0, []
    for _, owner, (start, end), score in a.of_words():
        if owner != number or start < done:
            continue
        r, g, b = rgb(score, most)
        parts += [
            escape(text[done:start]),
            f'<span style="background: rgb({r}, {g}, {b})" title="{score:+.4f}">{escape(text[start:end])}</span>',
        ]
        done = end
    return "".join([*parts, escape(text[done:])])


def _head_view(tokens: Sequence[str], layer: int, maps: Tensor) -> str:
    """A drawing of lines from each token, on the left, to those it attends to; a colour per head."""
    height, left, right = 18, 150, 350
    lines = []
    for h, weights in enumerate(maps.tolist()):
        colour = _HEAD_COLOURS[h % len(_HEAD_COLOURS)]
        for i, row in enumerate(weights):
            lines += [
                f'<line x1="{left}" y1="{height * i + 10}" x2="{right}" y2="{height * j + 10}" stroke="{colour}" '
                f'stroke-opacity="{w:.2f}"/>'
                for j, w in enumerate(row)
                if w >= _FAINT
            ]
    labels = [
        f'<text x="{left - 6}" y="{height * i + 14}" text-anchor="end">{escape(token)}</text>'
        f'<text x="{right + 6}" y="{height * i + 14}">{escape(token)}</text>'
        for i, token in enumerate(tokens)
    ]
    size = f'width="500" height="{height * len(tokens) + 10}"'
    return f"<h2>Attention of layer {layer}</h2>\n<svg {size}>\n" + "\n".join(
        [*lines, *labels, "</svg>\n"]
    )


def write_png(a: Attribution, path: str | Path, heads: Heads | None = None) -> None:
    """Write a picture: a bar for each word, and with `heads` a map of weights for each layer and head."""
    words = a.of_words()
    panels = [
        (f"layer {n}, head {h}", m) for n, maps in (heads or {}).items() for h, m in enumerate(maps)
    ]
    rows, columns = -(-len(panels) // 4), 4 if panels else 1
    bars, side = max(2.5, 0.25 * len(words) + 1.0), 3.5
    picture = figure(4.0 * columns if panels else 7.0, bars + side * rows)
    grid = picture.add_gridspec(1 + rows, columns, height_ratios=[bars, *[side] * rows])
    axes = picture.add_subplot(grid[0, :], title=_plain(summary(a)), xlabel="score")
    colours = [tuple(c / 255 for c in (FOR if score > 0 else AGAINST)) for *_, score in words]
    axes.barh(range(len(words)), [score for *_, score in words], color=colours)
    axes.set_yticks(range(len(words)), [_plain(word) for word, *_ in words])
    axes.invert_yaxis()
    axes.axvline(0.0, color="black", linewidth=0.8)
    names = [_plain(token) for token in a.tokens]
    for number, (title, m) in enumerate(panels):
        axes = picture.add_subplot(grid[1 + number // 4, number % 4], title=title)
        axes.imshow(m.numpy(), cmap="Blues", vmin=0.0)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    save(picture, Path(path))


def _plain(text: str) -> str:
    """The text without matplotlib's sign of formulas."""
    return text.replace("$", r"\$")


def as_json(a: Attribution) -> str:
    """The attribution as JSON: its words and its tokens, with scores."""
    words = [
        {"word": word, "text": owner, "start": start, "end": end, "score": score}
        for word, owner, (start, end), score in a.of_words()
    ]
    tokens = [
        {"token": token, "score": score}
        for token, score in zip(a.tokens, a.scores.tolist(), strict=True)
    ]
    facts = {"target": a.target, "method": a.method, "value": a.value, "error": a.error}
    return json_lines([{**facts, "texts": a.texts, "words": words, "tokens": tokens}])


def table(a: Attribution) -> Any:
    """A table for rich: words on their colours, and their scores."""
    from rich.table import Table
    from rich.text import Text

    words = a.of_words()
    most = max((abs(score) for *_, score in words), default=0.0)
    found = Table()
    found.add_column("word")
    found.add_column("score", justify="right")
    for word, _, _, score in words:
        found.add_row(
            Text(word, style="black on rgb({},{},{})".format(*rgb(score, most))), f"{score:+.4f}"
        )
    return found
