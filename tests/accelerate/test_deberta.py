"""accelerate() on DeBERTa, v2 and v3: every form of attention with positions, the convolution, fallbacks, freeze."""

import copy
import logging

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from hf_models import accelerated  # noqa: E402
from modern_models import LENGTHS, MASK, B, S, batch, build, close, count_layers  # noqa: E402

import fastbert  # noqa: E402
from fastbert.backend import cpu  # noqa: E402
from fastbert.integrations import disentangled, layers  # noqa: E402
from fastbert.nn.packing import Packing  # noqa: E402

# what differs from DeBERTa-v3
FORMS = {
    "v3": {},
    "projections of their own": {"share_att_key": False},
    "c2p": {"pos_att_type": "c2p", "share_att_key": False},
    "p2c": {"pos_att_type": "p2c", "norm_rel_ebd": "none"},
    "no terms": {"pos_att_type": []},
    "distances of their own": {"position_buckets": -1, "max_relative_positions": 30},
    "clipped distances": {"position_buckets": -1, "max_relative_positions": 5},
    "convolution": {"conv_kernel_size": 3, "conv_act": "gelu"},
    "convolution, one layer": {"conv_kernel_size": 3, "num_hidden_layers": 1},
    "positions in embeddings": {"position_biased_input": True, "type_vocab_size": 2},
    "no relative positions": {"relative_attention": False, "position_biased_input": True},
}


# of the first DeBERTa
FIRST = {
    "c2p": {"pos_att_type": "c2p"},
    "p2c": {"pos_att_type": "p2c"},
    "distances of their own": {"max_relative_positions": 64},
    "unknown kinds": {"pos_att_type": ["c2p", "p2p"]},
    "no relative positions": {"relative_attention": False, "position_biased_input": True},
}
ALL = [("DebertaV2", f) for f in FORMS] + [("Deberta", f) for f in FIRST]


@pytest.mark.parametrize("known", [True, False], ids=["groups", "one group"])
@pytest.mark.parametrize(("family", "form"), ALL, ids=[" ".join(pair) for pair in ALL])
def test_every_form_trains_as_in_transformers(family, form, known, monkeypatch):
    """Outputs and all gradients; on a GPU and in compiled graphs the batch is one group."""
    monkeypatch.setattr(disentangled, "_lengths_known", lambda _: known)
    changes = (FORMS if family == "DebertaV2" else FIRST)[form]
    model = build(family, "ForSequenceClassification", **changes)
    given, calls, found = batch(model, "ForSequenceClassification"), count_layers(monkeypatch), []
    for m in (accelerated(model), model, copy.deepcopy(model).double()):
        m.train()
        out = m(**given, output_hidden_states=True)
        out.loss.backward()
        found.append((out, {n: p.grad for n, p in m.named_parameters() if p.grad is not None}))
    assert len(calls) == model.config.num_hidden_layers
    (ours, of_ours), (stock, of_stock), (truth, of_truth) = found
    close(ours.logits, stock.logits, truth.logits, "logits")
    token = MASK.bool()
    for i, states in enumerate(zip(*(m.hidden_states for m in (ours, stock, truth)), strict=True)):
        close(*(s[token] for s in states), f"hidden state {i}")
    floor = 1e-7 * max(g.abs().max().item() for g in of_truth.values())
    assert all(n in of_ours for n, g in of_truth.items() if g.any())
    for name, gradient in of_ours.items():
        close(gradient, of_stock[name], of_truth[name], name, floor)


@pytest.mark.parametrize("form", ["v3", "convolution, one layer", "no relative positions"])
def test_a_head_of_the_first_tokens_reads_the_same_rows(form):
    model = build("DebertaV2", "ForSequenceClassification", **FORMS[form])
    given = batch(model)
    with torch.no_grad():
        assert torch.allclose(accelerated(model)(**given).logits, model(**given).logits, atol=1e-5)


def test_a_batch_without_a_mask_and_sequences_without_tokens():
    model = build("DebertaV2")
    fast, given = accelerated(model), batch(model)
    ids = given["input_ids"]
    assert torch.allclose(fast(input_ids=ids)[0], model(input_ids=ids)[0], atol=1e-5)
    mask = MASK.clone()
    mask[[0, 3]] = 0
    given = {"input_ids": ids.where(mask.bool(), model.config.pad_token_id), "attention_mask": mask}
    ours, stock = fast(**given)[0], model(**given)[0]
    assert torch.allclose(ours, stock * mask[..., None], atol=1e-5)
    given["attention_mask"] = torch.zeros_like(mask)
    given["input_ids"] = torch.full_like(ids, model.config.pad_token_id)
    assert not fast(**given)[0].any()


