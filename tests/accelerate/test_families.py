"""accelerate() on the families that only transformers 5 has, or that are new since: outputs, gradients, fallbacks."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from hf_models import accelerated  # noqa: E402
from modern_models import FAMILIES, MASK, B, S, V, batch, build, close, count_layers  # noqa: E402

import fastbert  # noqa: E402
from fastbert.integrations import layers  # noqa: E402

HEADS = (
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
# Splinter's head for answers looks for a question's tokens, and is transformers' own
MODELS = [(f, h) for f in FAMILIES for h in HEADS if hasattr(transformers, f + h)]
MODELS.remove(("Splinter", "ForQuestionAnswering"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_gives_the_hidden_states_of_transformers(family, monkeypatch):
    model = build(family)
    given, calls = batch(model), count_layers(monkeypatch)
    ours = accelerated(model)(**given, output_hidden_states=True)
    assert len(calls) == model.config.num_hidden_layers
    stock = model(**given, output_hidden_states=True)
    truth = copy.deepcopy(model).double()(**given, output_hidden_states=True)
    assert list(ours) == list(stock)
    assert ours.last_hidden_state.shape == (B, S, 48)
    assert not ours.last_hidden_state[MASK == 0].any()
    token = MASK.bool()
    close(ours[0][token], stock[0][token], truth[0][token], "last_hidden_state")
    for i, states in enumerate(zip(*(m.hidden_states for m in (ours, stock, truth)), strict=True)):
        close(*(s[token] for s in states), f"hidden state {i}")


@pytest.mark.parametrize(("family", "head"), MODELS, ids=[f + h for f, h in MODELS])
def test_a_head_trains_as_in_transformers(family, head, monkeypatch):
    model = build(family, head)
    given, calls, found = batch(model, head), count_layers(monkeypatch), []
    if head == "ForQuestionAnswering":
        # transformers' loss also runs over padding, where accelerated models find no answer
        given["attention_mask"] = torch.ones_like(MASK)
    for m in (accelerated(model), model, copy.deepcopy(model).double()):
        m.train()
        out = m(**given)
        out.loss.backward()
        found.append((out, {n: p.grad for n, p in m.named_parameters()}))
    assert len(calls) == model.config.num_hidden_layers
    (ours, of_ours), (stock, of_stock), (truth, of_truth) = found
    close(ours.loss, stock.loss, truth.loss, "loss")
    assert sum(g is not None for g in of_truth.values()) > 10
    # a key's bias changes no softmax without rotary positions: its gradient is rounding alone
    floor = 1e-7 * max(g.abs().max().item() for g in of_truth.values() if g is not None)
    for name, gradient in of_truth.items():
        if gradient is None:
            # transformers connects parts to the graph that no loss reaches, such as a decoder's unlabelled rows
            assert of_ours[name] is None or not of_ours[name].any(), name
        else:
            close(of_ours[name], of_stock[name], gradient, name, floor)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_masked_padding_gives_zeros_and_no_warning(family, caplog):
    model = accelerated(build(family))
    given = batch(model) | {"attention_mask": torch.zeros_like(MASK)}
    given["input_ids"] = torch.full((B, S), model.config.pad_token_id or 0)
    given["attention_mask"][1, 0] = 1
    assert model(**given)[0][1, 0].any()
    given["attention_mask"][1, 0] = 0
    assert not model(**given)[0].any()
    assert "may be padded" not in caplog.text


@pytest.mark.parametrize("family", ["Esm", "MPNet", "ModernBert", "NomicBert", "DebertaV2"])
@pytest.mark.parametrize("mask", ["left", "holes"])
def test_masks_that_move_tokens_run_transformers_code(family, mask, said, monkeypatch):
    model = build(family)
    given, calls = batch(model), count_layers(monkeypatch)
    moved = MASK.flip(1) if mask == "left" else MASK.clone()
    if mask == "holes":
        moved[0, 5] = 0
    given["attention_mask"] = moved
    given["input_ids"] = torch.randint(6, V, (B, S)).where(moved.bool(), model.config.pad_token_id)
    ours, stock = accelerated(model)(**given), model(**given)
    assert not calls
    assert torch.equal(ours[0], stock[0]) or torch.allclose(ours[0], stock[0], atol=1e-5)
    assert any("a mask has holes or begins with padding" in line for line in said())


@pytest.mark.parametrize("family", ["ModernBert", "JinaEmbeddingsV3", "DebertaV2"])
def test_position_ids_run_transformers_code(family, said, monkeypatch):
    model = build(family)
    given, calls = batch(model), count_layers(monkeypatch)
    given["position_ids"] = torch.arange(S).expand(B, S) * 2
    accelerated(model)(**given)
    assert not calls
    assert any("position_ids are given" in line for line in said())


def test_rates_that_change_with_the_length_run_transformers_code(said, monkeypatch):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = build("NomicBert", rope_parameters=rope)
    calls = count_layers(monkeypatch)
    accelerated(model)(**batch(model))
    assert not calls
    assert any("rope_type is 'dynamic'" in line for line in said())


def test_a_window_of_no_tokens_is_named(said):
    model = build("ModernBert", local_attention=0)
    accelerated(model)(**batch(model))
    assert any("its sliding window is of 0 tokens to each side" in line for line in said())


def test_a_long_window_is_none(monkeypatch):
    """Attention with a window wider than the batch is full attention."""
    narrow, wide = (build("ModernBert", local_attention=n) for n in (8, 200))
    given = batch(narrow)
    assert not torch.allclose(accelerated(narrow)(**given)[0], accelerated(wide)(**given)[0])
    assert torch.allclose(
        accelerated(wide)(**given)[0] * MASK[..., None],
        wide(**given)[0] * MASK[..., None],
        atol=1e-5,
    )


def test_mean_pooling_reads_all_tokens():
    model = build("ModernBert", "ForSequenceClassification", classifier_pooling="mean")
    given = batch(model, "ForSequenceClassification")
    assert torch.allclose(accelerated(model)(**given).logits, model(**given).logits, atol=1e-5)


def test_two_threads_may_run_one_model():
    """MPNet's calls go through a thread's own memory."""
    from concurrent.futures import ThreadPoolExecutor

    model = build("MPNet")
    given, fast = batch(model), accelerated(model)
    expected = fast(**given)[0]
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: fast(**given)[0], range(8)):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["MPNet", "DebertaV2"])
def test_a_model_compiles_before_its_first_call(family):
    """Calls of these families go through a thread's own memory, which graphs read and write."""
    model = build(family, num_hidden_layers=1)
    torch._dynamo.reset()
    fast = torch.compile(accelerated(model), backend="eager", fullgraph=True)
    ids = batch(model)["input_ids"]
    with torch.no_grad():
        assert torch.allclose(fast(input_ids=ids)[0], model(input_ids=ids)[0], atol=1e-5)


