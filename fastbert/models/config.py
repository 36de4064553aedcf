"""BertConfig: the settings of every model in fastbert.bert, read from and written to Hugging Face config.json files."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from fastbert.files import parse_json, quoted, read_text
from fastbert.models.names import HF_DEFAULTS, NOT_WRITTEN, SPELLINGS

# hidden_act -> `approximate` of bias_gelu; None: ReLU
ACTIVATIONS: dict[str, str | None] = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "relu": None,
}
PROBLEM_TYPES = (
    None,
    "regression",
    "single_label_classification",
    "multi_label_classification",
)
# type in an annotation -> type of a value, and its name in messages
_TYPES: dict[str, tuple[Any, str]] = {
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "str": (str, "a text"),
    "bool": (bool, "true or false"),
    "dict": (dict, "a JSON object"),
    "tuple": ((tuple, list), "a list"),
}
# model_type -> the family with the same weights and maths; to_dict writes the original model_type
ALIASES = {"xlm-roberta": "roberta", "camembert": "roberta"}
# fields that to_dict writes one by one
_SPECIAL = (
    "extra",
    "num_labels",
    "id2label",
    "label2id",
    "problem_type",
    "position_embedding_type",
    "int8_bits",
    "int8_embeddings",
    "layer_heads",
    "layer_widths",
)
# sizes of single layers -> the size that none of them exceeds
LAYER_SIZES = {"layer_heads": "num_attention_heads", "layer_widths": "intermediate_size"}
# the value of quantization_config for int8 weights; bits and embeddings are added. It has no quant_method: transformers
# refuses the folder then, while it would draw the weights anew under a method that it does not know
_INT8 = {"library": "fastbert", "layout": 1}


def check_types(settings: Any) -> None:
    """Raise ValueError for a field of a dataclass whose value is not of the field's type."""
    for f in dataclasses.fields(settings):
        value, (kind, *optional) = getattr(settings, f.name), str(f.type).split(" | ")
        wanted, called = _TYPES[kind.partition("[")[0]]
        fits = isinstance(value, wanted) and (kind == "bool") == isinstance(value, bool)
        fits = fits and (not isinstance(value, Real) or math.isfinite(value))
        if not fits and not (optional and value is None):
            raise ValueError(f"{f.name} is {quoted(value)}: it must be {called}")


