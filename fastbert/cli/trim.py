"""`fastbert trim`: a model folder with the vocabulary of some texts, which the other commands read as any other."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from fastbert.cli.quantize import (
    before_and_after,
    copy_files,
    load_own,
    parts_of_folder,
    source_of,
    stored_bytes,
)
from fastbert.cli.settings import ready
from fastbert.files import parse_json, read_text, write_text

# files of the vocabulary in other forms, which would not fit
_OTHER_FORMS = ("vocab.txt", "added_tokens.json", "unigram.json", "*.model")
# what the new tokenizer_config.json has from the old one
_KEPT = (
    "model_max_length",
    "model_input_names",
    "extra_special_tokens",
    "additional_special_tokens",
)


def trim(
    model: Annotated[
        Path, typer.Argument(help="model folder, or OUT of a fine-tuning run; it is not changed")
    ],
    out: Annotated[Path, typer.Argument(help="folder to write, a new one")],
    texts: Annotated[
        list[str], typer.Option(help="text file, folder, .jsonl, .gz, or - for standard input")
    ],
    more: Annotated[list[str] | None, typer.Argument(help="more of --texts")] = None,
    min_count: Annotated[int, typer.Option(help="times that a piece must occur")] = 1,
) -> None:
    """Write a copy of a model folder with the pieces of the vocabulary that some texts use.

    Special tokens and the single characters of kept pieces stay too. Vectors of texts whose pieces are kept do not
    change. fastbert, transformers and sentence-transformers read the copy as any other folder.

    Example: fastbert trim e5/ e5-german/ --texts german.txt english.txt
    """
    if min_count < 1:
        raise ValueError(f"--min-count {min_count}: it must be at least 1")
    folder = source_of(model, out)
    ready()
    import fastbert
    from fastbert.compress.trim import trim as trim_vocabulary
    from fastbert.data import load_tokenizer, read_documents
    from fastbert.integrations.sentence_transformers import SentenceModel, lower_first
    from fastbert.train.store import write_folder

    documents = read_documents([*texts, *(more or [])])
    about = SentenceModel.read(folder)
    encoder = about.encoder
    parts = parts_of_folder(folder, encoder)
    tokenizer: Any = load_tokenizer(encoder)
    if about.lower_case:
        lower_first(tokenizer)
    found = load_own(encoder)
    rows, before = found.config.vocab_size, fastbert.weight_bytes(found)
    paragraphs = (p for document in documents for p in document.paragraphs)
    # pieces of prompts are kept, however often the texts have them
    prompts = [*filter(None, about.prompts.values())] * min_count
    smaller = trim_vocabulary(found, tokenizer, chain(prompts, paragraphs), min_count)

    def fill(new: Path) -> None:
        copy_files(folder, encoder, parts, new)
        _save(found, smaller, new / encoder.relative_to(folder))

    write_folder(out, fill)
    before_and_after(
        {
            "rows": (rows, found.config.vocab_size),
            "bytes of weights in files": (
                stored_bytes(encoder),
                stored_bytes(out / encoder.relative_to(folder)),
            ),
            "bytes of weights in memory": (
                sum(before.values()),
                sum(fastbert.weight_bytes(found).values()),
            ),
        }
    )


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and a tokenizer in the place of the copied files of the tokenizer before it."""
    from fastbert.data import save_tokenizer

    for pattern in _OTHER_FORMS:
        for path in folder.glob(pattern):
            path.unlink()
    settings = folder / "tokenizer_config.json"
    old = parse_json(read_text(settings)) if settings.is_file() else {}
    save_tokenizer(tokenizer, folder)
    values = json.loads(read_text(settings)) | {key: old[key] for key in _KEPT if key in old}
    write_text(settings, json.dumps(values, indent=2) + "\n")
    model.save_pretrained(folder)
