"""Folders that sentence-transformers wrote: an encoder, pooling, the layers after it, prompts and the length limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import normalizers
from torch import Tensor, nn
from torch.nn import functional as tnf

from fastbert.files import parse_json, quoted, read_text
from fastbert.models.weight_files import read_weights

Json = dict[str, Any]

# in the order in which several of them are concatenated
POOLING = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# the keys of older versions
POOLING_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS = (
    *("ELU", "GELU", "Identity", "LeakyReLU", "Mish", "ReLU"),
    *("SELU", "SiLU", "Sigmoid", "Softplus", "Tanh"),
)
_TRANSFORMER = ("bert", "roberta", "distilbert", "camembert", "xlm-roberta")
# settings of an encoder's file that change nothing at these values; _check refuses all others
_ENCODER: Json = {
    "transformer_task": ("feature-extraction", None),
    "modality_config": (
        {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        None,
    ),
    "module_output_name": ("token_embeddings", None),
    **dict.fromkeys(("unpad_inputs", "backend", "message_format"), ...),
    **dict.fromkeys(
        ("model_args", "tokenizer_args", "config_args", "processing_kwargs"), ({}, None)
    ),
    **dict.fromkeys(("model_kwargs", "processor_kwargs", "config_kwargs"), ({}, None)),
}
_ON_VECTORS = dict.fromkeys(
    ("module_input_name", "module_output_name"), ("sentence_embedding", None)
)


@dataclass
class SentenceModel:
    """What a folder says about its vectors."""

    encoder: Path
    # tokens in the longest text; None: as many as the encoder has positions for
    max_length: int | None = None
    lower_case: bool = False
    pooling: tuple[str, ...] = ("mean",)
    # whether the tokens of a prompt are pooled too
    include_prompt: bool = True
    # the numbers in a pooled vector, and the layers that are applied to it
    width: int | None = None
    layers: nn.Sequential = field(default_factory=nn.Sequential)
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None

    @classmethod
    def read(cls, folder: str | Path) -> SentenceModel:
        """Read modules.json and the files that it names. Without modules.json the mean over the tokens is the vector.

        Raises ValueError for a folder with something that is not supported, and names it.
        """
        folder = Path(folder)
        if not (folder / "modules.json").is_file():
            return cls(folder)
        kinds = [_module(entry, folder) for entry in _read_json(folder / "modules.json", list)]
        if [kind for kind, _ in kinds[:2]] != ["Transformer", "Pooling"]:
            raise _refused(
                folder / "modules.json",
                f"the modules are {', '.join(kind for kind, _ in kinds)[:200]}",
                "a Transformer and a Pooling come first",
            )
        (_, encoder), (_, pooling), *rest = kinds
        found = cls(encoder)
        found._read_encoder()
        width = found.width = found._read_pooling(pooling / "config.json")
        for kind, path in rest:
            layer, width = _layer(kind, path, width)
            found.layers.append(layer)
        found.layers.eval().requires_grad_(False)
        found._read_prompts(folder / "config_sentence_transformers.json")
        return found

    def prompt(self, name: str | None) -> str:
        """The prompt of this name; None: the default one, "": none. Raises ValueError for a name that is not known."""
        name = self.default_prompt if name is None else name
        if name and name not in self.prompts:
            known = ", ".join(self.prompts)[:200] or "none, as no config_sentence_transformers.json"
            raise ValueError(f"the model has no prompt {quoted(name)}: it has {known}")
        return self.prompts[name] if name else ""

    def _read_encoder(self) -> None:
        names = [f"sentence_{family}_config.json" for family in _TRANSFORMER]
        file = next((self.encoder / n for n in names if (self.encoder / n).is_file()), None)
        values = {} if file is None else _read_json(file, dict)
        lengths = values.pop("max_seq_length", None), _model_max_length(self.encoder)
        self.max_length = next((n for n in lengths if n is not None), None)
        if self.max_length is not None and (
            type(self.max_length) is not int or self.max_length < 3
        ):
            raise _refused(
                file, f"max_seq_length is {quoted(self.max_length)}", "a number from 3 on"
            )
        self.lower_case = values.pop("do_lower_case", False)
        if not isinstance(self.lower_case, bool):
            raise _refused(file, f"do_lower_case is {quoted(self.lower_case)}", "true or false")
        _check(values, _ENCODER, file)

    def _read_pooling(self, file: Path) -> int:
        """Read the pooling's file; returns the width of its vectors."""
        values = _read_json(file, dict)
        switches = {name: values.pop(name) for name in POOLING_SWITCHES if name in values}
        on = tuple(mode for name, mode in POOLING_SWITCHES.items() if switches.get(name))
        given = values.pop("pooling_mode", on or "mean")
        modes = (given,) if isinstance(given, str) else given
        if not isinstance(modes, (list, tuple)) or not modes or set(map(str, modes)) - set(POOLING):
            raise _refused(
                file, f"pooling_mode is {quoted(given)}", f"one or several of {', '.join(POOLING)}"
            )
        self.pooling = tuple(modes)
        self.include_prompt = values.pop("include_prompt", True)
        if not isinstance(self.include_prompt, bool):
            raise _refused(
                file, f"include_prompt is {quoted(self.include_prompt)}", "true or false"
            )
        widths = [values.pop(n, None) for n in ("embedding_dimension", "word_embedding_dimension")]
        _check(values, {}, file)
        width = next((w for w in widths if w is not None), None)
        if type(width) is not int or width < 1:
            raise _refused(file, f"embedding_dimension is {quoted(width)}", "the encoder's width")
        return width * len(self.pooling)

    def _read_prompts(self, file: Path) -> None:
        values = _read_json(file, dict) if file.is_file() else {}
        kind = values.get("model_type", "SentenceTransformer")
        if kind != "SentenceTransformer":
            raise _refused(
                file, f"model_type is {quoted(kind)}", "SentenceTransformer, with a vector per text"
            )
        prompts = values.get("prompts") or {}
        if not isinstance(prompts, dict) or not all(
            isinstance(p, str | None) for p in prompts.values()
        ):
            raise _refused(file, "prompts is no object of texts", "a name and a text for each")
        self.prompts = {name: prompt or "" for name, prompt in prompts.items()}
        self.default_prompt = values.get("default_prompt_name")
        if self.default_prompt is not None and self.default_prompt not in [*self.prompts]:
            raise _refused(
                file, f"default_prompt_name is {quoted(self.default_prompt)}", "one of prompts"
            )


