"""Ten training steps in transformers' BertForPreTraining: same weights, same batches, no dropout, same losses."""

import pytest
import torch
from random_feed import RandomFeed, small_config, small_model

from fastbert.pretrain.trainer import PretrainTrainer
from fastbert.train.optim import learning_rate

transformers = pytest.importorskip("transformers")


def padded(batch):
    """The packed batch in transformers' padded form."""
    lengths = batch["cu_seqlens"].diff().tolist()
    columns = {"input_ids": 0, "token_type_ids": 0, "labels": -100}
    out = {
        name: torch.nn.utils.rnn.pad_sequence(batch[name].split(lengths), True, fill)
        for name, fill in columns.items()
    }
    ones = [torch.ones(n, dtype=torch.int64) for n in lengths]
    out["attention_mask"] = torch.nn.utils.rnn.pad_sequence(ones, True)
    return out | {"next_sentence_label": batch["next_sentence_label"]}


def decays(name):
    """BERT's rule, by the parameter's name: everything but biases and LayerNorm decays."""
    return not (name.endswith("bias") or "LayerNorm" in name)


def test_ten_losses(tmp_path):
    feed, config = RandomFeed(), small_config(weight_decay=0.1)
    model = small_model(dropout=0.0)
    model.save_pretrained(tmp_path)
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path).train()
    groups = {True: [], False: []}
    for name, parameter in theirs.named_parameters():
        groups[decays(name)].append(parameter)
    optimiser = torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": 0.1},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )
    trainer = PretrainTrainer(model, feed, config)
    ours, expected = [], []
    for step in range(10):
        loss = theirs(**padded(feed.batch(*divmod(step, 4)))).loss
        expected.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.clip)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, config)
        optimiser.step()
        ours.append(trainer.train_step().loss)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert max(expected) - min(expected) > 0.1
