"""Single steps: the loss over an accumulation window, refusals, and a restored trainer's equal steps."""

import copy
import io

import pytest
import torch
from random_feed import RandomFeed, small_config, small_model

from fastbert.pretrain.evaluate import evaluate
from fastbert.pretrain.trainer import PretrainTrainer
from fastbert.train import store
from fastbert.train.metrics import wilson
from fastbert.train.trainer import TrainingError


def losses(trainer, steps):
    return [trainer.train_step().loss for _ in range(steps)]


def through_a_file(state):
    """The state after a round trip through a checkpoint file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_restored_trainer_repeats_bitwise(accumulate):
    config = small_config(accumulate=accumulate)
    trainer = PretrainTrainer(small_model(), RandomFeed(), config)
    losses(trainer, 4)
    state = through_a_file(trainer.state())
    expected = losses(trainer, 5)
    torch.manual_seed(77)
    other = PretrainTrainer(small_model(seed=5), RandomFeed(), config)
    other.restore(state)
    assert losses(other, 5) == expected
    assert len(set(expected)) == 5


def test_generators_restore_bitwise():
    import random

    import numpy as np

    state = through_a_file(store.capture_rng())
    draw = lambda: (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())  # noqa: E731, NPY002
    expected = draw()
    draw()
    store.restore_rng(state)
    assert draw() == expected


def test_accumulated_loss_is_the_mean_over_the_window():
    """Batches differ in their numbers of labels: the mean of their means would be another number."""
    feed, model = RandomFeed(), small_model(dropout=0.0)
    joined = copy.deepcopy(model)
    model.train()
    trainer = PretrainTrainer(model, feed, small_config(accumulate=3, clip=0.0))
    result = trainer.train_step()
    batches = [feed.batch(0, i) for i in range(3)]
    outputs = [joined(**b) for b in batches]
    labelled = [len(b["label_rows"]) for b in batches]
    mlm = sum(o.mlm_loss * n for o, n in zip(outputs, labelled, strict=True)) / sum(labelled)
    nsp = sum(o.nsp_loss for o in outputs) / 3
    assert len(set(labelled)) > 1
    torch.testing.assert_close(
        [result.losses["mlm_loss"], result.losses["nsp_loss"]],
        [mlm.item(), nsp.item()],
        rtol=1e-6,
        atol=0,
    )
    (mlm + nsp).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in joined.parameters()])
    assert result.norm == pytest.approx(float(norm), rel=1e-5)


def test_clipping_bounds_the_update():
    """The gradient that AdamW takes has the norm `clip`."""
    trainer = PretrainTrainer(small_model(), RandomFeed(), small_config(clip=0.01))
    seen = []
    trainer.optimiser.register_step_pre_hook(
        lambda *_: seen.append(
            torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])
        )
    )
    assert trainer.train_step().norm > 0.1
    assert float(seen[0]) == pytest.approx(0.01, rel=1e-3)


def test_bf16_trains_close_to_fp32():
    runs = [
        losses(PretrainTrainer(small_model(), RandomFeed(), small_config(precision=precision)), 5)
        for precision in ("fp32", "bf16")
    ]
    assert runs[0] != runs[1]
    torch.testing.assert_close(runs[1], runs[0], rtol=2e-2, atol=0)


def test_epochs_follow_each_other():
    trainer = PretrainTrainer(small_model(), RandomFeed(per_epoch=4), small_config(accumulate=3))
    taken = [[(b.epoch, b.number) for b in trainer.take()] for _ in range(2)]
    assert taken == [[(0, 0), (0, 1), (0, 2)], [(0, 3), (1, 0), (1, 1)]]
    assert (trainer.at.epoch, trainer.at.batch) == (1, 2)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_is_refused_before_the_update(where):
    model = small_model()
    trainer = PretrainTrainer(model, RandomFeed(), small_config())
    trainer.train_step()
    before = copy.deepcopy(model.state_dict())
    if where == "loss":
        model.mlm_head.bias.data[3] = before["mlm_head.bias"][3] = float("inf")
    else:
        model.nsp_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match=r"step 2 \(epoch 0, batch 1"):
        trainer.train_step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_batch_without_labels_trains():
    class Unlabelled(RandomFeed):
        def batch(self, epoch, number):
            batch = super().batch(epoch, number)
            batch["labels"] = torch.full_like(batch["labels"], -100)
            batch["label_rows"] = torch.empty(0, dtype=torch.int64)
            return batch

    result = PretrainTrainer(small_model(), Unlabelled(), small_config()).train_step()
    assert result.losses["mlm_loss"] == 0.0
    assert result.losses["nsp_loss"] > 0.0


def test_evaluation_counts_by_hand():
    """Against counts from the model's logits in eval mode; `evaluate` leaves a model in training mode as it was."""
    model, feed = small_model(), RandomFeed()
    model.train()
    values = evaluate(model, feed.held_out(), feed.mask_id)
    assert model.training
    model.eval()
    loss = right = n = pairs = 0.0
    for batch in feed.held_out():
        out = model(**batch)
        at = (batch["labels"] >= 0) & (batch["input_ids"] == feed.mask_id)
        logits, labels = out.prediction_logits[at], batch["labels"][at]
        loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(1) == labels).sum())
        n += len(labels)
        pairs += int((out.seq_relationship_logits.argmax(1) == batch["next_sentence_label"]).sum())
    assert values["masked"] == n < values["labelled"]
    assert values["mlm_loss_masked"] == pytest.approx(loss / n, rel=1e-5)
    assert values["accuracy_masked"] == pytest.approx(right / n)
    assert values["nsp_accuracy"] == pytest.approx(pairs / 12)
    assert values["nsp_low"] < values["nsp_accuracy"] < values["nsp_high"]


def test_wilson_known_values():
    # from R: prop.test(81, 263, correct = FALSE)
    assert wilson(81, 263) == pytest.approx((0.2552888, 0.3662088), abs=2e-6)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(0, 0) == (0.0, 1.0)