def test_groups_hold_every_token_once_and_little_padding():
    torch.manual_seed(0)
    lengths = torch.randint(1, 200, (40,))
    mask = (torch.arange(200) < lengths[:, None]).long()
    packing = Packing.from_mask(mask)
    groups = disentangled._groups(packing, packing.tokens)
    assert torch.equal(groups.rows[groups.places], torch.arange(packing.tokens))
    assert sum(n for n, _ in groups.shapes) == 40
    assert packing.tokens <= groups.rows.numel() <= packing.tokens / disentangled.SHARE
    assert all(n == 1 or n * L * L <= disentangled.SCORES for n, L in groups.shapes)


def test_hidden_sizes_of_the_table_follow_the_batch(monkeypatch):
    """Only the rows of distances that the batch has are projected."""
    model, seen = build("DebertaV2", position_buckets=64, max_relative_positions=128), []
    original = disentangled._heads
    monkeypatch.setattr(
        disentangled, "_heads", lambda m, t, size: seen.append(t.shape[0]) or original(m, t, size)
    )
    given = batch(model)
    fast = accelerated(model)
    assert torch.allclose(
        fast(**given)[0] * MASK[..., None], model(**given)[0] * MASK[..., None], atol=1e-5
    )
    assert set(seen) == {2 * S - 1}


# --- dropout ---