def test_labels_at_padding_count_as_in_transformers():
    model = build("MPNet", "ForTokenClassification")
    given = batch(model, "ForTokenClassification")
    given["labels"] = torch.randint(0, 3, (B, S))
    assert torch.allclose(accelerated(model)(**given).loss, model(**given).loss, atol=1e-5)


def test_every_use_of_a_shared_layer_has_dropout_sites_of_its_own(monkeypatch):
    """ALBERT's layers run several times in one forward; their sites follow from the number of the use."""
    model = build("Albert", attention_probs_dropout_prob=0.0)
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.5
    fast, numbers, run = accelerated(model).train(), [], layers.run
    monkeypatch.setattr(
        layers, "run", lambda m, x, call: numbers.append(call.layer) or run(m, x, call)
    )
    torch.manual_seed(3)
    first = fast(**batch(model))[0]
    torch.manual_seed(3)
    assert torch.equal(fast(**batch(model))[0], first)
    assert numbers == [0, 1, 2] * 2


LORA = {
    "Esm": ["query", "value"],
    "MPNet": ["q", "v"],
    "Albert": ["query", "ffn"],
    "ModernBert": ["Wqkv", "Wi"],
    "NomicBert": ["q_proj", "up_proj"],
    "EuroBert": ["k_proj", "down_proj"],
    "Deberta": ["in_proj", "pos_q_proj"],
    "DebertaV2": ["query_proj", "value_proj"],
}


@pytest.mark.parametrize("first", ["adapters", "accelerate"])
@pytest.mark.parametrize("family", LORA)
def test_adapters_train_as_in_transformers(family, first):
    peft = pytest.importorskip("peft")
    model, found = build(family), []
    given = batch(model)

    def adapted(m):
        torch.manual_seed(5)
        config = peft.LoraConfig(target_modules=LORA[family], init_lora_weights=False)
        return peft.get_peft_model(m, config)

    fast = accelerated(adapted(copy.deepcopy(model)) if first == "adapters" else model)
    for m in (fast if first == "adapters" else adapted(fast), adapted(model)):
        m.eval()
        y = m(**given)[0] * MASK[..., None]
        (y * torch.arange(y.numel()).view(y.shape).sin()).sum().backward()
        found.append((y, {n: p.grad for n, p in m.named_parameters() if p.grad is not None}))
    (ours, of_ours), (stock, of_stock) = found
    assert torch.allclose(ours, stock, atol=1e-5)
    assert of_ours.keys() == of_stock.keys()
    largest = max(g.abs().max() for g in of_stock.values())
    for name, gradient in of_stock.items():
        assert torch.allclose(of_ours[name], gradient, rtol=1e-4, atol=1e-5 * largest), name


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "ModernBert"])
def test_outputs_at_padding_on_request(family):
    """at_padding="stock" computes the padding too; a window's padding may see no token, and is left out."""
    model = build(family)
    fast = fastbert.accelerate(copy.deepcopy(model), at_padding="stock")
    given = batch(model)
    assert torch.allclose(fast(**given)[0], model(**given)[0], atol=2e-5)


@pytest.mark.parametrize("family", ["ModernBert", "MPNet", "Esm", "DebertaV2"])
def test_bf16_stays_near(family):
    model = build(family)
    given, token = batch(model), MASK.bool()
    truth = model(**given)[0][token]
    half = model.bfloat16()
    ours, stock = (m(**given)[0][token].float() for m in (accelerated(half), half))
    assert (ours - truth).abs().max() <= 2 * (stock - truth).abs().max()


@pytest.mark.parametrize("family", ["ModernBert", "DebertaV2"])
def test_gradient_checkpointing_gives_the_same_gradients(family):
    model = build(family, "ForMaskedLM")
    given, found = batch(model, "ForMaskedLM"), []
    for checkpointed in (False, True):
        fast = accelerated(model).train()
        if checkpointed:
            fast.gradient_checkpointing_enable()
        fast(**given).loss.backward()
        found.append([p.grad for p in fast.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["ModernBert", "DebertaV2"])
def test_restored_models_are_transformers_again(family):
    model = build(family)
    fast = accelerated(model)
    restored = fastbert.restore(fast)
    given = batch(model)
    assert torch.equal(restored(**given)[0], model(**given)[0])
    assert type(restored) is type(model)
