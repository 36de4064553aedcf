"""fastbert.nn.LSTM against torch.nn.LSTM: outputs, states and every gradient, for every kind of input."""

import copy
import logging
import pickle

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from fastbert import nn
from fastbert.backend import chooser, cpu

LENGTHS = (5, 9, 1, 7)
C, H = 6, 11
MODELS = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "two layers": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False, "num_layers": 2},
}


def twins(**options):
    """Ours and torch's with the same weights."""
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(C, H, **options)
    ours = nn.LSTM(C, H, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def states(model, batch):
    """Initial states that need gradients."""
    generator = torch.Generator().manual_seed(1)
    size = (model.num_layers * (1 + model.bidirectional), batch, H)
    return tuple(torch.randn(size, generator=generator).requires_grad_() for _ in range(2))


def flat(y):
    return y.data if isinstance(y, PackedSequence) else y


def results(model, x, hx=None, **options):
    """Output, states, and the gradients of the input, initial states and parameters."""
    leaf = flat(x).detach().clone().requires_grad_()
    given = leaf
    if isinstance(x, PackedSequence):
        given = PackedSequence(leaf, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
    hx = None if hx is None else tuple(t.detach().clone().requires_grad_() for t in hx)
    y, (h, c) = model(given, hx, **options)
    found = [flat(y), h, c]
    generator = torch.Generator().manual_seed(2)
    loss = sum((t * torch.randn(t.shape, generator=generator)).sum() for t in found)
    leaves = [leaf, *(hx or ()), *model.parameters()]
    return found, list(torch.autograd.grad(loss, leaves))


def agree(ours, theirs):
    for a, b in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def inputs():
    """{kind: (input, whether batch_first, batch size)}."""
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(n, C, generator=generator) for n in LENGTHS]
    padded = torch.nn.utils.rnn.pad_sequence(parts)
    ordered = sorted(parts, key=len, reverse=True)
    return {
        "padded": (padded, False, 4),
        "batch first": (padded.transpose(0, 1), True, 4),
        "one sequence": (padded[:, 0], False, None),
        "one sequence, batch first": (padded[:, 0], True, None),
        "sorted PackedSequence": (pack_sequence(ordered), False, 4),
        "PackedSequence": (pack_sequence(parts, enforce_sorted=False), True, 4),
    }


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("kind", inputs())
@pytest.mark.parametrize("name", MODELS)
def test_torchs_results(name, kind, given, caplog):
    x, batch_first, batch = inputs()[kind]
    ours, theirs = twins(batch_first=batch_first, **MODELS[name])
    hx = None
    if given:
        hx = states(ours, batch or 1)
        hx = hx if batch else tuple(t.squeeze(1) for t in hx)
    with caplog.at_level(logging.INFO, "fastbert"):
        found = results(ours, x, hx)
    assert not caplog.records, "torch's own code ran"
    agree(found, results(theirs, x, hx))
    if isinstance(x, PackedSequence):
        y = ours(x)[0]
        assert isinstance(y, PackedSequence)
        for mine, same in zip(y[1:], x[1:], strict=True):
            assert mine is same or torch.equal(mine, same)


def packed(lengths, tail=0):
    """Packed tokens with rows of NaN past the end, and the arguments that say where sequences are."""
    x = torch.randn(sum(lengths) + tail, C, generator=torch.Generator().manual_seed(4))
    x[sum(lengths) :] = float("nan")
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return x, {"cu_seqlens": bounds, "max_seqlen": max(lengths)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["op", "torch's own"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_tokens(name, given, dtype):
    """As a PackedSequence of the same sequences."""
    ours, theirs = (m.to(dtype) for m in twins(**MODELS[name]))
    x, where = packed(LENGTHS)
    x = x.to(dtype)
    hx = tuple(t.to(dtype) for t in states(ours, 4)) if given else None
    (y, h, c), grads = results(ours, x, hx, **where)
    order = pack_sequence(list(torch.arange(len(x)).split(LENGTHS)), enforce_sorted=False)
    sequence = pack_sequence(x.split(LENGTHS), enforce_sorted=False)

    class Reordered(torch.nn.Module):
        """torch's LSTM with rows of its PackedSequence put back in our order."""

        def forward(self, leaf, hx):
            data = PackedSequence(leaf[order.data], *sequence[1:])
            out, last = theirs(data, hx)
            return torch.empty_like(out.data).index_copy(0, order.data, out.data), last

    module = Reordered()
    module.parameters = theirs.parameters
    agree(([y, h, c], grads), results(module, x, hx))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["op", "torch's own"])
def test_empty_sequences_and_rows_past_the_end(dtype):
    ours, _ = twins(num_layers=2, bidirectional=True)
    ours = ours.to(dtype)
    hx = tuple(t.to(dtype) for t in states(ours, 4))
    x, where = packed((3, 0, 4, 0), tail=2)
    x = x.to(dtype).requires_grad_()
    y, (h, c) = ours(x, hx, **where)
    assert torch.equal(y[7:], torch.zeros(2, 2 * H, dtype=dtype))
    (y.sum() + c.sum()).backward()
    assert torch.equal(x.grad[7:], torch.zeros(2, C, dtype=dtype))
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())
    assert torch.equal(h[:, 1::2], hx[0][:, 1::2])
    assert torch.equal(c[:, 1::2], hx[1][:, 1::2])
    _, where = packed((3, 4))
    expected, (h_2, _) = ours(x[:7].to(dtype), tuple(t[:, ::2].contiguous() for t in hx), **where)
    torch.testing.assert_close(y[:7], expected)
    torch.testing.assert_close(h[:, ::2], h_2)
    for tail in (0, 2):
        nothing, where = packed((0, 0), tail)
        y, (h, c) = ours(nothing.to(dtype), hx=tuple(t[:, :2] for t in hx), **where)
        assert torch.equal(y, torch.zeros(tail, 2 * H, dtype=dtype))
        assert torch.equal(h, hx[0][:, :2])


@pytest.mark.skipif(cpu.native is None, reason=f"no native module: {cpu.unavailable}")
def test_a_sequence_has_the_same_bits_in_every_layout():
    """Packed, alone, padded and in a PackedSequence; the gemm of all tokens also has fixed sums."""
    ours, _ = twins(num_layers=2, bidirectional=True)
    x, where = packed(LENGTHS)
    whole = ours(x, **where)[0].split(LENGTHS)
    for part, y in zip(x.split(LENGTHS), whole, strict=True):
        assert torch.equal(ours(part)[0], y)
    sequence = ours(pack_sequence(x.split(LENGTHS), enforce_sorted=False))[0]
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(sequence, batch_first=True)
    for b, y in enumerate(whole):
        assert torch.equal(padded[b, : LENGTHS[b]], y)


def test_dropout_between_layers():
    """Between layers alone, in training alone, repeated by the seed."""
    ours, _ = twins(num_layers=2, dropout=0.5)
    x, where = packed(LENGTHS)
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        found.append(ours(x, **where)[0])
    assert torch.equal(*found)
    assert not torch.equal(found[0], ours(x, **where)[0])
    ours.eval()
    still = ours(x, **where)[0]
    assert torch.equal(still, ours(x, **where)[0])
    ours.dropout = 0.0
    assert torch.equal(still, ours.train()(x, **where)[0])
    ours.dropout = 1.0
    assert torch.isfinite(ours(x, **where)[0]).all()


def test_state_dict_and_initial_values():
    torch.manual_seed(5)
    theirs = torch.nn.LSTM(C, H, 2, bidirectional=True)
    torch.manual_seed(5)
    ours = nn.LSTM(C, H, 2, bidirectional=True)
    assert isinstance(ours, torch.nn.LSTM)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, same in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, same)
    theirs.load_state_dict(ours.state_dict())
    assert nn.LSTM(C, H, device="meta", dtype=torch.bfloat16).weight_hh_l0.is_meta


