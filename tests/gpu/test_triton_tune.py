"""fastbert.tune() over Triton's launch configurations, in the interpreter (a process of `make test`) or on a GPU."""

import dataclasses
from unittest import mock

import pytest
import torch

import fastbert
from fastbert import functional
from fastbert.backend import chooser, tuned
from fastbert.tuning import measure

if chooser.device_of("triton") is None:
    reason = chooser.matrix()["layer_norm"]["triton"] or "there is no GPU and no TRITON_INTERPRET=1"
    pytest.skip(f"Triton's kernels cannot run: {reason}", allow_module_level=True)

from fastbert.kernels import _configured, _launch, layer_norm


@pytest.fixture
def triton_first(monkeypatch, tmp_path):
    """Triton first in the order of its device's backends, and no tuned result before or after."""
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path))
    monkeypatch.setattr(chooser, "tuned_tables", {})
    kind = chooser.device_of("triton")
    monkeypatch.setitem(chooser.ORDER, kind, ("triton", "torch"))
    known = {slug: chooser._candidates(slug, kind) for slug in chooser.SLUGS}
    monkeypatch.setitem(chooser._CANDIDATES, kind, known)
    with mock.patch.dict(_configured._winners, clear=True):
        yield kind


def tuned_step(kind):
    x = torch.randn(5, 24, device=kind, requires_grad=True)
    return lambda: functional.layer_norm(x, torch.ones(24, device=kind)).sum().backward()


def test_tune_climbs_to_the_fastest_configuration_and_stores_it(triton_first, monkeypatch):
    """The times are made up, so that the result is known: more rows and fewer warps are faster."""
    where = torch.device(triton_first, 0) if triton_first == "cuda" else torch.device("cpu")
    arch = _launch.arch(where)
    call = ("rows", (24, arch))
    own = _launch.rows(24, arch)

    def measured(self, asked, configs):
        assert asked[0] in ("rows", "persistent_rows")
        return {c: c.num_warps + 8.0 / c.ROWS for c in configs}

    monkeypatch.setattr(measure._Search, "_measured", measured)
    found = fastbert.tune(tuned_step(triton_first), rounds=1)
    assert own.ROWS == own.num_warps == 1
    assert _launch.rows(24, arch) == dataclasses.replace(own, ROWS=16)
    assert tuned.configurations()[call] == {"ROWS": 16}
    times = found["triton's configurations"][f"rows 24 {arch}"]
    assert times["ROWS 16, num_warps 1"] == 1.5e6
    assert found["layer_norm"].keys()
    # as in another process, which reads the stored ones when it defines the function
    with mock.patch.object(_configured, "_stored", tuned.configurations()):
        again = _configured.configured()(_launch.rows.__wrapped__)
    assert again(24, arch).ROWS == 16


def test_tune_measures_and_results_stay(triton_first):
    torch.manual_seed(0)
    x = torch.randn(5, 24, device=triton_first)
    with fastbert.use("triton"):
        before = functional.layer_norm(x)
    found = fastbert.tune(tuned_step(triton_first), rounds=1)
    candidates = found["triton's configurations"]
    assert {name.split()[0] for name in candidates} == {"rows", "persistent_rows"}
    assert all(len(times) > 2 and min(times.values()) > 0 for times in candidates.values())
    with fastbert.use("triton"):
        torch.testing.assert_close(functional.layer_norm(x), before)


def fail(y):
    raise RuntimeError("out of shared memory")


def spoil(y):
    y[2:3] += 0.01


@pytest.mark.parametrize("harm", [fail, spoil])
def test_a_configuration_that_fails_or_has_other_results_is_left_out(
    harm, triton_first, monkeypatch
):
    run = layer_norm._layer_norm_fwd_kernel

    class Harmed:
        def __getitem__(self, grid):
            def launch(x, weight, bias, y, *args, **options):
                run[grid](x, weight, bias, y, *args, **options)
                if options["ROWS"] > 1:
                    harm(y)

            return launch

    monkeypatch.setattr(layer_norm, "_layer_norm_fwd_kernel", Harmed())
    found = fastbert.tune(tuned_step(triton_first), rounds=1)["triton's configurations"]
    for name, times in found.items():
        if name.startswith("rows"):
            assert not any("ROWS 2" in shown for shown in times)


def test_without_configurations(triton_first):
    found = fastbert.tune(tuned_step(triton_first), rounds=1, configurations=False)
    assert found.keys() == {"layer_norm"}


def test_the_step_s_own_error_is_the_user_s(triton_first):
    step, calls = tuned_step(triton_first), []

    def failing():
        calls.append(None)
        if len(calls) > 1:
            raise IndexError("no batch left")
        step()

    with pytest.raises(IndexError, match="no batch left"):
        fastbert.tune(failing, rounds=1)


@pytest.mark.parametrize(
    "fields", [{"OLD": 1}, {"ROWS": 3}, {"ROWS": "2"}, {"num_warps": 64}, {"BLOCK_C": 8}]
)
def test_a_stored_configuration_that_is_none_is_left_out(fields, caplog):
    arguments = (24, _launch.arch(torch.device(chooser.device_of("triton"), 0)))
    assert _configured._restored(_launch.rows, arguments, fields) is None
    assert _configured._restored(_launch.rows, (24,), {"ROWS": 2}) is None
    assert _configured._restored(_launch.rows, arguments, {"ROWS": 2}).ROWS == 2
    assert "run fastbert.tune() again" in caplog.text
