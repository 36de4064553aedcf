"""Hugging Face directories in and out: config.json and weights of every family."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fastbert.files import folder_or_new, listed, replacing
from fastbert.models.config import BertConfig, model_folder
from fastbert.models.config_json import LAYER_SIZES
from fastbert.models.int8_files import hold, int8_keys, int8_modules, is_int8, parts_of
from fastbert.models.layer_sizes import full_size, note_sizes, pad
from fastbert.models.names import TRANSPOSED, Names, hf_keys, names_of, prefix_of
from fastbert.models.weight_files import read_weights

State = dict[str, Tensor]

_log = logging.getLogger("fastbert")

_KINDS = {
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "modernbert": "ModernBert",
    "gpt2": "GPT2",
}
# our classes that transformers has under other names
_CLASSES = {"GPTForCausalLM": "LMHeadModel"}
# the roots of encoder keys in files that were written from a bare model, without the family's prefix
_ROOTS = ("embeddings.", "encoder.", "transformer.", "pooler.", "layers.", "final_norm.")
_FAMILY_ROOTS = {"gpt2": ("wte.", "wpe.", "h.", "ln_f.")}
# fixed tables that old versions of transformers stored
_BUFFERS = (
    *("embeddings.position_ids", "embeddings.token_type_ids"),
    *(".attn.bias", ".attn.masked_bias"),
)
# keys of a loaded config.json that do not hold for the directory that we write
_STALE = ("architectures", "auto_map", "torch_dtype", "_name_or_path", "transformers_version")
# module -> the setting that gives its weight's number of rows
_ROWS = {
    "bert.embeddings.word": "vocab_size",
    "bert.embeddings.position": "max_position_embeddings",
    "bert.embeddings.token_type": "type_vocab_size",
    "classifier": "num_labels",
}


def load(cls: type, directory: str | Path, **overrides: Any) -> Any:
    """Build `cls` from a Hugging Face directory, in fp32 and eval mode; `overrides` are fields of BertConfig.

    A head's weights that are missing in the file are initialised anew, with a warning that names them. Raises
    FileNotFoundError for a missing directory or file, and ValueError for files that are damaged, hold code, or do not
    fit config.json or the class.
    """
    folder = model_folder(directory)
    own = BertConfig.from_file(folder)
    config = _override(own, overrides)
    _check_integers(own, config, folder)
    state = _standard(read_weights(folder), config.model_type)
    names = names_of(config.model_type, class_name(cls))
    config = share_decoder(config, state, names)
    _check_size(config, state, folder)
    model = cls(config)
    unused = fill(model, state, names, str(folder))
    _check_depth(config, unused, folder, asked="num_hidden_layers" in overrides)
    if unused:
        inside = any(
            key.startswith(f"{prefix_of(config.model_type)}.") and ".pooler." not in key
            for key in unused
        )
        level = logging.WARNING if inside else logging.INFO
        _log.log(level, "%s has no use for %s in %s", cls.__name__, listed(unused), folder)
    return model.eval()


def save(model: nn.Module, directory: str | Path, padded: bool = False) -> None:
    """Write config.json and model.safetensors in transformers' format, each file whole or not at all.

    An older checkpoint in the directory stays in place until both new files are written; other files are not touched.
    With `padded` layers with sizes of their own are filled up with zeros; raises ValueError for int8 weights then.
    """
    config: BertConfig = model.config  # type: ignore[assignment]
    folder = folder_or_new(directory, "pass a directory to save into")
    state = model.state_dict()
    if padded:
        state, config = pad(state, config), full_size(config)
    else:
        note_sizes(config)
    name = class_name(type(model))
    values = {k: v for k, v in config.to_dict().items() if k not in _STALE}
    kind = _KINDS.get(values["model_type"], "Bert")
    values["architectures"] = [kind + _CLASSES.get(name, name.removeprefix("Bert"))]
    values["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    state = to_hf(model, names_of(config.model_type, name), state)
    write_files(folder, state, values)


def write_files(folder: Path, state: State, values: dict[str, Any]) -> None:
    """Write model.safetensors and config.json into a folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, settings = folder / "model.safetensors", folder / "config.json"
    # both are on the disk before either is renamed
    with replacing(weights) as new_weights, replacing(settings) as new_settings:
        try:
            save_file(state, new_weights, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{weights} can't be written ({error}): save in another place") from error
        new_settings.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def check_whole(model: Any, directory: str | Path) -> None:
    """Refuse a model whose results would come from random weights, as its file has none for them."""
    if absent := model.newly_initialised:
        raise ValueError(
            f"{directory} has no weights for {listed(absent, 3)}: its results would be random, train it first"
        )


def class_name(cls: type) -> str:
    """The name of the fastbert model that `cls` is or is derived from."""
    name = getattr(cls, "architecture", None)
    if name is None:
        raise TypeError(f"{cls.__name__} is not made from a model of fastbert.bert")
    return name


def to_hf(model: nn.Module, names: Names, values: State | None = None) -> State:
    """The model's weights under Hugging Face's names, on the CPU; a bare BertModel's without prefix.

    `values` replace its state dict.
    """
    bare, state = not _is_head(model), State()
    values = model.state_dict() if values is None else values
    for key, keys in _file_keys(model, values, names).items():
        for name, part in zip(keys, parts_of(values[key], keys), strict=True):
            state[name.split(".", 1)[1] if bare else name] = part.detach().cpu().contiguous()
    decoder = names.get("mlm_head.decoder")
    if f"{decoder}.weight" in state and f"{names['mlm_head']}.bias" in state:
        # an untied decoder of transformers reads a bias of its own
        state[f"{decoder}.bias"] = state[f"{names['mlm_head']}.bias"].clone()
    turned = TRANSPOSED.get(model.config.model_type, ())  # type: ignore[union-attr, arg-type]
    return {k: v.T.contiguous() if k.endswith(turned) else v for k, v in state.items()}


@torch.no_grad()
def fill(model: nn.Module, state: State, names: Names, source: str) -> list[str]:
    """Copy `state` into the model and return its unused keys; `source` names it in messages.

    Nothing is copied unless all of it fits. Raises ValueError naming encoder weights that are missing, and shapes or
    dtypes that do not fit.
    """
    values = model.state_dict()
    wanted = _file_keys(model, values, names)
    missing = {key: [k for k in keys if k not in state] for key, keys in wanted.items()}
    _check_missing(model, missing, not _is_head(model), state, source)
    fitting = {k: keys for k, keys in wanted.items() if not missing[k] and not is_int8(keys)}
    _check_shapes(model, values, fitting, state, source)
    hold(int8_modules(model), wanted, state, source)
    for key, keys in fitting.items():
        for part, name in zip(values[key].chunk(len(keys)), keys, strict=True):
            part.copy_(state[name])
    return sorted(state.keys() - {k for keys in wanted.values() for k in keys})


def _file_keys(model: nn.Module, values: State, names: Names) -> dict[str, list[str]]:
    """{key of the model: keys in a file}; the file's tensors, one below the other, are the model's tensor."""
    bare, integers = not _is_head(model), int8_modules(model)
    found = {}
    for key in values:
        keys = hf_keys(f"bert.{key}" if bare else key, names)
        path, _, leaf = key.rpartition(".")
        found[key] = int8_keys(keys) if path in integers and leaf != "bias" else keys
    return found


def _is_head(model: nn.Module) -> bool:
    return model.bert is not model


def _check_missing(
    model: nn.Module, missing: dict[str, list[str]], bare: bool, state: State, source: str
) -> None:
    """Refuse a file that lacks encoder weights; warn of head weights that keep their random values."""
    encoder: list[str] = []
    head: list[str] = []
    for key, absent in missing.items():
        inside = (bare or key.startswith("bert.")) and "pooler." not in key
        (encoder if inside else head).extend(absent)
    if encoder:
        raise ValueError(
            f"{source} lacks {len(encoder)} weights of the encoder ({listed(encoder)}) and has "
            f"{listed(sorted(state))}: use the config.json that belongs to these weights"
        )
    if head:
        model.newly_initialised = tuple(head)  # type: ignore[assignment]
        _log.warning(
            "%s from %s: %s are not in the checkpoint and newly initialised: train them before use",
            type(model).__name__,
            source,
            listed(head),
        )


def _check_shapes(
    model: nn.Module, values: State, fitting: dict[str, list[str]], state: State, source: str
) -> None:
    for key, keys in fitting.items():
        for part, name in zip(values[key].chunk(len(keys)), keys, strict=True):
            found = state[name]
            if not found.is_floating_point():
                raise ValueError(
                    f"{name} in {source} is {found.dtype}: fastbert loads floating-point weights, "
                    "convert a quantised checkpoint back first"
                )
            if found.shape != part.shape:
                raise ValueError(
                    f"{name} is {tuple(found.shape)} in {source} and {tuple(part.shape)} in the model: "
                    + _remedy(
                        model, key if _is_head(model) else f"bert.{key}", found.shape, part.shape
                    )
                )


def _remedy(model: nn.Module, key: str, found: torch.Size, wanted: torch.Size) -> str:
    setting = _ROWS.get(key.rpartition(".")[0])
    if setting == "num_labels" and class_name(type(model)) == "BertForQuestionAnswering":
        return (
            "a model for questions has two outputs, start and end, and this one is of another kind"
        )
    if setting is not None and len(found) == len(wanted) and found[1:] == wanted[1:]:
        return f"pass {setting}={found[0]}"
    return "config.json does not belong to these weights, or a setting was passed that does not fit them"


def _check_size(config: BertConfig, state: State, folder: Path) -> None:
    """Refuse a config.json of a far larger model before memory is taken for it."""
    tables = config.vocab_size + config.max_position_embeddings + (config.type_vocab_size or 0)
    # no list as long as num_hidden_layers: it may be any number
    n, heads, widths = config.num_hidden_layers, config.layer_heads, config.layer_widths
    columns = 4 * config.head_size * (sum(heads) if heads else n * config.num_attention_heads)
    columns += 2 * (sum(widths) if widths else n * config.intermediate_size)
    wanted = config.hidden_size * (tables + columns)
    found = sum(value.numel() for value in state.values())
    # a new head for masked words may be as large as a word table
    if wanted > 4 * found + 100_000_000:
        raise ValueError(
            f"config.json in {folder} is of a model of {wanted:.1e} numbers and the weights have {found:.1e}: use the "
            "config.json that belongs to these weights"
        )


def _check_depth(config: BertConfig, unused: list[str], folder: Path, asked: bool) -> None:
    """Refuse a file with more layers than config.json says; an explicit num_hidden_layers takes the lowest ones."""
    pattern = rf"{prefix_of(config.model_type)}\.(?:\w+\.)?(?:layers?|h)\.(\d+)\."
    found = [re.match(pattern, key) for key in unused]
    layers = [int(match[1]) for match in found if match is not None]
    if layers and not asked:
        raise ValueError(
            f"{folder} has weights of {max(layers) + 1} layers and its config.json says {config.num_hidden_layers}: "
            f"pass num_hidden_layers={max(layers) + 1}, or {config.num_hidden_layers} to leave the others out"
        )


def _override(config: BertConfig, overrides: dict[str, Any]) -> BertConfig:
    known = {f.name for f in dataclasses.fields(BertConfig)} - {"model_type", "extra"}
    unknown = sorted(overrides.keys() - known)
    if unknown:
        raise TypeError(
            f"from_pretrained got {listed(unknown)}: it takes a directory and the fields of BertConfig"
        )
    if "id2label" in overrides:
        # otherwise the file's num_labels would override the number of new names
        overrides = {"num_labels": None, "label2id": None, **overrides}
    layers = overrides.get("num_hidden_layers")
    for name in LAYER_SIZES:
        if isinstance(layers, int) and (sizes := getattr(config, name)):
            overrides = {name: sizes[: max(layers, 0)], **overrides}
    return dataclasses.replace(config, **overrides)


def _check_integers(own: BertConfig, config: BertConfig, folder: Path) -> None:
    """Refuse settings that ask for int8 weights where the folder has others, or the other way round."""
    held, wanted = own.int8_bits is not None, config.int8_bits is not None
    if held and not wanted:
        raise ValueError(
            f"the weights in {folder} are int8 and int8_bits=None was passed: leave it out, or load another folder"
        )
    if (held, own.int8_embeddings) != (wanted, config.int8_embeddings):
        instead = "" if held else ", and call fastbert.quantize with replace=True on the model"
        raise ValueError(
            f"int8_bits={config.int8_bits} and int8_embeddings={config.int8_embeddings} were asked for, and "
            f"{folder} has int8_bits={own.int8_bits} and int8_embeddings={own.int8_embeddings}: leave these arguments "
            f"out{instead}"
        )


def _standard(raw: Mapping[str, Tensor], family: str) -> State:
    """A file's weights under transformers' present names: with prefix, LayerNorm weight and bias, one decoder bias."""
    state: State = {}
    roots, turned = _FAMILY_ROOTS.get(family, _ROOTS), TRANSPOSED.get(family, ())
    for key, value in raw.items():
        key = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key))
        key = f"{prefix_of(family)}.{key}" if key.startswith(roots) else key
        if not key.endswith(_BUFFERS):
            state[key] = value.T if key.endswith(turned) and value.dim() == 2 else value
    # if a file has two different decoder biases, transformers adds decoder.bias
    for head in ("cls.predictions", "lm_head"):
        if f"{head}.decoder.bias" in state:
            state[f"{head}.bias"] = state.pop(f"{head}.decoder.bias")
    return state


def share_decoder(config: BertConfig, state: State, names: Names) -> BertConfig:
    """Remove a tied decoder from `state`; if it differs from the word embedding, return a config that unties them."""
    word, decoder = (f"{names[key]}.weight" for key in ("bert.embeddings.word", "mlm_head.decoder"))
    if not config.tie_word_embeddings or decoder not in state:
        return config
    if word in state and not torch.equal(state[word], state[decoder]):
        _log.warning(
            "%s is not the word embedding though config.json ties them: both are kept", decoder
        )
        return dataclasses.replace(config, tie_word_embeddings=False)
    # a file that stores a shared tensor once may store it under the decoder's name
    state[word] = state.pop(decoder)
    return config
