"""`fastbert fill-mask`, `fastbert embed` and `fastbert generate`: a trained model on text and images."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastbert import files
from fastbert.cli.settings import ready
from fastbert.files import LINES, existing, quoted
from fastbert.finetune.config import trained_model

if TYPE_CHECKING:
    import torch

FORMATS = (".npy", ".safetensors", ".jsonl")

Int8 = Annotated[
    bool, typer.Option("--int8", help="quantise the encoder: faster, and a little less exact")
]
Model = Annotated[Path, typer.Argument(help="model folder, or OUT of a run")]
Texts = Annotated[
    list[str] | None, typer.Argument(help="text; without any, lines of standard input")
]

Images = Annotated[
    list[Path] | None,
    typer.Option(help="two towers: image file, or folder of images; may be repeated"),
]
Prompt = Annotated[
    str | None,
    typer.Option(help="name of a prompt in config_sentence_transformers.json; default its own"),
]


def fill_mask(
    model: Model,
    texts: Texts = None,
    top: Annotated[int, typer.Option(help="words to show for each [MASK]")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print a line of JSON per text")] = False,
    int8: Int8 = False,
) -> None:
    """Print the most probable words for every [MASK] in a text.

    Example: fastbert fill-mask runs/a/model "The state of the [MASK] is strong."
    """
    model = trained_model(model)
    ready()
    from fastbert.infer import Filler

    filler = Filler(model, int8)
    results = [(text, filler(text, top)) for text in read_lines(texts)]
    if as_json:
        for text, masks in results:
            words = [[{"word": w, "probability": p} for w, p in mask] for mask in masks]
            typer.echo(files.json_lines([{"text": text, "masks": words}]), nl=False)
        return
    from rich.console import Console

    console = Console(highlight=False)
    for text, masks in results:
        console.print(text, markup=False)
        console.print(fill_table(masks))


def fill_table(masks: list[list[tuple[str, float]]]) -> Any:
    """A table with a column of words and one of probabilities for every mask."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for i in range(len(masks)):
        table.add_column(f"[MASK] {i + 1}" if len(masks) > 1 else "[MASK]")
        table.add_column("probability", justify="right")
    for row in zip(*masks, strict=True):
        table.add_row(*(cell for word, p in row for cell in (Text(word), f"{p:.1%}")))
    return table


def embed(
    model: Model,
    texts: Texts = None,
    file: Annotated[
        Path | None, typer.Option(help="text file or .gz with a text a line, - for standard input")
    ] = None,
    images: Images = None,
    out: Annotated[
        Path | None, typer.Option(help=".npy, .safetensors or .jsonl; default JSON lines printed")
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(
            help="mean of all tokens, or cls, the first one; default what modules.json says, or mean"
        ),
    ] = None,
    prompt: Prompt = None,
    batch_size: Annotated[int, typer.Option(help="texts encoded at once")] = 32,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="make vectors of length 1")
    ] = False,
    int8: Int8 = False,
) -> None:
    """Turn texts or images into vectors, in their order; a text beyond the model's length is cut, with a note.

    A folder of sentence-transformers gives that library's vectors: its pooling, layers, prompts and length limit
    are read. Two towers give vectors of length 1 of texts and of images, in one space.

    Example: fastbert embed runs/a/model --file sentences.txt --out vectors.npy
    """
    if out is not None and out.suffix not in FORMATS:
        raise ValueError(
            f"--out {out} ends in {quoted(out.suffix)}: choose one of {', '.join(FORMATS)}"
        )
    if texts and file is not None:
        raise ValueError("texts and --file are both given: pass one of them")
    if images and (texts or file is not None):
        raise ValueError("texts and --images are both given: pass one of them")
    model = trained_model(model)
    if file is not None and str(file) != "-":
        existing(file, LINES)
    found = files.images_in(images or [])
    ready()
    from fastbert.models.two_towers import is_two_towers

    if images or is_two_towers(model):
        given = {"pooling": pooling, "prompt": prompt, "int8": int8 or None}
        _embed_both(model, texts, file, found, out, batch_size, given)
        return
    from fastbert.infer import Embedder

    # the model first: its folder is wrong more often than the texts are, and stdin may be slow
    embedder = Embedder(model, pooling, normalize, prompt, int8)
    _embed_texts(embedder, embedder, texts, file, out, batch_size)