def test_copies():
    ours, _ = twins(num_layers=2, bidirectional=True)
    x = torch.randn(5, 3, C)
    expected = ours(x)[0]
    for made in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(made) is nn.LSTM
        assert torch.equal(made(x)[0], expected)
        made.weight_hh_l0.data.zero_()
        assert not torch.equal(made(x)[0], expected)
    assert torch.equal(ours(x)[0], expected)


@pytest.mark.parametrize("kind", ["float64", "half", "functorch"])
def test_torchs_own_code_runs_where_the_op_cannot(kind, caplog):
    ours, theirs = twins()
    x = torch.randn(5, 3, C)
    with caplog.at_level(logging.INFO, "fastbert"):
        if kind == "functorch":
            y = torch.func.functional_call(ours, dict(ours.named_parameters()), (x,))[0]
            assert torch.equal(y, ours(x)[0])
            return
        dtype = {"float64": torch.float64, "half": torch.float16}[kind]
        y = ours.to(dtype)(x.to(dtype))[0]
    assert torch.equal(y, theirs.to(dtype)(x.to(dtype))[0])


def test_bf16():
    ours, theirs = twins(num_layers=2, bidirectional=True)
    x = torch.randn(5, 3, C)
    truth = theirs(x)[0]
    for y in (ours.bfloat16()(x.bfloat16())[0],):
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), truth, rtol=0.05, atol=0.02)


