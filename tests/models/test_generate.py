"""fastbert.generate: transformers' greedy tokens, texts that no other text changes, draws, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastbert
from fastbert.backend import cpu
from fastbert.bert import BertConfig, GPTForCausalLM
from fastbert.infer import Writer
from fastbert.models.encoder import BertModel
from fastbert.runners import generate as module
from fastbert.runners.generate import Sampling, generate

LENGTHS = (5, 1, 17, 9, 33, 2)
native = pytest.mark.skipif(cpu.native is None, reason="the native module is not there")


def model(heads: int = 3, width: int = 24, seed: int = 0, **settings: Any) -> GPTForCausalLM:
    """Random weights, large enough for scores that are far apart."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 97, "max_position_embeddings": 96, "n_layer": 3}
    config = BertConfig.from_dict(
        {"model_type": "gpt2", **sizes, "n_embd": width, "n_head": heads, **settings}
    )
    found = GPTForCausalLM(config).eval()
    with torch.no_grad():
        for p in found.parameters():
            p.add_(torch.randn(p.shape), alpha=0.2)
    return found


def prompts(lengths: Any = LENGTHS, seed: int = 1) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 97, (n,), generator=g) for n in lengths]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize(
    "form", [{}, {"heads": 1, "width": 40}, {"n_inner": 24, "activation_function": "relu"}]
)
def test_greedy_tokens_are_those_of_transformers(form: dict[str, Any], backend: Any, tmp_path: Any):
    """Ragged prompts, with and without a token that ends a text; transformers pads on the left."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    for seed in range(2):
        ours, given = model(seed=seed, **form), prompts(seed=seed + 1)
        ours.save_pretrained(tmp_path / str(seed))
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / str(seed)).eval()
        longest = max(map(len, given))
        ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in given])
        mask = torch.stack([(torch.arange(-longest, 0) >= -len(p)).long() for p in given])
        known: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
        plain = theirs.generate(ids, max_new_tokens=20, eos_token_id=None, **known)[:, longest:]
        ends = plain[:2, 7].tolist()
        with fastbert.use(backend) if backend else torch.no_grad():
            assert torch.equal(torch.stack(generate(ours, given, 20)), plain)
            ended = generate(ours, given, 20, eos=ends)
        for row, text in zip(plain.tolist(), ended, strict=True):
            last = min((row.index(e) for e in ends if e in row), default=19)
            assert text.tolist() == row[: last + 1]


@native
@pytest.mark.parametrize("kind", ["plain", "frozen", "quantised", "int8"])
def test_a_text_is_the_same_alone_and_in_any_batch(kind: str) -> None:
    """Bitwise: the scores of every step, with one thread and with two, whatever stands beside the prompt."""
    gpt = model(heads=5, width=80)
    if kind == "frozen":
        fastbert.freeze(gpt)
    if kind in ("quantised", "int8"):
        fastbert.quantize(gpt, replace=kind == "int8", embeddings=kind == "int8")
    given = prompts()
    seen: dict[bytes, list[torch.Tensor]] = {}

    def texts(chosen: list[int], threads: int) -> None:
        torch.set_num_threads(threads)
        scores: list[list[torch.Tensor]] = [[] for _ in chosen]
        keep = Sampling.pick
        turn = iter(range(10**6))

        def watch(self: Sampling, row: torch.Tensor, u: float) -> int:
            scores[next(turn) % len(chosen)].append(row.clone())
            return keep(self, row, u)

        Sampling.pick = watch  # type: ignore[method-assign]
        try:
            found = generate(gpt, [given[i] for i in chosen], 12, temperature=1.0, seed=3)
        finally:
            Sampling.pick = keep  # type: ignore[method-assign]
            torch.set_num_threads(1)
        for i, text, own in zip(chosen, found, scores, strict=True):
            values = [text, *own]
            assert equal(seen.setdefault(given[i].numpy().tobytes(), values), values)

    for i in range(len(given)):
        texts([i], 1)
    texts([0, 1, 2, 3, 4, 5], 1)
    texts([5, 2, 2, 0], 2)
    texts([4, 1], 2)


@native
def test_kept_keys_give_the_scores_of_the_whole_text() -> None:
    """Bitwise, on every instruction set: a step with kept keys, and the whole text in one packed call."""
    gpt = fastbert.freeze(model(heads=2, width=44))
    given, isa = prompts((7, 40)), cpu.native.isa()
    for name in cpu.native.isas():
        cpu.native.use_isa(name)
        try:
            # 50 steps pass the ends of panels of 16 and of 32 tokens
            texts = generate(gpt, given, 50)
            whole = [torch.cat(pair) for pair in zip(given, texts, strict=True)]
            for first, text in zip(given, whole, strict=True):
                with torch.no_grad():
                    best = gpt(text[None, :-1]).logits[0].argmax(-1)
                assert torch.equal(best[len(first) - 1 :], text[len(first) :])
            with torch.no_grad():
                cache = module._cache(gpt, [60, 60])
                assert isinstance(cache, module._NativeCache)
                packing = module.Packing.given(torch.tensor([0, 7, 47], dtype=torch.int32), 40)
                cache.begin(torch.cat(given), packing)
                scores = cache.step(torch.stack([t[0] for t in texts]))
                for row, (first, text) in enumerate(zip(given, texts, strict=True)):
                    one = torch.cat([first, text[:1]])[None]
                    hidden = gpt.bert(one).last_hidden_state[0, -1:]
                    assert torch.equal(scores[row], cache.head(hidden)[0])
        finally:
            cpu.native.use_isa(isa)


def test_the_grid_of_stock_pytorch_gives_the_same_scores() -> None:
    """In fp32, and in bf16, which runs on it."""
    gpt, given = model(), prompts()
    with fastbert.use("torch"):
        grid = generate(gpt, given, 20, temperature=1.0, top_k=20)
    assert equal(generate(gpt, given, 20, temperature=1.0, top_k=20), grid)
    assert isinstance(module._cache(gpt.bfloat16(), [4]), module._GridCache)
    assert [len(text) for text in generate(gpt, given, 3)] == [3] * len(given)


def test_the_kept_tokens_are_those_of_transformers() -> None:
    """Every kept token can be drawn, and no other; the shares of many draws are the probabilities."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    warpers = transformers.generation.logits_process
    g = torch.Generator().manual_seed(0)
    for scores in (torch.randn(50, generator=g) * 3, torch.zeros(50), torch.randn(50).round()):
        for k, p, t in ((5, None, 0.7), (None, 0.8, 1.5), (10, 0.5, 1.0), (50, 1.0, 2.0)):
            theirs = scores[None] / t
            if k is not None:
                theirs = warpers.TopKLogitsWarper(k)(None, theirs)
            ours = Sampling(t, k, p)
            if p is not None and p < 1.0 and scores.any() and scores.frac().any():
                # among equal scores transformers keeps those that its sort puts last
                theirs = warpers.TopPLogitsWarper(p)(None, theirs)
            elif p is not None and p < 1.0:
                continue
            shares = theirs.softmax(-1)[0]
            drawn = torch.tensor(
                [ours.pick(scores, (i + 0.5) / 20000) for i in range(0, 20000, 20)]
            )
            found = drawn.bincount(minlength=50) / len(drawn)
            assert not found[shares == 0].any()
            assert (found - shares).abs().max() < 0.003


