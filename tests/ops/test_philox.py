"""The definition of dropout: known answers, statistics, independence of shape, and equality over backends."""

import pytest
import torch

import fastbert
from fastbert import functional
from fastbert.backend import chooser
from fastbert.backend.reference import philox


def _words(counter, key):
    """philox4x32_10 for one counter and one key, each a tuple of 32-bit words."""
    seed = key[0] | key[1] << 32
    seed = torch.tensor([seed - 2**64 if seed >> 63 else seed])
    return tuple(int(w) for w in philox.philox4x32_10(*(torch.tensor(c) for c in counter), seed))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    """The vectors published with Random123 (Salmon et al. 2011)."""
    assert _words(counter, key) == expected


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_statistics(p):
    keep = philox.keep_mask(torch.tensor([11]), 2, 1000, 1000, p)
    sigma = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(float(keep.float().mean()) - (1 - p)) < 5 * sigma
    columns = keep.float().mean(0)
    assert float((columns - (1 - p)).abs().max()) < 5 * (p * (1 - p) / 1000) ** 0.5


def test_bits_depend_on_absolute_indices_only():
    seed = torch.tensor([5])
    whole = philox.keep_mask(seed, 1, 9, 30, 0.3)
    assert torch.equal(whole[:4, :7], philox.keep_mask(seed, 1, 4, 7, 0.3))
    rows = torch.tensor([7, 2, 5])
    assert torch.equal(whole[rows], philox.keep_mask(seed, 1, rows, 30, 0.3))
    assert not torch.equal(whole, philox.keep_mask(seed, 2, 9, 30, 0.3))
    assert not torch.equal(whole, philox.keep_mask(seed + 1, 1, 9, 30, 0.3))
    attention = philox.attention_keep_mask(seed, 1, torch.arange(6), 8, 8, 0.3)
    assert torch.equal(
        attention[4, :5, :3], philox.attention_keep_mask(seed, 1, torch.tensor(4), 5, 3, 0.3)
    )


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_every_backend_drops_the_same_elements(name):
    """With residual 0 the saved sum is positive exactly where dropout keeps an element of x."""
    if reason := chooser.matrix()["dropout_add_layer_norm"][name]:
        pytest.skip(reason)
    x, seed = torch.ones(37, 101), torch.tensor([-123456789])
    kept = []
    for which in (name, "reference"):
        module = chooser.module(which, "dropout_add_layer_norm")
        args = (
            x,
            torch.zeros_like(x),
            torch.ones(101),
            torch.zeros(101),
            1e-12,
            0.2,
            seed,
            9,
            None,
        )
        kept.append(module.forward(*args, True)[1] > 0)
    assert torch.equal(*kept)


def test_seed_is_drawn_from_torchs_generator():
    x, w, b = torch.randn(8, 16), torch.ones(16), torch.zeros(16)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(functional.dropout_add_layer_norm(x, x, w, b, p=0.5))
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], functional.dropout_add_layer_norm(x, x, w, b, p=0.5))


def test_eager_equals_compiled_for_a_seed():
    x, w, b, seed = torch.randn(8, 16), torch.ones(16), torch.zeros(16), torch.tensor([4])

    def step(x, seed):
        return functional.dropout_add_layer_norm(x, x, w, b, p=0.5, seed=seed, site=3)

    with fastbert.use("torch"):
        assert torch.equal(step(x, seed), torch.compile(step, fullgraph=True)(x, seed))