def test_autocast():
    ours, theirs = twins(num_layers=2, bidirectional=True)
    x = torch.randn(5, 3, C)
    with torch.autocast("cpu", torch.bfloat16):
        y, (h, c) = ours(x)
        (y.float().sum() + c.float().sum()).backward()
    assert {y.dtype, h.dtype, c.dtype} == {torch.bfloat16}
    torch.testing.assert_close(y.float(), theirs(x)[0], rtol=0.05, atol=0.02)
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.any()) for p in ours.parameters())


def test_the_torch_backend_agrees():
    ours, theirs = twins(num_layers=2, bidirectional=True)
    x = inputs()["PackedSequence"][0]
    with chooser.use("torch"):
        found = results(ours, x)
    agree(found, results(theirs, x))


class Called(torch.nn.Module):
    """A module that calls an LSTM."""

    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm

    def forward(self, x):
        return self.lstm(x)[0]


class Packed(Called):
    """A module that calls an LSTM with packed tokens."""

    def __init__(self, lstm, **where):
        super().__init__(lstm)
        self.where = where

    def forward(self, x):
        return self.lstm(x, **self.where)[0]


def test_exporters_find_torchs_module():
    ours, theirs = twins(batch_first=True)
    x = torch.randn(2, 5, C)
    traced = torch.jit.trace(ours, (x,), check_trace=False)
    assert "aten::lstm" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x)[0], theirs(x)[0])
    program = torch.export.export(ours, (x,))
    torch.testing.assert_close(program.module()(x)[0], theirs(x)[0])
    # packed tokens are no argument of torch's module
    x, where = packed((3, 2))
    sentence = "cu_seqlens is given while an exporter looks"
    with pytest.raises(NotImplementedError, match=sentence):
        torch.export.export(ours, (x,), where)
    with pytest.raises(NotImplementedError, match=sentence):
        torch.export.export(Packed(ours, **where), (x,))
    with pytest.raises(NotImplementedError, match=sentence):
        torch.jit.trace(Packed(ours, **where), (x,))
    # torch.jit.script gives a module with overloads no forward of its own: another module has to call it
    x = torch.randn(2, 5, C)
    scripted = torch.jit.script(Called(ours))
    torch.testing.assert_close(scripted(x), theirs(x)[0])


def test_compile():
    ours, theirs = twins(num_layers=2, bidirectional=True)
    x = torch.randn(5, 3, C)
    y = torch.compile(ours, backend="aot_eager")(x)[0]
    torch.testing.assert_close(y, theirs(x)[0], rtol=1e-4, atol=2e-5)