def lower_first(tokenizer: Any) -> None:
    """Lower-case texts first, as sentence-transformers does for do_lower_case."""
    old: Any = tokenizer.normalizer
    # the library's types lack that a sequence is iterable
    several = isinstance(old, normalizers.Sequence)
    steps: list[Any] = list(old) if several else [old] if old else []  # type: ignore[call-overload, unused-ignore]
    if not any(isinstance(step, normalizers.Lowercase) for step in steps):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])


def pool(hidden: Tensor, lengths: Tensor, modes: Sequence[str], skipped: int = 0) -> Tensor:
    """(B, modes * C) of the states (T, C) of B texts, end to end; a text's first `skipped` tokens do not count."""
    ends = lengths.cumsum(0)
    starts = ends - lengths
    numbers = torch.arange(len(lengths), device=hidden.device)
    owner = torch.repeat_interleave(numbers, lengths)  # (T,)
    place = torch.arange(len(hidden), device=hidden.device) - starts[owner]  # (T,)
    weight = (place >= skipped).to(hidden.dtype)  # (T,)

    def total(values: Tensor) -> Tensor:  # (T, ...) -> (B, ...)
        return values.new_zeros(len(lengths), *values.shape[1:]).index_add_(0, owner, values)

    found = []
    for mode in modes:
        if mode == "cls":
            first = starts + torch.where(lengths > skipped, skipped, 0)
            found.append(hidden.index_select(0, first))
        elif mode == "lasttoken":
            found.append(hidden.index_select(0, ends - 1))
        elif mode == "max":
            counted = hidden.masked_fill(weight[:, None] == 0, float("-inf"))
            least = hidden.new_full((len(lengths), hidden.shape[1]), float("-inf"))
            found.append(least.index_reduce_(0, owner, counted, "amax"))
        else:
            w = weight * (place + 1) if mode == "weightedmean" else weight
            count = total(w).clamp(min=1e-9)[:, None]
            count = count.sqrt() if mode == "mean_sqrt_len_tokens" else count
            found.append(total(hidden * w[:, None]) / count)
    return torch.cat(found, 1)


