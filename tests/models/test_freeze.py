"""Prepacked weights for inference: same results, no stale weights, a sentence where layers are unusual."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import fastbert
from fastbert.backend import cpu
from fastbert.bert import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel
from fastbert.nn import blocks, watch
from fastbert.runners import copies

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bytes_of_the_copies_alone(dtype):
    model = fastbert.freeze(BertModel(CONFIG).to(dtype))
    assert fastbert.frozen_bytes(model) == 0
    hidden(model, batch())
    parameters = list(model.layers.parameters())
    matrices = [p.shape for p in parameters if p.dim() == 2]
    size = 4 * sum(cpu.native.linear_packed_size(cpu.DTYPES[dtype], *shape) for shape in matrices)
    if dtype == torch.bfloat16:  # fp32 vectors are read in place
        size += 4 * sum(p.numel() for p in parameters if p.dim() == 1)
    assert fastbert.frozen_bytes(model) == size
    assert fastbert.frozen_bytes(fastbert.unfreeze(model)) == 0


def _in_place(model):
    with torch.no_grad():
        model.layers[1].feed_forward.up.weight.mul_(1.5)


def _in_inference_mode(model):
    with torch.inference_mode():
        model.layers[1].feed_forward.up.weight.mul_(1.5)


def _data(model):
    weight = model.layers[1].feed_forward.up.weight
    weight.data = weight.data * 1.5


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


def _other_layers(model):
    model.layers = BertModel(CONFIG).eval().layers[:1]


def _append(model):
    model.layers.append(copy.deepcopy(model.layers[0]))


def _delete(model):
    del model.layers[1]


class Negated(blocks.FeedForward):
    def forward(self, x):
        return -super().forward(x)


def _set(part, name, value):
    def change(model):
        setattr(model.layers[1].get_submodule(part), name, value)

    change.__name__ = name.strip("_")
    return change


def _forward(model):
    layer = model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args: forward(*args) * 1.5


def _widths(model):
    # the layer is consistent, but its widths differ from the configuration
    torch.manual_seed(1)
    forward = model.layers[1].feed_forward
    forward.up, forward.down = blocks.Linear(48, 80).eval(), blocks.Linear(80, 48).eval()


CHANGES = [
    _in_place,
    _in_inference_mode,
    _data,
    _other_layers,
    _append,
    _delete,
    _set("feed_forward", "approximate", None),
    _set("feed_forward", "__class__", Negated),
    _set("output_norm", "eps", 1.0),
    _set("attention.qkv", "num_heads", 2),
    _forward,
    _widths,
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


def test_a_packed_address_is_not_given_away_until_the_next_forward():
    model, inputs = fastbert.freeze(BertModel(CONFIG)), batch()
    hidden(model, inputs)
    weight = model.layers[1].feed_forward.up.weight
    memory = StorageWeakRef(weight.untyped_storage())
    weight.data = weight.data * 1.5
    assert not memory.expired()
    hidden(model, inputs)
    assert memory.expired()


def test_a_layer_in_training_drops_out():
    model, inputs = fastbert.freeze(BertModel(CONFIG)), batch()
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        model.layers[1].train()
        assert not torch.equal(model(**inputs).last_hidden_state, before)
        model.layers[1].eval()
        assert torch.equal(model(**inputs).last_hidden_state, before)


def test_the_instruction_set_is_part_of_the_layout():
    model, inputs, before = fastbert.freeze(BertModel(CONFIG)), batch(), cpu.native.isa()
    try:
        for isa in cpu.native.isas():
            cpu.native.use_isa(isa)
            ours = hidden(model, inputs)
            assert torch.equal(ours, hidden(copy.deepcopy(model), inputs))
    finally:
        cpu.native.use_isa(before)


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


@pytest.fixture
def log(caplog, monkeypatch):
    """The log, with sentences that an earlier test has logged already."""
    monkeypatch.setattr(watch, "_logged", set())
    caplog.set_level("INFO", "fastbert")
    return caplog


def changed(**values):
    return BertModel(BertConfig(**{**vars(CONFIG), **values}))


REFUSED = {
    "the activation is not GELU": lambda: changed(hidden_act="relu"),
    "no list of layers, or an empty one": lambda: changed(num_hidden_layers=0),
    "weight is torch.float16": lambda: BertModel(CONFIG).half(),
    "weight was made in inference mode": torch.inference_mode()(changed),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_with_a_sentence(reason, log):
    model, inputs = REFUSED[reason](), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = hidden(model, inputs)
        assert torch.equal(hidden(fastbert.freeze(model), inputs), expected)
    assert reason in log.text


@pytest.mark.parametrize(("name", "value"), [("layer_norm_eps", 1.0), ("intermediate_size", 50)])
def test_the_layers_count_not_the_configuration(name, value):
    model, inputs = fastbert.freeze(changed()), batch()
    expected = hidden(model, inputs)
    setattr(model.config, name, value)
    assert torch.equal(hidden(model, inputs), expected)


def test_a_missing_bias_is_not_made_up(log):
    model, inputs = fastbert.freeze(BertModel(CONFIG)), batch()
    before = hidden(model, inputs)
    model.layers[1].output_norm.bias.data.fill_(0.5)
    model.layers[1].output_norm.bias = None
    found = hidden(model, inputs)
    torch.testing.assert_close(found, before)  # a fresh bias is zero
    assert model.frozen._packs
    assert "one by one" not in log.text
    torch.testing.assert_close(found, hidden(fastbert.unfreeze(model), inputs))


def test_gradients_are_named_as_the_reason(log):
    model, inputs = fastbert.freeze(BertModel(CONFIG)), batch()
    assert model(**inputs).last_hidden_state.requires_grad
    assert "under torch.no_grad()" in log.text


def test_nothing_to_train_needs_no_no_grad():
    model, inputs = fastbert.freeze(BertModel(CONFIG)).requires_grad_(False), batch()
    ours = model(**inputs).last_hidden_state
    assert model.frozen._packs
    assert torch.equal(ours, hidden(fastbert.unfreeze(model), inputs))
    fastbert.freeze(model)(**inputs)
    model.layers[2].output_norm.bias.requires_grad_()  # one weight of a packed layer
    assert model(**inputs).last_hidden_state.requires_grad


@torch.no_grad()
def test_what_does_not_fit_is_not_served():
    model = fastbert.freeze(BertModel(CONFIG))
    serves = model.frozen.serves
    assert serves(model, torch.zeros(3, 48))
    assert not serves(model, torch.zeros(3, 47))
    assert not serves(model, torch.zeros(3, 48, device="meta"))
    assert fastbert.frozen_bytes(model) == 0
    model.layers.to("meta")
    assert not serves(model, torch.zeros(3, 48))


def saved(model):
    """The model after torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, saved, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_no_addresses_and_is_watched(way, monkeypatch):
    model, inputs = fastbert.freeze(BertModel(CONFIG)), batch()
    expected = hidden(model, inputs)
    # as in a process that has frozen nothing itself
    monkeypatch.setattr(copies, "_live", weakref.WeakSet())
    copied = way(model)
    assert fastbert.frozen_bytes(copied) == 0
    assert torch.equal(hidden(copied, inputs), expected)
    assert fastbert.frozen_bytes(copied) > 0
    _fused_adamw(copied)
    assert torch.equal(hidden(copied, inputs), hidden(fastbert.unfreeze(copied), inputs))


def test_optimizers_are_watched_from_the_first_copy_on(monkeypatch):
    hooks = []
    monkeypatch.setattr(copies, "register_optimizer_step_post_hook", hooks.append)
    copies._watch_optimizers.cache_clear()
    model = fastbert.freeze(BertModel(CONFIG))
    assert not hooks
    hidden(pickle.loads(pickle.dumps(model)), batch())
    hidden(model, batch())
    assert hooks == [copies._stepped]
    copies._watch_optimizers.cache_clear()


def test_steps_cost_nothing_where_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(copies, "_live", weakref.WeakSet())
    model = fastbert.freeze(BertModel(CONFIG))
    hidden(model, batch())
    with pytest.raises(AttributeError, match="param_groups"):
        copies._stepped(object())
    model.frozen.drop()
    copies._stepped(object())


def test_only_fastbert_models_can_be_frozen():
    with pytest.raises(TypeError, match="Linear has no fastbert encoder"):
        fastbert.freeze(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("bounds", [[0, 4, 1_000_000], [0, 7, 5], [0, -3, 9], [2, 4, 9]])
def test_bad_cu_seqlens_are_refused_as_without_copies(bounds):
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