X, WHERE = packed((3, 2))
Y = torch.zeros(5, 2, C)
STATE = torch.zeros(1, 2, H)
REFUSED = {
    "directions": (lambda: nn.LSTM(C, H, bidirectional="yes"), "bidirectional is 'yes'"),
    "a list": (lambda: nn.LSTM(C, H)([1.0]), "the input is a list"),
    "no input": (lambda: nn.LSTM(C, H)(None), "the input is a NoneType"),
    "three states": (lambda: nn.LSTM(C, H)(Y, (STATE,) * 3), "hx is tuple: pass the two"),
    "one state": (lambda: nn.LSTM(C, H)(Y, (STATE,)), "hx is tuple: pass the two"),
    "h_0 alone": (lambda: nn.LSTM(C, H)(Y, STATE), "hx is Tensor: pass the two"),
    "no states": (lambda: nn.LSTM(C, H)(Y, (None, None)), "hx is tuple: pass the two"),
    "sizes that grow": (
        lambda: nn.LSTM(C, H)(PackedSequence(X, torch.tensor([2, 3]))),
        r"batch_sizes \[2, 3\] of the PackedSequence grow",
    ),
    "too many sizes": (
        lambda: nn.LSTM(C, H)(PackedSequence(X, torch.tensor([4, 4]))),
        "count more than its 5 rows",
    ),
    "a length that is no int": (
        lambda: nn.LSTM(C, H)(X, **{**WHERE, "max_seqlen": 3.0}),
        "max_seqlen is float: pass the longest length",
    ),
    "bounds in a list": (
        lambda: nn.LSTM(C, H)(X, cu_seqlens=[0, 3, 5], max_seqlen=3),
        "cu_seqlens is list: pass a tensor",
    ),
    "projection": (lambda: nn.LSTM(C, H, proj_size=3), "has no projection"),
    "columns": (lambda: nn.LSTM(C + 1, H)(X, **WHERE), "must be equal to input_size"),
    "a length alone": (
        lambda: nn.LSTM(C, H)(X, max_seqlen=3),
        "max_seqlen is 3 without cu_seqlens",
    ),
    "rows, torch's own code": (
        lambda: nn.LSTM(C, H).double()(
            X.double(), cu_seqlens=WHERE["cu_seqlens"] * 2, max_seqlen=9
        ),
        "cu_seqlens ends at 10 but there are 5 tokens",
    ),
    "no length": (
        lambda: nn.LSTM(C, H)(X, cu_seqlens=WHERE["cu_seqlens"]),
        "pass the longest length",
    ),
    "a padded batch with cu_seqlens": (
        lambda: nn.LSTM(C, H)(X[None], **WHERE),
        r"pass packed tokens \(T, C\) with cu_seqlens",
    ),
    "a sequence with cu_seqlens": (
        lambda: nn.LSTM(C, H)(pack_padded_sequence(X[:, None], [5]), **WHERE),
        "the input is PackedSequence: pass packed tokens",
    ),
    "states": (
        lambda: nn.LSTM(C, H)(X, (torch.zeros(1, 3, H),) * 2, **WHERE),
        r"h_0 has shape \(1, 3, 11\): pass \(layers \* directions, B, H\) = \(1, 2, 11\)",
    ),
    "dtype": (lambda: nn.LSTM(C, H)(X.bfloat16(), **WHERE), "does not match weight dtype"),
    "rows": (
        lambda: nn.LSTM(C, H)(X, cu_seqlens=WHERE["cu_seqlens"] * 2, max_seqlen=9),
        "cu_seqlens ends at 10 but there are 5 tokens",
    ),
    "two states": (lambda: nn.LSTM(C, H)(X[:, None], (torch.zeros(1, 2, H),) * 2), "h_0 has shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case):
    call, sentence = REFUSED[case]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=sentence):
        call()
