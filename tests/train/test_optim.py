"""The groups without weight decay, and the schedule."""

import pytest
import torch
from random_feed import small_config, small_model

from fastbert.train.optim import learning_rate, make_optimiser, parameter_groups


def test_biases_and_layer_norms_do_not_decay():
    model = small_model()
    decayed, kept = parameter_groups(model, 0.01)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.01, 0.0)
    assert sorted(decayed["names"] + kept["names"]) == sorted(
        n for n, _ in model.named_parameters()
    )
    layer = [
        "attention.qkv.weight",
        "attention.out.weight",
        "feed_forward.up.weight",
        "feed_forward.down.weight",
    ]
    expected = {f"bert.embeddings.{name}.weight" for name in ("word", "position", "token_type")}
    expected |= {f"bert.layers.{i}.{name}" for i in range(2) for name in layer}
    expected |= {"bert.pooler.weight", "mlm_head.dense.weight", "nsp_head.weight"}
    assert set(decayed["names"]) == expected
    (none, kept) = parameter_groups(torch.nn.Sequential(torch.nn.RMSNorm(4)), 0.01)
    assert (none["names"], kept["names"]) == ([], ["0.weight"])


def test_optimiser_is_fused_and_leaves_fixed_positions_alone():
    model = small_model(position_embedding_type="sinusoidal")
    optimiser = make_optimiser(model, small_config())
    assert optimiser.defaults["fused"]
    tensors = [p for group in optimiser.param_groups for p in group["params"]]
    assert all(p is not model.bert.embeddings.position.weight for p in tensors)


def test_decay_is_what_the_groups_say():
    """With zero gradients AdamW only decays: decayed tensors shrink by 1 - lr * decay, the others do not change."""
    model = small_model()
    optimiser = make_optimiser(model, small_config(weight_decay=0.5, lr=0.1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    for name, p in model.named_parameters():
        factor = 1.0 if name.endswith("bias") or "norm" in name else 1.0 - 0.1 * 0.5
        torch.testing.assert_close(p.detach(), before[name] * factor)


@pytest.mark.parametrize("steps", [1, 7, 100])
@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("schedule", ["linear", "wsd", "one-cycle"])
def test_schedule(steps, warmup, schedule):
    fall = {"decay": 0.3} if schedule == "wsd" else {}
    config = small_config(steps=steps, warmup=warmup, lr=2.0, schedule=schedule, **fall)
    rates = [learning_rate(step, config) for step in range(steps)]
    assert all(0.0 < rate <= 2.0 for rate in rates)
    config = small_config(steps=steps, warmup=min(warmup, steps), lr=2.0, schedule=schedule)
    assert learning_rate(steps, config) == 0.0
    if steps > warmup:
        assert max(rates) == 2.0
        rising = rates[: warmup + 1] if warmup else []
        assert rising == sorted(rising)
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_schedule_by_hand():
    def rates(**settings):
        config = small_config(steps=6, warmup=2, lr=1.0, **settings)
        return [learning_rate(s, config) for s in range(7)]

    assert rates() == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    # a decay of a part, and one longer than what the warm-up leaves
    assert rates(schedule="wsd", decay=0.33) == [0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    assert rates(schedule="wsd", decay=100) == rates()
    assert rates(schedule="one-cycle") == pytest.approx(
        [0.04 + 0.96 * 0.5, 1.0, 1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0]
    )
