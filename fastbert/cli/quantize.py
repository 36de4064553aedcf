"""`fastbert quantize`: a model folder with int8 weights, which the other commands read as any other."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from fastbert.cli.settings import ready
from fastbert.files import UNFINISHED, folder_or_new, parse_json, read_text, shortened
from fastbert.finetune.config import trained_model
from fastbert.models.config import BertConfig

# the ends of names of files of weights, of any library
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".h5", ".msgpack", ".ot", ".onnx", ".gguf"),
    ".index.json",
)


def quantize(
    model: Annotated[
        Path, typer.Argument(help="model folder, or OUT of a fine-tuning run; it is not changed")
    ],
    out: Annotated[Path, typer.Argument(help="folder to write, a new one")],
    bits: Annotated[int, typer.Option(help="bits of activations, 12 or 8")] = 12,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="word embeddings in int8 too: less exact")
    ] = False,
) -> None:
    """Write a copy of a model folder with the encoder's weights as int8, a quarter of their size.

    Word embeddings, often most of a small model, stay in fp32 without --embeddings.

    embed, predict and fill-mask read the copy as any other folder, and give the vectors and answers that --int8 gives.
    The copy can't be trained, and transformers can't read it. Example: fastbert quantize runs/a out/ --embeddings
    """
    if bits not in (12, 8):
        raise ValueError(f"--bits {bits}: choose 12 or 8")
    folder = source_of(model, out)
    ready()
    import fastbert
    from fastbert.integrations.sentence_transformers import SentenceModel
    from fastbert.train.store import write_folder

    encoder = SentenceModel.read(folder).encoder
    parts = parts_of_folder(folder, encoder)
    if BertConfig.from_file(encoder).int8_bits is not None:
        raise ValueError(f"the weights in {encoder} are int8 already: pass the model before it")
    found = load_own(encoder)
    before = fastbert.weight_bytes(found)
    fastbert.quantize(found, bits, replace=True, embeddings=embeddings)

    def fill(new: Path) -> None:
        copy_files(folder, encoder, parts, new)
        found.save_pretrained(new / encoder.relative_to(folder))

    write_folder(out, fill)
    stored = stored_bytes(encoder), stored_bytes(out / encoder.relative_to(folder))
    held = sum(before.values()), sum(fastbert.weight_bytes(found).values())
    before_and_after({"weights in files": stored, "weights in memory": held}, "bytes")


def source_of(model: Path, out: Path) -> Path:
    """The folder of a model to be copied; refuses an OUT inside of it, and one with files."""
    folder = trained_model(model)
    folder_or_new(out, "name a new folder")
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} is inside {folder}: name a folder outside of the model")
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is a folder with files: name a new one")
    return folder


def before_and_after(rows: dict[str, tuple[int, int]], title: str = "") -> None:
    """Print the two numbers of every row."""
    width = max(20, *map(len, rows))
    typer.echo(f"{title:<{width}} {'before':>14} {'after':>14}")
    for name, (old, new) in rows.items():
        typer.echo(f"{name:<{width}} {old:>14,} {new:>14,} {new / old:7.0%}")


def load_own(folder: Path) -> Any:
    """The model in a folder, of the class that its config.json names; the bare encoder where we have no such class."""
    from fastbert import bert
    from fastbert.models.checkpoint import check_whole
    from fastbert.models.weight_files import read_weights

    names = BertConfig.from_file(folder).extra.get("architectures")
    name = str(names[0])[:80] if isinstance(names, list) and names else "BertModel"
    if name in ("GPT2LMHeadModel", bert.GPTForCausalLM.architecture):
        found = bert.GPTForCausalLM.from_pretrained(folder)
        check_whole(found, folder)
        return found
    head = re.search(r"For[A-Z]\w*$", name)
    kind = getattr(bert, f"Bert{head[0]}", None) if head else bert.BertModel
    if kind is None:
        typer.echo(f"the head of {name} is left out: fastbert has no such model", err=True)
        kind = bert.BertModel
    given = {}
    if kind is bert.BertModel:
        given["add_pooler"] = any("pooler." in key for key in read_weights(folder))
    found = kind.from_pretrained(folder, **given)
    check_whole(found, folder)
    return found


def parts_of_folder(folder: Path, encoder: Path) -> list[Path]:
    """A model folder and the folders that its modules.json names; refuses a name that leads out of it."""
    parts = {folder, encoder}
    if (folder / "modules.json").is_file():
        modules = parse_json(read_text(folder / "modules.json"))
        parts |= {folder / entry.get("path", "") for entry in modules}
    for part in parts:
        if ".." in part.parts[len(folder.parts) :] or not part.is_relative_to(folder):
            raise ValueError(
                f"modules.json in {folder} names {shortened(str(part))}, which is outside of it: copy that folder "
                "into it"
            )
    # a module without settings may have no folder
    return sorted(filter(Path.is_dir, parts))


def copy_files(folder: Path, encoder: Path, parts: list[Path], new: Path) -> None:
    """Copy the files of these parts of a model folder, but not the encoder's weights."""
    for part in parts:
        (new / part.relative_to(folder)).mkdir(parents=True, exist_ok=True)
        for path in part.iterdir():
            weights = part in (folder, encoder) and path.name.endswith(_WEIGHTS)
            if path.is_file() and not weights and not path.name.startswith(UNFINISHED):
                shutil.copyfile(path, new / path.relative_to(folder))


def stored_bytes(folder: Path) -> int:
    """Bytes of the weights that a folder's model is loaded from."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if found := [path.stat().st_size for path in folder.glob(pattern)]:
            return sum(found)
    return 0
