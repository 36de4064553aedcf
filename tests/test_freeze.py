"""Packed weights for inference: same results, no stale weight that can be seen, refused where layers are unusual."""

import copy
import io

import pytest
import torch

import fastbert
from fastbert import cpu
from fastbert.bert import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

if cpu.native is None:
    pytest.skip(str(cpu.unavailable), allow_module_level=True)

CONFIG = BertConfig(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=100,
    max_position_embeddings=40,
)


def batch():
    """Three sequences of unequal length, one of them empty."""
    ids = torch.randint(5, 97, (4, 19))
    mask = (torch.arange(19) < torch.tensor([19, 3, 0, 11])[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def hidden(model, inputs, **options):
    """The last hidden state without gradients."""
    return model.eval()(**inputs, **options).last_hidden_state


@pytest.mark.parametrize("isa", cpu.native.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_result(dtype, isa):
    model, inputs = BertModel(CONFIG), batch()
    before = cpu.native.isa()
    cpu.native.use_isa(isa)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            expected = hidden(model, inputs)
            ours = hidden(fastbert.freeze(model), inputs)
    finally:
        cpu.native.use_isa(before)
    assert model.frozen._packs
    # the same kernels in the same order
    assert torch.equal(ours, expected)


def test_rows_of_the_last_layer():
    model, inputs = BertForSequenceClassification(CONFIG).eval(), batch()
    with torch.no_grad():
        expected = model(**inputs).logits
        ours = fastbert.freeze(model)(**inputs).logits
    assert model.bert.frozen._packs
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_bytes_are_reported_and_given_back():
    model = fastbert.freeze(BertModel(CONFIG))
    assert fastbert.frozen_bytes(model) == 0
    hidden(model, batch())
    weights = sum(p.nbytes for p in model.layers.parameters())
    assert weights <= fastbert.frozen_bytes(model) <= 1.5 * weights
    assert fastbert.frozen_bytes(fastbert.unfreeze(model)) == 0


def _in_place(model):
    with torch.no_grad():
        model.layers[1].feed_forward.up.weight.mul_(1.5)


def _fused_adamw(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def _load(model):
    model.load_state_dict({k: v * 1.25 for k, v in model.state_dict().items()})


def _replace_parameter(model):
    layer = model.layers[2].attention.out
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)


def _replace_module(model):
    model.layers[0].attention.out = torch.nn.Linear(48, 48)


def _hook(model):
    model.layers[0].feed_forward.register_forward_hook(lambda m, args, y: y * 1.5)


def _parametrize(model):
    class Double(torch.nn.Module):
        def forward(self, w):
            return 2 * w

    torch.nn.utils.parametrize.register_parametrization(
        model.layers[0].attention.out, "weight", Double()
    )


def _move(model):
    model.double().float()
    with torch.no_grad():
        model.layers[0].attention.out.bias.add_(1.0)


CHANGES = [
    _in_place,
    _fused_adamw,
    _load,
    _replace_parameter,
    _replace_module,
    _hook,
    _parametrize,
    _move,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_a_change_is_seen(change):
    model, inputs = fastbert.freeze(BertModel(CONFIG)), batch()
    before = hidden(model, inputs)
    change(model)
    ours = hidden(model, inputs)
    assert not torch.equal(ours, before)
    torch.testing.assert_close(ours, hidden(fastbert.unfreeze(model), inputs))


def test_training_and_hidden_states_run_unfrozen():
    model, inputs = fastbert.freeze(BertForMaskedLM(CONFIG)), batch()
    assert model(**inputs).logits.requires_grad
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert not model.bert.frozen._packs


def test_a_forced_backend_is_respected():
    model, inputs = fastbert.freeze(BertModel(CONFIG)), batch()
    with fastbert.use("torch"):
        hidden(model, inputs)
    assert not model.frozen._packs


def test_relu_is_refused_with_a_sentence(caplog):
    config = BertConfig(**{**vars(CONFIG), "hidden_act": "relu"})
    model, inputs = BertModel(config), batch()
    expected = hidden(model, inputs)
    with caplog.at_level("INFO", "fastbert"):
        assert torch.equal(hidden(fastbert.freeze(model), inputs), expected)
    assert "the activation is not GELU" in caplog.text


def test_copies_and_files_hold_no_addresses():
    model, inputs = fastbert.freeze(BertModel(CONFIG)), batch()
    expected = hidden(model, inputs)
    assert torch.equal(hidden(copy.deepcopy(model), inputs), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert fastbert.frozen_bytes(loaded) == 0
    assert torch.equal(hidden(loaded, inputs), expected)


def test_only_fastbert_models_can_be_frozen():
    with pytest.raises(TypeError, match="Linear has no fastbert encoder"):
        fastbert.freeze(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("bounds", [[0, 4, 1_000_000], [0, 7, 5], [0, -3, 9], [2, 4, 9]])
def test_bad_cu_seqlens_are_refused_as_without_freezing(bounds):
    ids = torch.randint(5, 97, (9,))
    given = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "max_seqlen": 9}
    for change in (fastbert.freeze, fastbert.unfreeze):
        model = change(BertModel(CONFIG))
        with pytest.raises((ValueError, IndexError), match=r"_seqlen|positions"):
            hidden(model, {"input_ids": ids}, **given)


def test_strided_cu_seqlens():
    ids = torch.randint(5, 97, (9,))
    bounds = torch.tensor([[0, 70], [4, 71], [9, 72]], dtype=torch.int32)[:, 0]
    model = fastbert.freeze(BertModel(CONFIG))
    found = hidden(model, {"input_ids": ids}, cu_seqlens=bounds, max_seqlen=5)
    expected = hidden(model, {"input_ids": ids}, cu_seqlens=bounds.contiguous(), max_seqlen=5)
    assert torch.equal(found, expected)