class Dense(nn.Module):
    """A linear layer and an activation, with the input added where `residual` says so."""

    def __init__(
        self, linear: nn.Linear, activation: nn.Module, residual: nn.Module | None
    ) -> None:
        super().__init__()
        self.linear, self.activation, self.residual = linear, activation, residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) -> (B, C')."""
        y = self.activation(self.linear(x))
        return y if self.residual is None else y + self.residual(x)


class Normalize(nn.Module):
    """Vectors of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) -> (B, C)."""
        return tnf.normalize(x)


def _layer(kind: str, path: Path, width: int) -> tuple[nn.Module, int]:
    """A module after the pooling, which takes vectors of `width` numbers, and the width of the vectors it gives."""
    file = path / "config.json"
    if kind == "Normalize":
        _check(_read_json(file, dict) if file.is_file() else {}, _ON_VECTORS, file)
        return Normalize(), width
    if kind == "Dropout":
        return nn.Identity(), width
    values = _read_json(file, dict)
    if kind == "LayerNorm":
        norm = nn.LayerNorm(width)
        fill(norm, path, "norm.")
        return norm, width
    if kind != "Dense":
        raise _refused(
            path, f"the module {kind} is not supported", "Dense, LayerNorm, Normalize or Dropout"
        )
    sizes = values.pop("in_features", None), values.pop("out_features", None)
    if sizes[0] != width or type(sizes[1]) is not int or sizes[1] < 1:
        raise _refused(
            file,
            f"a layer from {quoted(sizes[0])} to {quoted(sizes[1])} numbers follows {width}",
            "the same width",
        )
    bias, residual = values.pop("bias", True), values.pop("use_residual", False)
    name = values.pop("activation_function", "torch.nn.modules.activation.Tanh")
    package, _, short = str(name).rpartition(".")
    if short not in _ACTIVATIONS or not package.startswith("torch.nn"):
        raise _refused(
            file,
            f"activation_function is {quoted(name)}",
            f"one of torch.nn's {', '.join(_ACTIVATIONS)}",
        )
    _check(values, _ON_VECTORS, file)
    linear = nn.Linear(width, sizes[1], bias=bool(bias))
    fill(linear, path, "linear.")
    added: nn.Module | None = nn.Identity() if residual else None
    if residual and width != sizes[1]:
        added = nn.Linear(width, sizes[1], bias=False)
        fill(added, path, "residual.")
    return Dense(linear, getattr(nn, short)(), added), sizes[1]


def fill(module: nn.Module, path: Path, prefix: str) -> None:
    """Load the weights under the keys that begin with `prefix` into a module."""
    weights = read_weights(path)
    for key, value in module.state_dict().items():
        found = weights.get(prefix + key)
        if found is None or found.shape != value.shape:
            shape = None if found is None else tuple(found.shape)
            raise _refused(
                path, f"{prefix}{key} is {shape}", f"a weight of shape {tuple(value.shape)}"
            )
        value.copy_(found)


def _module(entry: Any, folder: Path) -> tuple[str, Path]:
    """The last part of a module's class, and the module's folder."""
    path = entry.get("path", "") if isinstance(entry, dict) else None
    if not isinstance(path, str) or len(path) > 200:
        raise _refused(
            folder / "modules.json", "an entry is no object", "type and path of a module"
        )
    package, _, kind = str(entry.get("type")).rpartition(".")
    if package.split(".")[0] != "sentence_transformers":
        raise _refused(
            folder / "modules.json",
            f"a module is {quoted(str(entry.get('type')))}",
            "classes of sentence_transformers",
        )
    return kind, folder / path


def _model_max_length(folder: Path) -> Any:
    """model_max_length of tokenizer_config.json; transformers writes 1e30 for none."""
    file = folder / "tokenizer_config.json"
    length = _read_json(file, dict).get("model_max_length") if file.is_file() else None
    return None if length is None or (isinstance(length, int | float) and length > 1e9) else length


def _read_json(file: Path, kind: type) -> Any:
    try:
        found = parse_json(read_text(file))
    except OSError as error:
        raise ValueError(
            f"{file} can't be read ({error.strerror}): modules.json names it"
        ) from error
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): copy it again") from error
    if not isinstance(found, kind):
        raise _refused(file, f"it holds a {type(found).__name__}", f"a JSON {kind.__name__}")
    return found


def _check(values: Json, harmless: Json, file: Path | None) -> None:
    """Refuse settings other than those that are known to change nothing."""
    for name, value in values.items():
        known = harmless.get(name, (None,))
        if known is not ... and value not in known and not name.startswith("__"):
            raise _refused(file, f"{name} is {quoted(value)}", "a model without it")


def _refused(file: Path | None, what: str, wanted: str) -> ValueError:
    return ValueError(f"{file}: {what[:300]}: fastbert embed supports {wanted}")