@dataclass
class BertConfig:
    """The settings of a BERT, RoBERTa or DistilBERT; fields are named as in Hugging Face's BERT config.json.

    Raises ValueError with a sentence for settings that do not fit together or that are not supported.
    """

    vocab_size: int = 30522
    # C, split over the heads
    hidden_size: int = 768
    num_hidden_layers: int = 12
    # H; the head size C / H is at most 128
    num_attention_heads: int = 12
    # F, the width of the feed-forward block
    intermediate_size: int = 3072
    # gelu is the exact erf, gelu_new and gelu_pytorch_tanh the tanh formula; relu runs on stock ops
    hidden_act: str = "gelu"
    # after the embeddings and after both blocks of a layer
    hidden_dropout_prob: float = 0.1
    # on the attention weights
    attention_probs_dropout_prob: float = 0.1
    # before a classifier; None: hidden_dropout_prob
    classifier_dropout: float | None = None
    # rows of the position table; RoBERTa uses the rows from pad_token_id + 1 on
    max_position_embeddings: int = 512
    # token types, 0 = none; None: 2 in BERT, 1 in RoBERTa, 0 in DistilBERT
    type_vocab_size: int | None = None
    # standard deviation of fresh weights
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    # this id's word embedding is zero and gets no gradient from the lookup; None: 1 in RoBERTa, else 0
    pad_token_id: int | None = None
    # "absolute" is a learned table, "sinusoidal" the fixed one of the Transformer paper
    position_embedding_type: str = "absolute"
    # the family: "bert", "roberta" (positions from the padding id) or "distilbert" (no types, no pooler)
    model_type: str = "bert"
    # whether a bare BertModel has the pooler (dense + tanh on the first token); None: not in DistilBERT
    add_pooler: bool | None = None
    # whether the masked-LM decoder is the word embedding
    tie_word_embeddings: bool = True
    # classes of the classifier; None: as many as id2label has, else 2
    num_labels: int | None = None
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    # the loss of a sequence classifier; None: derived from num_labels and the labels' dtype
    problem_type: str | None = None
    # DistilBERT's own dropouts: before the sequence classifier and before the span classifier
    seq_classif_dropout: float = 0.2
    qa_dropout: float = 0.1
    # the encoder's weights are int8, and its activations are rounded to so many bits, 12 or 8; fastbert.quantize and
    # from_pretrained set it, a fresh model has no use for it
    int8_bits: int | None = None
    # whether the word embeddings are int8 too
    int8_embeddings: bool = False
    # heads and feed-forward width of every layer, as fastbert.prune leaves them; 0 is none; None: all equal. The head
    # size stays C / H
    layer_heads: tuple[int, ...] | None = None
    layer_widths: tuple[int, ...] | None = None
    # keys of a config.json that no model here uses; to_dict writes them back
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        if self.model_type in ALIASES:
            self.extra = {**self.extra, "model_type": self.model_type}
            self.model_type = ALIASES[self.model_type]
        if self.model_type not in SPELLINGS:
            known = ", ".join([*SPELLINGS, *ALIASES])
            raise ValueError(f"model_type is {quoted(self.model_type)}: fastbert builds {known}")
        self._fill_defaults()
        self._check_sizes()
        self._check_layers()
        self._check_options()

    def _fill_defaults(self) -> None:
        if self.type_vocab_size is None:
            self.type_vocab_size = {"bert": 2, "roberta": 1, "distilbert": 0}[self.model_type]
        if self.pad_token_id is None:
            self.pad_token_id = 1 if self.model_type == "roberta" else 0
        if self.add_pooler is None:
            self.add_pooler = self.model_type != "distilbert"
        if self.id2label is not None:
            if not all(str(k).isdecimal() for k in self.id2label):
                raise ValueError(
                    f"id2label has the keys {str([*self.id2label])[:100]}: use numbers"
                )
            self.id2label = {int(k): str(v) for k, v in self.id2label.items()}
            if self.num_labels is None:
                self.num_labels = len(self.id2label)
            elif self.num_labels != len(self.id2label):
                # as in transformers: num_labels wins, and names of another number of labels are dropped
                self.id2label = self.label2id = None
        if self.num_labels is None:
            self.num_labels = 2

    def _check_sizes(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size")
        for name in (*sizes, "max_position_embeddings", "num_labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.num_hidden_layers < 0 or (self.type_vocab_size or 0) < 0:
            raise ValueError("num_hidden_layers and type_vocab_size must be at least 0")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}: change one of them"
            )
        head = self.hidden_size // self.num_attention_heads
        if head > 128:
            raise ValueError(
                f"the head size is {head}: use more heads, attention takes at most 128"
            )
        pad = self.pad_token_id
        if pad is not None and not 0 <= pad < self.vocab_size:
            raise ValueError(f"pad_token_id is {pad}, outside [0, vocab_size = {self.vocab_size})")
        if self.max_length < 1:
            raise ValueError(
                f"max_position_embeddings is {self.max_position_embeddings}: RoBERTa's positions start at "
                f"pad_token_id + 1 = {self.position_offset}, make the table longer"
            )

    def _check_layers(self) -> None:
        for name, size in LAYER_SIZES.items():
            sizes, most = getattr(self, name), getattr(self, size)
            if sizes is None:
                continue
            if not all(
                type(n) is not bool and isinstance(n, Integral) and 0 <= int(n) <= most
                for n in sizes
            ):
                raise ValueError(
                    f"{name} is {str(sizes)[:100]}: use whole numbers from 0 to {size} {most}"
                )
            if len(sizes) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(sizes)} numbers and num_hidden_layers is {self.num_hidden_layers}: pass one each"
                )
            if name == "layer_widths" and len(set(sizes)) == 1 and sizes[0]:
                # Hugging Face's config.json has a field for one width of all layers
                self.intermediate_size = most = int(sizes[0])
            setattr(self, name, None if set(sizes) <= {most} else tuple(map(int, sizes)))

    def _check_options(self) -> None:
        for f in dataclasses.fields(self):
            p = getattr(self, f.name)
            if "dropout" in f.name and p is not None and not 0.0 <= p < 1.0:
                raise ValueError(f"{f.name} is {p}: it must be in [0, 1)")
        if not self.layer_norm_eps > 0.0 or self.initializer_range < 0.0:
            raise ValueError("layer_norm_eps must be above 0 and initializer_range at least 0")
        if self.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"hidden_act is {quoted(self.hidden_act)}: choose one of {known}")
        if self.position_embedding_type not in ("absolute", "sinusoidal"):
            raise ValueError(
                f"position_embedding_type is {quoted(self.position_embedding_type)}: choose 'absolute' or "
                "'sinusoidal', relative positions are not supported"
            )
        if self.problem_type not in PROBLEM_TYPES:
            raise ValueError(
                f"problem_type is {quoted(self.problem_type)}: choose one of {PROBLEM_TYPES}"
            )
        if self.int8_bits not in (None, 12, 8):
            raise ValueError(f"int8_bits is {quoted(self.int8_bits)}: it must be 12 or 8")
        if self.int8_embeddings and self.int8_bits is None:
            raise ValueError("int8_embeddings is true without int8_bits: set both")
        if self.extra.get("quantization_config"):
            raise ValueError(
                "quantization_config is set: convert the weights back to floating point"
            )
        for key in ("is_decoder", "add_cross_attention"):
            if self.extra.get(key):
                raise ValueError(
                    f"{key} is set: fastbert builds encoders only, without cross attention"
                )

    @property
    def labels(self) -> list[str]:
        """The names of the classes by number; raises ValueError where id2label skips a number."""
        count = self.num_labels or 0
        names = self.id2label or {i: f"LABEL_{i}" for i in range(count)}
        if sorted(names) != list(range(count)):
            raise ValueError(
                f"id2label has the numbers {str(sorted(names))[:100]}: name each of 0 to {count - 1}"
            )
        return [names[i] for i in range(count)]

    @property
    def why_not_trained(self) -> str | None:
        """Why the model can't be trained, as the end of a sentence; None where it can."""
        if self.int8_bits is None:
            return None
        return "has int8 weights, which can't be trained: use the model that was quantised"

    @property
    def head_size(self) -> int:
        """D, the width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def layer_sizes(self) -> list[tuple[int, int]]:
        """The heads and the feed-forward width of every layer."""
        layers = range(self.num_hidden_layers)
        heads = self.layer_heads or [self.num_attention_heads for _ in layers]
        widths = self.layer_widths or [self.intermediate_size for _ in layers]
        return [*zip(heads, widths, strict=True)]

    @property
    def approximate(self) -> str | None:
        """The GELU formula ("none" is exact, "tanh"), or None for ReLU."""
        return ACTIVATIONS[self.hidden_act]

    @property
    def classifier_p(self) -> float:
        """The dropout before a classifier of BERT and RoBERTa, and before DistilBERT's token classifier."""
        own = self.classifier_dropout
        return self.hidden_dropout_prob if own is None else own

    @property
    def position_offset(self) -> int:
        """The position of a sequence's first token: RoBERTa counts from pad_token_id + 1, the others from 0."""
        return (self.pad_token_id or 0) + 1 if self.model_type == "roberta" else 0

    @property
    def max_length(self) -> int:
        """The longest sequence that the position table serves."""
        return self.max_position_embeddings - self.position_offset

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BertConfig:
        """Read the contents of a config.json of BERT, RoBERTa or DistilBERT; unknown keys are kept in `extra`.

        Raises ValueError for settings that no model here has (relative positions, decoders).
        """
        if not isinstance(values, dict):
            raise ValueError(f"a configuration is a JSON object, not {type(values).__name__}")
        family = str(values.get("model_type", "bert"))
        family = ALIASES.get(family, family)
        names = SPELLINGS.get(family, {})
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        ours: dict[str, Any] = dict(HF_DEFAULTS.get(family, {}))
        extra: dict[str, Any] = {}
        for key, value in values.items():
            name = names.get(key, key)
            (ours if name in known else extra)[name] = value
        ours |= _int8(extra)
        if family == "distilbert" and extra.pop("sinusoidal_pos_embds", False):
            ours["position_embedding_type"] = "sinusoidal"
        return cls(**ours, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json in the family's own spelling, with the keys that from_dict kept."""
        spelling = {ours: theirs for theirs, ours in SPELLINGS[self.model_type].items()}
        skipped = {*_SPECIAL, *NOT_WRITTEN[self.model_type]}
        values = {
            spelling.get(f.name, f.name): getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in skipped
        }
        if self.add_pooler == (self.model_type != "distilbert"):
            del values["add_pooler"]
        if self.model_type == "distilbert":
            values["sinusoidal_pos_embds"] = self.position_embedding_type == "sinusoidal"
        elif self.position_embedding_type != "absolute":
            values["position_embedding_type"] = self.position_embedding_type
        if self.int8_bits is not None:
            about = {"bits": self.int8_bits, "embeddings": self.int8_embeddings}
            values["quantization_config"] = _INT8 | about
        if self.problem_type is not None:
            values["problem_type"] = self.problem_type
        values |= {name: [*sizes] for name in LAYER_SIZES if (sizes := getattr(self, name))}
        # Hugging Face keeps the number of labels only as the length of id2label
        names = self.id2label or {i: f"LABEL_{i}" for i in range(self.num_labels or 0)}
        values["id2label"] = {str(i): name for i, name in names.items()}
        values["label2id"] = self.label2id or {name: i for i, name in names.items()}
        return {**values, **self.extra}

    @classmethod
    def from_file(cls, path: str | Path) -> BertConfig:
        """Read a config.json, or the one in a directory; raises FileNotFoundError, or ValueError for a bad file."""
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(
                f"there is no configuration at {file}: pass a config.json or its folder"
            )
        try:
            values = parse_json(read_text(file))
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error


def _int8(extra: dict[str, Any]) -> dict[str, Any]:
    """The fields that a quantization_config of fastbert stands for; it is taken out, one of another library stays."""
    found = extra.get("quantization_config")
    if not isinstance(found, dict) or found.get("library") != "fastbert":
        return {}
    if found.get("layout") != _INT8["layout"]:
        raise ValueError(
            f"quantization_config has the layout {quoted(found.get('layout'))} and this version of fastbert reads "
            f"{_INT8['layout']}: quantise the floating-point model again, or update fastbert"
        )
    del extra["quantization_config"]
    return {"int8_bits": found.get("bits") or 0, "int8_embeddings": found.get("embeddings", False)}


def model_folder(path: str | Path) -> Path:
    """The folder of a checkpoint; raises FileNotFoundError where there is none, ValueError for a file."""
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"there is no directory {path}: pass one with a config.json and weights, hub names are not looked up"
        )
    if os.path.isfile(path):
        raise ValueError(f"{path} is a file: pass the directory that holds it and its config.json")
    return Path(path)
