"""Random numbers are a function of key and counter."""

import numpy as np

from fastbert.data import rng

# with other keys, held-out documents, pairs, masks and batches would change, also in runs that are resumed
KEYS = {
    "HELD_OUT_DOCUMENTS": 0x499CE8FCBFD7D931,
    "PAIRS": 0xEC73BED1F9EC25C0,
    "RANDOM_NEXT": 0xA55B9F2DAAB07AA4,
    "DOCUMENTS": 0x9443ACEFDA9E2639,
    "MASKS": 0x758DC05F1F517550,
    "BATCHES": 0x2D65158A799492A9,
    "EXAMPLES": 0x70DD73215288B15B,
    "REPLACED": 0xBAC5F552C63AF466,
    "HELD_OUT_IMAGES": 0x318D90E11817E54D,
    "IMAGES": 0x36E182FD9D5FBE3A,
    "CAPTIONS": 0x827318907376B279,
}


def test_keys_of_all_purposes_are_the_recorded_ones():
    assert {p.name: int(rng.derive(7, 3, p)[0]) for p in rng.Purpose} == KEYS


def test_draws_depend_on_nothing_else():
    key, counter = rng.derive(7, 3, rng.Purpose.MASKS), np.arange(100)
    whole = rng.bits(key, counter)
    assert len(set(whole.tolist())) == 100
    assert (rng.bits(key, counter[60:]) == whole[60:]).all()
