"""InferenceRunner and TrainingRunner give the model's results from inputs padded to few sizes; graphs need a GPU."""

import pytest
import torch

from fastbert import bert
from fastbert.models.config import BertConfig
from fastbert.nn import InferenceRunner, TrainingRunner
from fastbert.nn.packing import Packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def model(cls=bert.BertModel, **options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=60, intermediate_size=64, max_position_embeddings=40, **sizes, **options
    )
    return cls(config).to(DEVICE).eval()


def batch(lengths, left=False):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if left else mask
    ids = torch.randint(2, 60, mask.shape).where(mask, 1)
    return ids.to(DEVICE), mask.long().to(DEVICE), torch.randint(2, mask.shape).to(DEVICE)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs.keys():  # noqa: SIM118 -- an Output iterates over values
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "cls", [bert.BertModel, bert.BertForSequenceClassification, bert.BertForTokenClassification]
)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_model_s_own_output(cls, kind):
    """Padding on either side, none, and one token, in turn: results contain nothing of the batch before."""
    options = {"model_type": kind, "type_vocab_size": 2, "pad_token_id": 1}
    net = model(cls, **options)
    runner = InferenceRunner(net)
    assert runner._sizes(1145, Packing.full(31, 38, DEVICE))[0] == 1280
    for lengths, left in (
        ((9, 3, 7), False),
        ((9, 3, 7), True),
        ((2, 1, 5), False),
        ((4,), False),
        ((1,), False),
        ((38,) * 30 + (5,), False),
    ):
        ids, mask, types = batch(lengths, left)
        with torch.no_grad():
            same(runner(ids, mask, types), net(ids, attention_mask=mask, token_type_ids=types))
            same(runner(ids, mask), net(ids, attention_mask=mask))
            same(runner(ids), net(ids))


@pytest.mark.parametrize(
    "cls",
    [
        bert.BertModel,
        bert.BertForPreTraining,
        bert.BertForMaskedLM,
        bert.BertForNextSentencePrediction,
        bert.BertForSequenceClassification,
        bert.BertForTokenClassification,
        bert.BertForQuestionAnswering,
    ],
)
def test_as_many_sequences_as_tokens(cls):
    """13 sequences with 14 tokens, both padded to 16: per-token and per-sequence outputs have the same size."""
    net = model(cls)
    runner = InferenceRunner(net)
    ids, mask, types = batch((1,) * 12 + (2,))
    assert runner._sizes(14, Packing.from_mask(mask))[:2] == (16, 16)
    with torch.no_grad():
        same(runner(ids, mask, types), net(ids, attention_mask=mask, token_type_ids=types))


def test_results_are_the_caller_s():
    runner = InferenceRunner(model())
    first = runner(*batch((5, 2))[:2]).last_hidden_state
    kept = first.clone()
    runner(*batch((4, 3))[:2])
    assert torch.equal(first, kept)


def test_few_sizes_serve_many_batches():
    runner = InferenceRunner(model(), max_graphs=2)
    for tokens in range(1, 17):
        runner(torch.randint(60, (1, tokens), device=DEVICE))
    assert len(runner._entries) == 1
    for shape in ((1, 20), (2, 20), (4, 30)):
        runner(torch.randint(60, shape, device=DEVICE))
    assert len(runner._entries) == 2


def test_large_and_empty_batches_run_without():
    net = model()
    runner = InferenceRunner(net, max_tokens=10)
    ids = torch.randint(60, (3, 4), device=DEVICE)
    with torch.no_grad():
        same(runner(ids), net(ids))
        assert runner(ids[:0]).last_hidden_state.shape == (0, 4, 32)
    assert not runner._entries


def test_weights_changed_in_place_count():
    net = model()
    runner = InferenceRunner(net)
    ids = torch.randint(60, (2, 6), device=DEVICE)
    before = runner(ids).last_hidden_state
    with torch.no_grad():
        next(net.parameters()).mul_(2.0)
        same(runner(ids), net(ids))
    assert not torch.equal(before, runner(ids).last_hidden_state)


