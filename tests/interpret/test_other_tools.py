"""captum and shap, unchanged, on accelerated models of transformers: the attributions of the stock model."""

import pytest
import torch

import fastbert

captum = pytest.importorskip("captum.attr", reason="captum is not installed")
transformers = pytest.importorskip("transformers", minversion="5")
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def both():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, intermediate_size=37, num_labels=3)
    stock = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for p in stock.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = transformers.BertForSequenceClassification(config).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, fastbert.accelerate(ours)


def test_captum_s_layer_integrated_gradients():
    ids = torch.randint(5, 99, (3, 9))
    mask = (torch.arange(9) < torch.tensor([9, 4, 6])[:, None]).long()
    found = []
    for model in both():
        tool = captum.LayerIntegratedGradients(
            lambda i, m, model=model: model(i, attention_mask=m).logits, model.bert.embeddings
        )
        scores = tool.attribute(
            ids, torch.zeros_like(ids), target=1, additional_forward_args=(mask,), n_steps=8
        )
        found.append(scores.sum(-1) * mask)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-3)
    assert found[1].abs().sum() > 0


def test_shap_s_text_masker(tmp_path):
    shap = pytest.importorskip("shap", reason="shap is not installed")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "man", "great", "poor"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    found = []
    for model in both():

        @torch.no_grad()
        def scores(texts, model=model):
            return model(**tokenizer([*texts], return_tensors="pt", padding=True)).logits.numpy()

        explain = shap.Explainer(scores, shap.maskers.Text(tokenizer), seed=0)
        found.append(
            torch.from_numpy(explain(["a great film", "a poor man"], silent=True)[0].values)
        )
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-3)
