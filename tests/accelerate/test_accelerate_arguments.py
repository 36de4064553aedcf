"""Arguments that transformers ignores, positions, random numbers: an accelerated forward is transformers' there too."""

import copy

import pytest
import torch
from hf_models import MASK, OLD, B, V, accelerated, batch, build, without_dropout
from torch import nn

from fastbert.nn import watch

IDS = batch("Bert")["input_ids"]
MODELS = {family: build(family) for family in ("Bert", "Roberta", "DistilBert")}
OURS = {family: accelerated(model) for family, model in MODELS.items()}


@pytest.mark.parametrize("family", ["Roberta", "XLMRoberta", "Camembert"])
def test_positions_that_count_tokens_begin_after_the_paddings(family):
    """A table of 20 rows serves 18 tokens where padding has the id 1, and padding needs no position of its own."""
    model = build(family, max_position_embeddings=20, pad_token_id=1)
    ours = accelerated(model)
    with torch.no_grad():
        # transformers 4 takes no more columns than its table has rows
        for tokens, columns in ((18, 18), (18, 20), (17, 20 if OLD else 25)):
            ids = torch.randint(5, V, (2, tokens))
            ids = nn.functional.pad(ids, (0, columns - tokens), value=1)
            given = {"input_ids": ids, "attention_mask": (ids != 1).long()}
            for more in ({}, {"position_ids": torch.arange(columns)[None] % 20}):
                x, y = model(**given, **more)[0], ours(**given, **more)[0]
                torch.testing.assert_close(x[:, :tokens], y[:, :tokens], atol=1e-5, rtol=1e-5)
        for tokens in (19, 20, 21):
            with pytest.raises(ValueError, match=f"{tokens} tokens long .* has 18 positions"):
                ours(torch.randint(5, V, (2, tokens)))
            with pytest.raises(ValueError, match=f"{tokens} tokens long .* has 18 positions"):
                ours(inputs_embeds=torch.randn(2, tokens, 32))


@pytest.mark.skipif(OLD, reason="forwards of transformers 4 refuse other arguments")
@pytest.mark.parametrize("family", MODELS)
def test_arguments_that_transformers_ignores_are_ignored(family, caplog):
    """sentence-transformers passes every feature of its dict on, its own outputs of an earlier call too."""
    given = {"input_ids": IDS, "attention_mask": MASK, "sentence_embedding": torch.randn(B, 32)}
    given |= {"dataset_name": "pairs", "cross_encoder_depth": 3}
    caplog.set_level("INFO", logger="fastbert")
    watch._logged.clear()
    with torch.no_grad():
        expected = OURS[family](input_ids=IDS, attention_mask=MASK)[0]
        assert torch.equal(OURS[family](**given)[0], expected)
        torch.testing.assert_close(
            MODELS[family](**given)[0][MASK.bool()], expected[MASK.bool()], atol=1e-5, rtol=1e-5
        )
        assert not [r for r in caplog.records if "runs transformers' code" in r.getMessage()]
        # those that transformers reads are not
        for name, value in (("max_length_q", 3), ("cu_seq_lens_q", torch.tensor([0, 3]))):
            OURS[family](input_ids=IDS, attention_mask=MASK, **{name: value})
            assert f"the argument {name} is not known" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("family", MODELS)
def test_no_random_number_is_drawn_where_nothing_is_dropped(family):
    model = without_dropout(copy.deepcopy(MODELS[family]))
    for m in (model, accelerated(model)):
        torch.manual_seed(7)
        m(input_ids=IDS, attention_mask=MASK)
        assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(7)))