def test_dropout_repeats_with_the_seed_and_reaches_the_positions(monkeypatch):
    model = build("DebertaV2")
    fast, given = accelerated(model).train(), batch(model)
    exact = fast(**given)[0]
    for m in fast.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.5
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(fast(**given)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    for m in fast.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    for name in ("pos_dropout", "dropout"):
        m = getattr(fast.encoder.layer[0].attention.self, name)
        m.p = 0.5
        assert not torch.allclose(fast(**given)[0], exact, atol=1e-3), name
        m.p = 0.0


def test_checkpointed_layers_drop_the_same(monkeypatch):
    model = build("DebertaV2", "ForMaskedLM")
    given, found = batch(model, "ForMaskedLM"), []
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.3
    for checkpointed in (False, True):
        fast = accelerated(model).train()
        if checkpointed:
            fast.gradient_checkpointing_enable()
        torch.manual_seed(0)
        fast(**given).loss.backward()
        found.append([p.grad for p in fast.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


# --- where transformers' code runs ---


def test_steps_beyond_the_last_layer_run_transformers_code(said, monkeypatch):
    """It has an error there."""
    model = build("DebertaV2")
    model.z_steps = 2
    calls, given = count_layers(monkeypatch), batch(model)
    for m in (model, accelerated(model)):
        with pytest.raises(AttributeError, match="append"):
            m(**given)
    assert not calls
    assert any("its z_steps is 2" in line for line in said())


@pytest.mark.parametrize("relative", [True, False])
def test_masks_of_other_numbers_run_transformers_code(relative, said, monkeypatch):
    """DeBERTa multiplies the embeddings by the mask."""
    model = build("DebertaV2", relative_attention=relative)
    given, calls = batch(model), count_layers(monkeypatch)
    given["attention_mask"] = MASK.float() * 0.5
    assert torch.allclose(accelerated(model)(**given)[0], model(**given)[0], atol=1e-5)
    assert not calls
    assert any("a mask is not of 0 and 1" in line for line in said())


def test_holes_are_packed_where_attention_reads_no_distances(monkeypatch):
    model = build("DebertaV2", **FORMS["no relative positions"])
    given, calls = batch(model), count_layers(monkeypatch)
    holes = MASK.clone()
    holes[0, 5:9] = 0
    given["attention_mask"], given["input_ids"] = holes, given["input_ids"] * holes
    ours, stock = accelerated(model)(**given)[0], model(**given)[0]
    assert len(calls) == 3
    assert torch.allclose(ours, stock * holes[..., None], atol=1e-5)


def test_outputs_at_padding_are_transformers(said, monkeypatch):
    model = build("DebertaV2")
    fast = fastbert.accelerate(copy.deepcopy(model), at_padding="stock")
    given, calls = batch(model), count_layers(monkeypatch)
    assert torch.allclose(fast(**given)[0], model(**given)[0], atol=1e-5)
    assert not calls
    assert any("outputs at padding are asked for" in line for line in said())
    fast(**given | {"attention_mask": torch.ones_like(MASK)})
    assert len(calls) == 3


@pytest.mark.parametrize("change", ["hook", "module"])
@pytest.mark.parametrize("form", ["projections of their own", "convolution"])
def test_an_altered_projection_of_positions_runs_one_layer_as_in_transformers(
    form, change, said, monkeypatch
):
    model = build("DebertaV2", **FORMS[form] | {"share_att_key": False})
    core = model.encoder.layer[1].attention.self
    if change == "hook":
        core.pos_key_proj.register_forward_hook(_doubled)
    else:
        core.pos_query_proj = torch.nn.Sequential(core.pos_query_proj, torch.nn.Tanh())
    given, calls = batch(model), count_layers(monkeypatch)
    ours, stock = (m(**given)[0] * MASK[..., None] for m in (accelerated(model), model))
    assert torch.allclose(ours, stock, atol=1e-5)
    assert len(calls) == 2
    assert any("layer 1 runs transformers' code: " in line for line in said())


def _doubled(m, args, y):
    return 2 * y


def test_talking_heads_run_transformers_code(said, monkeypatch):
    model = build("Deberta", talking_head=True, relative_attention=False)
    calls, given = count_layers(monkeypatch), batch(model)
    ours, stock = (m(**given)[0] * MASK[..., None] for m in (accelerated(model), model))
    assert torch.allclose(ours, stock, atol=1e-5)
    assert not calls
    assert any("its attention has talking heads" in line for line in said())


def test_a_head_with_another_decoder_computes_all_logits():
    model = build("DebertaV2", "ForMaskedLM", legacy=False)
    fast, given = accelerated(model).train(), batch(model, "ForMaskedLM")
    ours, stock = fast(**given), model.train()(**given)
    assert torch.allclose(ours.loss, stock.loss, atol=1e-5)
    assert ours.logits is not None


# --- freeze and quantize ---


PLAIN = {"relative_attention": False}
REFUSED = [
    ("DebertaV2", {}, "its attention is disentangled"),
    ("Deberta", {}, "its attention is disentangled"),
    ("DebertaV2", FORMS["convolution"] | PLAIN, "a convolution stands behind its first layer"),
    ("Deberta", PLAIN, "the rows of its one projection are by head"),
]


@pytest.mark.skipif(cpu.native is None, reason="no native module")
@pytest.mark.parametrize(("family", "changes", "reason"), REFUSED)
def test_frozen_layers_run_one_by_one_and_integers_are_refused(family, changes, reason, said):
    model = accelerated(build(family, **changes))
    with pytest.raises(ValueError, match="the model can't be quantised: .*" + reason):
        fastbert.quantize(model)
    given = batch(model)
    with torch.no_grad():
        expected = model(**given)[0]
        assert torch.equal(fastbert.freeze(model)(**given)[0], expected)
    assert fastbert.frozen_bytes(model) == 0
    assert any("runs its layers one by one: " + reason in line for line in said())


@pytest.mark.skipif(cpu.native is None, reason="no native module")
@pytest.mark.parametrize("form", ["no relative positions", "no terms"])
def test_layers_without_terms_of_positions_run_in_one_native_call(form, monkeypatch):
    model = accelerated(build("DebertaV2", **FORMS[form]))
    given = batch(model)
    with torch.no_grad():
        expected = model(**given)[0]
        fastbert.freeze(model)
        monkeypatch.setattr(layers, "run", None)
        assert torch.allclose(model(**given)[0], expected, atol=1e-5)
        fastbert.quantize(model)
        assert (model(**given)[0] - expected).norm() < 0.03 * expected.norm()
    assert fastbert.frozen_bytes(model) > 0


def test_a_text_is_itself_in_any_batch():
    model = accelerated(build("DebertaV2"))
    given = batch(model)
    together = model(**given)[0]
    for i in range(B):
        length = int(LENGTHS[i])
        alone = model(input_ids=given["input_ids"][i : i + 1, :length])[0]
        assert torch.allclose(alone[0], together[i, :length], atol=1e-5)


def test_the_log_names_the_model(caplog):
    caplog.set_level(logging.INFO, "fastbert")
    accelerated(build("DebertaV2"))
    assert "3 DebertaV2Layer" in caplog.text