def test_draws_follow_the_seed_and_the_prompt() -> None:
    gpt, given = model(), prompts()
    hot: dict[str, Any] = {"temperature": 2.0}
    first = generate(gpt, given, 12, seed=1, **hot)
    assert equal(first, generate(gpt, given, 12, seed=[1] * len(given), **hot))
    assert not equal(first, generate(gpt, given, 12, seed=2, **hot))
    one, two, other = generate(gpt, [given[0]] * 3, 12, seed=[1, 1, 9], **hot)
    assert torch.equal(one, two)
    assert torch.equal(one, first[0])
    assert not torch.equal(one, other)
    draws = [module._Draws(5, given[0])(i) for i in range(4000)]
    assert abs(sum(draws) / 4000 - 0.5) < 0.02
    assert min(draws) >= 0.0
    assert max(draws) < 1.0


@native
def test_a_frozen_model_sees_every_write_to_its_decoder() -> None:
    gpt, given = fastbert.freeze(model()), prompts()
    before = generate(gpt, given, 4)
    size = fastbert.frozen_bytes(gpt)
    assert equal(generate(gpt, given, 4), before)
    assert fastbert.frozen_bytes(gpt) == size > gpt.bert.embeddings.word.weight.nbytes
    # past the version counter
    gpt.bert.embeddings.word.weight.data.numpy()[:] *= -1.0
    after = generate(gpt, given, 4)
    assert not equal(before, after)
    assert equal(after, generate(fastbert.unfreeze(gpt), given, 4))


def test_the_model_is_left_as_it_was() -> None:
    gpt = model().train()
    text = generate(gpt, [[3, 4]], 96 - 1)[0]
    assert gpt.training
    assert len(text) == 95
    assert gpt.bert.frozen is None
    assert generate(gpt, []) == []
    untied = model(tie_word_embeddings=False)
    assert len(generate(untied, [[3, 4]], 2)[0]) == 2


