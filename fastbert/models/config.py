"""BertConfig: the settings of every model in fastbert.bert, read from and written to Hugging Face config.json files."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

from fastbert.files import listed, parse_json, quoted, read_text
from fastbert.models import config_json
from fastbert.models.config_json import ALIASES, LAYER_SIZES, REFUSED
from fastbert.models.field_types import check_types
from fastbert.models.names import FORMS, SPELLINGS, TYPES

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


@dataclass
class BertConfig:
    """The settings of a BERT, RoBERTa, DistilBERT, ModernBERT, GPT-2 or LSTM; names are those of Hugging Face's BERT.

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
    # token types, 0 = none; None: 2 in BERT, 1 in RoBERTa, 0 in the others
    type_vocab_size: int | None = None
    # standard deviation of fresh weights
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    # this id's word embedding is zero and gets no gradient from the lookup; None: 1 in RoBERTa, none in GPT-2, else 0
    pad_token_id: int | None = None
    # "absolute" is a learned table, "sinusoidal" the fixed one of the Transformer paper; "rotary" has no table, and
    # attention turns queries and keys by their positions; an LSTM has "none". None: the family's, rotary in ModernBERT
    position_embedding_type: str | None = None
    # the family: "bert", "roberta" (positions from the padding id), "distilbert", "modernbert" (both without types and
    # pooler), "gpt2" (a token sees those before it, and the embeddings have no norm) or "lstm" (layers are
    # bidirectional LSTMs of hidden_size / 2 units a direction, without attention and feed-forward; fastbert's alone)
    model_type: str = "bert"
    # the form of the layers; None: the family's. With another form than the family's the model is fastbert's alone, and
    # to_dict writes another model_type. LayerNorm stands before the blocks, and behind the last layer
    pre_norm: bool | None = None
    # the feed-forward multiplies two halves, act(a) * g
    gated: bool | None = None
    # of linear layers and norms; a masked-LM decoder has one in any case
    biases: bool | None = None
    # a token of a local layer sees half of so many tokens before itself and half behind itself, rounded down; 0: no
    # layer is local
    local_attention: int | None = None
    # every so many layers, from the first on, one is not local
    global_attn_every_n_layers: int = 3
    # of the angles of rotary positions, in layers that are not local and in local ones
    rope_theta: float = 160000.0
    local_rope_theta: float = 10000.0
    # whether a bare BertModel has the pooler (dense + tanh on the first token); None: in BERT and RoBERTa
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
            self.type_vocab_size = TYPES[self.model_type]
        if self.pad_token_id is None:
            self.pad_token_id = {"roberta": 1, "gpt2": None}.get(self.model_type, 0)
        if self.add_pooler is None:
            self.add_pooler = self.model_type in ("bert", "roberta")
        if self.recurrent:
            # its layers have neither heads nor a feed-forward block
            self.num_attention_heads = self.intermediate_size = 1
        for name, value in FORMS[self.model_type].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
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
        if self.recurrent and self.hidden_size % 2:
            raise ValueError(
                f"hidden_size is {self.hidden_size}: an lstm has half of it in each direction, use an even one"
            )
        if head > 128 and not self.recurrent:
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
        kinds = ("none",) if self.recurrent else ("absolute", "sinusoidal", "rotary")
        if self.position_embedding_type not in kinds:
            raise ValueError(
                f"position_embedding_type is {quoted(self.position_embedding_type)}: choose "
                f"{listed(map(repr, kinds))}, relative positions are not supported"
            )
        self._check_form()
        if self.problem_type not in PROBLEM_TYPES:
            raise ValueError(
                f"problem_type is {quoted(self.problem_type)}: choose one of {PROBLEM_TYPES}"
            )
        if self.int8_bits not in (None, 12, 8):
            raise ValueError(f"int8_bits is {quoted(self.int8_bits)}: it must be 12 or 8")
        if self.int8_embeddings and self.int8_bits is None:
            raise ValueError("int8_embeddings is true without int8_bits: set both")
        for key, why in REFUSED.items():
            if self.extra.get(key):
                raise ValueError(f"{key} is set: {why}")

    def _check_form(self) -> None:
        if (self.local_attention or 0) < 0 or self.global_attn_every_n_layers < 1:
            raise ValueError(
                f"local_attention is {self.local_attention} and global_attn_every_n_layers "
                f"{self.global_attn_every_n_layers}: they must be at least 0 and 1"
            )
        if self.local_attention == 1:
            raise ValueError(
                "local_attention is 1: a token would see itself alone, use at least 2, or 0 for no local layers"
            )
        if not (self.rope_theta > 0.0 and self.local_rope_theta > 0.0):
            raise ValueError("rope_theta and local_rope_theta must be above 0")
        if self.rotary and self.head_size % 2:
            raise ValueError(
                f"the head size is {self.head_size}: rotary positions turn pairs, use an even one"
            )
        if self.gated and self.approximate is None:
            raise ValueError(f"hidden_act is {quoted(self.hidden_act)}: a gate takes a GELU")
        pooling = self.classifier_pooling
        if pooling not in ("cls", "mean") and not self.causal:
            raise ValueError(f"classifier_pooling is {quoted(pooling)}: choose cls or mean")
        one = {**FORMS["lstm"], "int8_bits": None, "layer_heads": None, "layer_widths": None}
        other = [name for name, value in one.items() if getattr(self, name) != value]
        if self.recurrent and other:
            raise ValueError(
                f"{other[0]} is {quoted(getattr(self, other[0]))}: the layers of an lstm have one form, leave it out"
            )
        if self.is_mixed and self.model_type in ("distilbert", "gpt2"):
            raise ValueError(f"a {self.model_type} of another form: set model_type to bert")

    @property
    def rotary(self) -> bool:
        """Whether attention turns queries and keys by their positions; the embeddings have no positions then."""
        return self.position_embedding_type == "rotary"

    @property
    def recurrent(self) -> bool:
        """Whether the layers are bidirectional LSTMs, which have no attention."""
        return self.model_type == "lstm"

    @property
    def causal(self) -> bool:
        """Whether a token sees only itself and the tokens before it."""
        return self.model_type == "gpt2"

    @property
    def is_mixed(self) -> bool:
        """Whether transformers has no model of this form, so that from_pretrained alone loads it."""
        if self.model_type in ("modernbert", "gpt2"):
            wanted = FORMS[self.model_type]
            free = {"biases", "local_attention"} if self.model_type == "modernbert" else set()
            other = any(getattr(self, n) != wanted[n] for n in wanted.keys() - free)
            return other or bool(self.add_pooler or self.type_vocab_size)
        if self.recurrent:
            return True
        return bool(
            self.pre_norm or self.gated or self.rotary or self.local_attention or not self.biases
        )

    @property
    def windows(self) -> list[tuple[int, int] | None]:
        """The tokens before and behind that a token of each layer sees, None for all."""
        if self.causal:
            return [(-1, 0)] * self.num_hidden_layers
        half, every = (self.local_attention or 0) // 2, self.global_attn_every_n_layers
        local = (half, half) if self.local_attention else None
        return [local if i % every else None for i in range(self.num_hidden_layers)]

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
    def classifier_pooling(self) -> str:
        """What of a sequence is classified: its first token ("cls"), its tokens' "mean", or a GPT's "last" token."""
        own = {"modernbert": "cls", "lstm": "mean"}.get(self.model_type)
        other = "last" if self.causal else "cls"
        return self.extra.get("classifier_pooling", own) if own else other

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
        """Read the contents of a config.json of one of the families; unknown keys are kept in `extra`.

        Raises ValueError for settings that no model here has (relative positions, decoders).
        """
        return cls(**config_json.read(values, [f.name for f in dataclasses.fields(cls)]))

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json in the family's own spelling, with the keys that from_dict kept."""
        return config_json.write(self)

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


def model_folder(path: str | Path) -> Path:
    """The folder of a checkpoint; raises FileNotFoundError where there is none, ValueError for a file."""
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"there is no directory {path}: pass one with a config.json and weights, hub names are not looked up"
        )
    if os.path.isfile(path):
        raise ValueError(f"{path} is a file: pass the directory that holds it and its config.json")
    return Path(path)