def test_refusals():
    with pytest.raises(TypeError, match="no model of fastbert"):
        InferenceRunner(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="max_graphs is 0"):
        InferenceRunner(model(), max_graphs=0)
    with pytest.raises(ValueError, match="41 tokens long"):
        InferenceRunner(model())(torch.zeros(1, 41, dtype=torch.long, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_a_graph_is_captured_and_replayed():
    net = model()
    runner = InferenceRunner(net)
    ids, mask, _ = batch((9, 3, 7))
    runner(ids, mask)
    (entry,) = runner._entries.values()
    assert entry.graph is not None
    with torch.no_grad():
        same(runner(ids, mask), net(ids, attention_mask=mask))


PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HEADS = {
    bert.BertForPreTraining: True,
    bert.BertForMaskedLM: True,
    bert.BertForSequenceClassification: False,
    bert.BertForTokenClassification: True,
}


def labelled(cls, lengths):
    """Arguments of one training step, with a label at a third of the tokens or for every sequence."""
    ids, mask, types = batch(lengths)
    args = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    classes = 60 if hasattr(cls, "_masked_lm") else 2
    if HEADS[cls]:
        labels = torch.randint(classes, ids.shape, device=DEVICE)
        args["labels"] = labels.where(
            (torch.rand(ids.shape, device=DEVICE) < 0.3) & (mask == 1), -100
        )
    else:
        args["labels"] = torch.randint(2, ids.shape[:1], device=DEVICE)
    if cls is bert.BertForPreTraining:
        args["next_sentence_label"] = torch.randint(2, ids.shape[:1], device=DEVICE)
    return args


def gradients(net):
    return {n: p.grad for n, p in net.named_parameters()}


def close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        if grad is None:
            assert ours[name] is None, name
        else:
            torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("cls", HEADS)
def test_a_training_step_s_loss_and_gradients(cls):
    """Batches of several sizes in turn. Gradients of two steps add up; after None they start from zero."""
    net = model(cls, **PLAIN).train()
    twin = cls(net.config).to(DEVICE).train()
    twin.load_state_dict(net.state_dict())
    runner = TrainingRunner(net)
    for round_, lengths in enumerate(((9, 3, 7), (8, 5, 7), (30, 28, 31), (2, 1, 1), (9, 3, 7))):
        args = labelled(cls, lengths)
        expected = twin(**args)
        expected.loss.backward()
        losses = runner(**args)
        for name in ("loss", "mlm_loss", "nsp_loss"):
            ours, theirs = getattr(losses, name), getattr(expected, name)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, check_device=True)
            assert ours is None or not ours.requires_grad
        close(gradients(net), gradients(twin))
        if round_ % 2:
            for p in (*net.parameters(), *twin.parameters()):
                p.grad = None
    assert len(runner._entries) < 4


def test_packed_batches_of_the_caller():
    net = model(bert.BertForMaskedLM, **PLAIN).train()
    runner = TrainingRunner(net)
    ids = torch.randint(60, (12,), device=DEVICE)
    labels = ids.where(torch.arange(12, device=DEVICE) % 4 == 1, -100)
    cu = torch.tensor([0, 5, 12], dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([1, 5, 9], device=DEVICE)
    given = {"labels": labels, "cu_seqlens": cu, "max_seqlen": 7, "label_rows": rows}
    torch.testing.assert_close(runner(ids, **given).loss, net(ids, **given).loss.detach())


@pytest.mark.parametrize("left", [False, True])
def test_answers_are_columns_of_the_padded_batch(left):
    net = model(bert.BertForQuestionAnswering, **PLAIN).train()
    ids, mask, _ = batch((9, 3, 7), left)
    places = {
        n: torch.tensor([3, 8, 1], device=DEVICE) for n in ("start_positions", "end_positions")
    }
    given = {"attention_mask": mask, **places}
    expected = net(ids, **given).loss.detach()
    runner = TrainingRunner(net)
    for _ in range(3):
        torch.testing.assert_close(runner(ids, **given).loss, expected)


def test_what_was_not_given_is_not_remembered():
    """Labels and num_items_in_batch of an earlier batch of the same size have no effect."""
    net = model(bert.BertForTokenClassification, **PLAIN).train()
    runner, args = TrainingRunner(net), labelled(bert.BertForTokenClassification, (9, 3))
    for _ in range(3):
        runner(**args)
    del args["labels"]
    with pytest.raises(ValueError, match="no loss"):
        runner(**args)
    net = model(bert.BertForMaskedLM, **PLAIN).train()
    runner, args = TrainingRunner(net), labelled(bert.BertForMaskedLM, (9, 3))
    for items in (4, torch.tensor(2.5), 3.0, torch.tensor(7), torch.tensor([5])):
        given = {**args, "num_items_in_batch": items}
        expected = net(**given).loss.detach().reshape(())
        torch.testing.assert_close(runner(**given).loss, expected)
    assert len(runner._entries) == 1


def test_more_tokens_than_positions_with_position_ids():
    net = model(bert.BertForMaskedLM, **PLAIN).train()
    ids = torch.randint(60, (2, 50), device=DEVICE)
    given = {"labels": ids, "position_ids": torch.arange(50, device=DEVICE)[None] % 40}
    torch.testing.assert_close(
        TrainingRunner(net)(ids, **given).loss, net(ids, **given).loss.detach()
    )


def test_training_refusals():
    net = model(bert.BertForMaskedLM)
    ids = torch.randint(60, (2, 6), device=DEVICE)
    with pytest.raises(ValueError, match="eval mode"):
        TrainingRunner(net)(ids, labels=ids)
    net.train()
    with pytest.raises(ValueError, match="such as labels"):
        TrainingRunner(net)(ids)
    with torch.autocast(DEVICE, torch.float16), pytest.raises(ValueError, match="bfloat16"):
        TrainingRunner(net)(ids, labels=ids)
    with pytest.raises(TypeError, match="inputs_embeds"):
        TrainingRunner(net)(None, inputs_embeds=torch.zeros(2, 6, 32, device=DEVICE))
    with pytest.raises(ValueError, match="labels has shape"):
        TrainingRunner(net)(ids, labels=ids[:, :4])
    with pytest.raises(TypeError, match="no model of fastbert"):
        TrainingRunner(torch.nn.Linear(2, 2))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("low", [False, True])
def test_a_training_graph_trains(low):
    """A captured step draws new dropout masks, leaves frozen parameters alone, and lowers the loss."""
    net = model(bert.BertForPreTraining).train()
    net.bert.embeddings.position.weight.requires_grad_(False)
    runner = TrainingRunner(net)
    args = labelled(bert.BertForPreTraining, (9, 3, 7, 30))
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            losses.append(float(runner(**args).loss))
        optimiser.step()
    (entry,) = runner._entries.values()
    assert entry.graph is not None
    assert net.bert.embeddings.position.weight.grad is None
    assert losses[0] != losses[1]
    assert losses[-1] < 0.7 * losses[0]