@pytest.mark.parametrize(
    ("given", "settings", "sentence"),
    [
        ([[3], []], {}, r"prompt 2 has shape \(0,\)"),
        ([[[3]]], {}, "prompt 1 has shape"),
        ([[0.5]], {}, "prompt 1 is torch.float32"),
        (
            [[97]],
            {},
            "ids from 97 to 97, and the vocabulary 97 tokens: encode it with the model's own",
        ),
        ([[-1]], {}, "ids from -1"),
        ([[1] * 90], {"max_new_tokens": 8}, "prompt 1 has 90 tokens and max_new_tokens is 8"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"max_new_tokens": 3.0}, r"max_new_tokens is 3\.0: it must be a whole number"),
        ([[1]], {"max_new_tokens": True}, "max_new_tokens is True: it must be a whole number"),
        ([[1]], {"temperature": -1.0}, r"temperature is -1\.0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ([[1]], {"temperature": 1.0, "top_p": 1.5}, r"top_p is 1\.5"),
        ([[1]], {"top_p": 0.5}, "temperature is 0"),
        ([[1]], {"seed": -1}, "seed is -1"),
        ([[1]], {"seed": [1, 2]}, "2 seeds and 1 prompts"),
    ],
)
def test_bad_input_gets_a_sentence(given: Any, settings: Any, sentence: str) -> None:
    with pytest.raises((ValueError, TypeError, IndexError), match=sentence):
        generate(model(), given, **settings)


@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.0, "top_k": 3, "top_p": 0.9}])
def test_damaged_weights_get_a_sentence(drawn: dict[str, Any]) -> None:
    """Not a token of no meaning, as argmax finds one among nan."""
    gpt = model()
    gpt.bert.embeddings.word.weight.data[5] = torch.nan
    with pytest.raises(ValueError, match="highest score of a next token is nan"):
        generate(gpt, [[1, 2], [5]], 3, **drawn)


def test_parts_keep_their_modes() -> None:
    """A part that is in evaluation in a model that is trained stays so."""
    gpt = model().train()
    gpt.bert.layers[0].eval()
    generate(gpt, [[1]], 2)
    assert gpt.training
    assert not gpt.bert.layers[0].training


def test_whole_numbers_of_numpy_and_torch() -> None:
    gpt, given = model(), [[1, 2], [3]]
    drawn: dict[str, Any] = {"temperature": 1.0}
    plain = generate(gpt, given, 6, seed=[7, 8], eos=5, **drawn)
    seeds: Any = np.array([7, 8])
    for eos in (np.int64(5), torch.tensor(5), [torch.tensor(5)], np.array([5])):
        assert equal(plain, generate(gpt, given, 6, seed=seeds, eos=eos, **drawn))  # type: ignore[arg-type]
    for settings in ({"eos": "a"}, {"eos": [None]}, {"seed": None}, {"seed": 1.5}):
        with pytest.raises(ValueError, match="must be a whole number, or a list of them"):
            generate(gpt, given, 6, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_k is True"):
        Sampling(1.0, top_k=True)
    with pytest.raises(TypeError, match=r"call a fastbert\.infer\.Writer"):
        generate(gpt, ["a text"], 6)  # type: ignore[list-item]


def test_other_models_are_refused() -> None:
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(TypeError, match="pass a GPTForCausalLM"):
        fastbert.generate(BertModel(config), [[1]])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_folder_of_transformers_with_its_own_tokenizer(name: str, tmp_path: Any) -> None:
    """GPT-2's tokenizer has no special token of BERT's; ids and texts are transformers'."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(["the state of the union is strong"] * 5, trainer)
    known = {"unk_token": end, "bos_token": end, "eos_token": end}
    kind = getattr(transformers, name)(tokenizer_object=raw, **known)
    gpt = model(vocab_size=290, eos_token_id=0, bos_token_id=0)
    gpt.save_pretrained(tmp_path)
    kind.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    given = ["the union", "Été: état"]
    writer = Writer(tmp_path)
    ids = [writer.tokenizer.encode(text, add_special_tokens=False).ids for text in given]
    assert ids == [theirs(text)["input_ids"] for text in given]
    found = generate(gpt, ids, 9, eos=0)
    whole = [[*first, *new.tolist()] for first, new in zip(ids, found, strict=True)]
    texts = writer(given, 9)
    assert texts == [theirs.decode(text, skip_special_tokens=True) for text in whole]
    with pytest.raises(ValueError, match="has no token"):
        writer([""])