def _embed_both(
    model: Path,
    texts: list[str] | None,
    file: Path | None,
    images: list[Path],
    out: Path | None,
    batch_size: int,
    given: dict[str, Any],
) -> None:
    """Turn texts or images into vectors by two towers; `given` are settings that these do not have."""
    from fastbert.infer import ImageTextEmbedder

    embedder = ImageTextEmbedder(model)
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"--{name} is given and {model} has two towers, without it: leave it out"
            )
    if images:
        _show(out, "image", [str(path) for path in images], embedder.images(images, batch_size))
        return
    _embed_texts(embedder, embedder.texts, texts, file, out, batch_size)


def _embed_texts(
    embedder: Any,
    encode: Callable[[list[str], int], torch.Tensor],
    texts: list[str] | None,
    file: Path | None,
    out: Path | None,
    batch_size: int,
) -> None:
    """Show the vectors that `encode`, the embedder or its function of texts, gives."""
    lines = read_lines(texts, file)
    vectors = encode(lines, batch_size)
    if embedder.cut:
        typer.echo(f"{embedder.cut} texts were cut to {embedder.max_length} tokens", err=True)
    _show(out, "text", lines, vectors)


def _show(out: Path | None, name: str, lines: list[str], vectors: torch.Tensor) -> None:
    """Print the vectors as JSON lines with the text or the image's path, or write them to a file."""
    if out is None:
        typer.echo(_json_lines(lines, vectors, name), nl=False)
        return
    files.write_bytes(out, _encoded(out.suffix, lines, vectors, name))
    typer.echo(f"{tuple(vectors.shape)} written to {out}", err=True)


def generate(
    model: Model,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="text to go on with, may be repeated; without any, lines of stdin"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="most tokens that are added to a text")] = 32,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most probable token, 1 draws by the model's own odds")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="draw from so many tokens")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="draw from the fewest tokens with this probability")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print a line of JSON per text")] = False,
    int8: Int8 = False,
) -> None:
    """Go on with texts, by a GPT: one of `fastbert pretrain --recipe gpt`, or a GPT-2 of transformers.

    A prompt's text does not depend on the other prompts. Each is printed with its continuation; a text may have line
    breaks, which --json keeps apart.

    Example: fastbert generate runs/gpt --prompt "The state of" --temperature 0.8 --top-p 0.9
    """
    model = trained_model(model)
    ready()
    from fastbert.infer import Writer
    from fastbert.runners.generate import Sampling

    Sampling(temperature, top_k, top_p)
    writer = Writer(model, int8)
    prompts = read_lines(prompt)
    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    texts = writer(prompts, max_new_tokens, **drawn)
    if as_json:
        rows = ({"prompt": p, "text": text} for p, text in zip(prompts, texts, strict=True))
        typer.echo(files.json_lines(rows), nl=False)
        return
    for text in texts:
        typer.echo(text)


def read_lines(texts: list[str] | None, file: Path | None = None) -> list[str]:
    """The texts: those given, or the lines of a file or of standard input; an empty one is refused."""
    name = "the command line"
    if not texts:
        name = "standard input" if file is None or str(file) == "-" else str(file)
        if name == "standard input" and sys.stdin.isatty():
            raise ValueError("no text is given: pass it in quotes, or pipe lines of it in")
        if name == "standard input":
            texts = list(files.lines_of(sys.stdin.buffer, name))
        else:
            texts = files.read_lines(Path(name))
    if not texts:
        raise ValueError(f"{name} is empty: there is nothing to do")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise ValueError(f"text {number} of {name} is empty: leave it out")
        if reason := files.why_not_unicode(text):
            raise ValueError(f"text {number} of {name} {reason}")
    return texts


def _json_lines(lines: list[str], vectors: torch.Tensor, name: str = "text") -> str:
    rows = zip(lines, vectors.tolist(), strict=True)
    return files.json_lines({name: text, "vector": row} for text, row in rows)


def _encoded(suffix: str, lines: list[str], vectors: torch.Tensor, name: str = "text") -> bytes:
    """The content of a file of vectors (N, C)."""
    if suffix == ".npy":
        import numpy as np

        buffer = io.BytesIO()
        np.save(buffer, vectors.numpy())
        return buffer.getvalue()
    if suffix == ".safetensors":
        from safetensors.torch import save

        return save({"embeddings": vectors})
    return _json_lines(lines, vectors, name).encode()
