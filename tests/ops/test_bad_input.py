"""Every op refuses bad input with a sentence that names the value."""

import pytest
import torch

from fastbert import functional as F
from fastbert.backend import chooser
from fastbert.testing import parity

X, W, B = torch.randn(6, 8), torch.randn(8), torch.randn(8)
LONG = torch.zeros(6, dtype=torch.int64)
I8 = torch.ones(3, 8, dtype=torch.int8)
QKV = torch.randn(6, 3, 2, 4)
CU = torch.tensor([0, 4, 6], dtype=torch.int32)
WORD, POS, TYPE = torch.randn(5, 8), torch.randn(7, 8), torch.randn(2, 8)


def embed(
    ids=LONG,
    positions=LONG,
    types=LONG,
    word=WORD,
    position=POS,
    type_=TYPE,
    weight=W,
    bias=B,
    **options,
):
    return F.embed(ids, positions, types, word, position, type_, weight, bias, **options)


CASES = [
    # layer_norm
    (lambda: F.layer_norm(LONG), TypeError, "x is torch.int64"),
    (
        lambda: F.layer_norm(X, torch.randn(7)),
        ValueError,
        r"weight has shape \(7,\), expected \(8,\)",
    ),
    (lambda: F.layer_norm(X, W, torch.randn(8, 1)), ValueError, r"bias has shape \(8, 1\)"),
    (lambda: F.layer_norm(X, None, B), ValueError, "bias is given without weight"),
    (lambda: F.layer_norm(torch.tensor(1.0)), ValueError, "no dimension"),
    (lambda: F.layer_norm(X, W.to("meta")), ValueError, "weight is on meta but x is on cpu"),
    (lambda: F.layer_norm(X[:, :0]), ValueError, "last dimension must not be 0"),
    (lambda: F.layer_norm(X, eps=float("nan")), ValueError, "eps is nan"),
    # rms_norm
    (lambda: F.rms_norm(LONG), TypeError, "x is torch.int64"),
    (lambda: F.rms_norm(X, torch.randn(7)), ValueError, r"weight has shape \(7,\), expected"),
    (lambda: F.rms_norm(torch.tensor(1.0)), ValueError, "no dimension"),
    (lambda: F.rms_norm(X, W.to("meta")), ValueError, "weight is on meta but x is on cpu"),
    (lambda: F.rms_norm(X, eps=-1e-6), ValueError, "eps is -1e-06"),
    # dropout_add_layer_norm
    (lambda: F.dropout_add_layer_norm(X, X, None, B), TypeError, "weight is None"),
    (lambda: F.dropout_add_layer_norm(X, X, W, B, eps=-1.0), ValueError, "eps is -1.0"),
    (lambda: F.dropout_add_layer_norm(X, X, W, B, site=2**32), ValueError, "site is 4294967296"),
    (lambda: F.dropout_add_layer_norm(X, X, W, B, site=-1), ValueError, "site is -1"),
    (
        lambda: F.dropout_add_layer_norm(X, X, W, B, p=1.0),
        ValueError,
        r"p is 1.0: it must be in \[0, 1\)",
    ),
    (lambda: F.dropout_add_layer_norm(X, X, W, B, p=-0.1), ValueError, "p is -0.1"),
    (lambda: F.dropout_add_layer_norm(X, X, W, B, p=float("nan")), ValueError, "p is nan"),
    (lambda: F.dropout_add_layer_norm(X, X[:5], W, B), ValueError, r"residual has shape \(5, 8\)"),
    (
        lambda: F.dropout_add_layer_norm(X, X, W, B, p=0.1, seed=torch.tensor([1.0])),
        ValueError,
        "seed must be one int64",
    ),
    (
        lambda: F.dropout_add_layer_norm(X, X, W, B, p=0.1, rows=LONG[:3]),
        ValueError,
        r"rows has shape \(3,\)",
    ),
    (
        lambda: F.dropout_add_layer_norm(X, X, W, B, rows=X[:, 0]),
        TypeError,
        "rows is torch.float32",
    ),
    (
        lambda: F.dropout_add_layer_norm(X, X, W, from_output=True),
        ValueError,
        "from_output is set without bias: pass a bias of zeros",
    ),
    (
        lambda: F.dropout_add_layer_norm(X, X, W, B, from_output=True, return_sum=True),
        ValueError,
        "from_output and return_sum are both set: .* leave from_output out",
    ),
    # bias_gelu
    (lambda: F.bias_gelu(X, W[:3]), ValueError, r"bias has shape \(3,\)"),
    (
        lambda: F.bias_gelu(X, W, "relu"),
        ValueError,
        "approximate is 'relu': choose one of none, tanh, sigmoid",
    ),
    (lambda: F.bias_gelu(X.int()), TypeError, "x is torch.int32"),
    # linear
    (
        lambda: F.linear(X, torch.randn(3, 7)),
        ValueError,
        r"weight has shape \(3, 7\), expected \(-1, 8\)",
    ),
    (lambda: F.linear(X, torch.randn(3, 8), torch.randn(4)), ValueError, r"bias has shape \(4,\)"),
    (lambda: F.linear(torch.tensor(1.0), X), ValueError, "x has no dimension"),
    # linear_int8
    (
        lambda: F.linear_int8(X, torch.randn(3, 8), W[:3]),
        TypeError,
        "weight is torch.float32: pass torch.int8",
    ),
    (lambda: F.linear_int8(LONG, I8, W[:3]), TypeError, "x is torch.int64"),
    (lambda: F.linear_int8(None, I8, W[:3]), TypeError, "x is None: pass a tensor"),
    (lambda: F.linear_int8(X, None, W[:3]), TypeError, "weight is None: pass a tensor"),
    (lambda: F.linear_int8(X, I8, None), TypeError, "scale is None: pass a tensor"),
    (lambda: F.linear_int8(X, I8, W[:3].half()), TypeError, "scale is torch.float16: pass float32"),
    (lambda: F.linear_int8(X, I8, W), ValueError, r"scale has shape \(8,\), expected \(3,\)"),
    (lambda: F.linear_int8(X, I8[:, :7], W[:3]), ValueError, r"weight has shape \(3, 7\)"),
    (lambda: F.linear_int8(X, I8, W[:3], W), ValueError, r"bias has shape \(8,\)"),
    (lambda: F.linear_int8(X, I8, W[:3], bits=16), ValueError, "bits is 16: choose 12 or 8"),
    (
        lambda: F.linear_int8(torch.ones(2, 8261), I8[:, :1].expand(3, 8261), W[:3]),
        ValueError,
        "x has 8261 columns: .* up to 8260, use 8 bits, up to 133144, or linear",
    ),
    # qkv_proj
    (lambda: F.qkv_proj(X, [W[:, None]] * 2, None, 2), ValueError, "weights holds 2 tensors"),
    (lambda: F.qkv_proj(X, [torch.randn(8, 8)] * 3, None, 3), ValueError, "3 heads do not divide"),
    (
        lambda: F.qkv_proj(X, [torch.randn(8, 8)] * 3, [B], 2),
        ValueError,
        "biases holds 1 tensors for 3",
    ),
    (lambda: F.qkv_proj(X, [torch.randn(24, 8)], [B.repeat(3).half()], 2), TypeError, "mix"),
    (lambda: F.qkv_proj(X, [torch.randn(24, 8)], None, 0), ValueError, "num_heads=0"),
    (
        lambda: F.qkv_proj(X[None], [torch.randn(24, 8)], None, 2),
        ValueError,
        r"x has shape \(1, 6, 8\)",
    ),
    # attention
    (lambda: F.attention(X, CU, 4), ValueError, r"expected \(T, 3, H, D\)"),
    (lambda: F.attention(QKV[..., :0], CU, 4), ValueError, r"expected \(T, 3, H, D\)"),
    (lambda: F.attention(QKV, CU.long(), 4), TypeError, "cu_seqlens is torch.int64: pass int32"),
    (lambda: F.attention(QKV, CU[:0], 4), ValueError, "cu_seqlens is empty"),
    (lambda: F.attention(QKV, CU + 1, 4), ValueError, "starts at 1"),
    (
        lambda: F.attention(QKV, CU.flip(0) - 6, 4),
        ValueError,
        "cu_seqlens falls from 0 to -2 at entry 1",
    ),
    (lambda: F.attention(QKV, CU * 2, 8), ValueError, "ends at 12 but there are 6 tokens"),
    (lambda: F.attention(QKV, CU, 3), ValueError, "sequence 0 has 4 tokens but max_seqlen is 3"),
    (lambda: F.attention(QKV, CU, -1), ValueError, "max_seqlen is -1"),
    (lambda: F.attention(QKV, CU, 4, p=2), ValueError, "p is 2"),
    # embed
    (lambda: embed(ids=LONG + 5), IndexError, r"ids\[0\] is 5, outside \[0, 5\)"),
    (lambda: embed(ids=LONG - 1), IndexError, r"ids\[0\] is -1"),
    (lambda: embed(positions=LONG + 7), IndexError, "max_position_embeddings"),
    (lambda: embed(types=LONG + 2), IndexError, r"types\[0\] is 2"),
    (lambda: embed(types=None), ValueError, "types and type_ come together"),
    (lambda: embed(ids=X[:, 0]), TypeError, "ids is torch.float32"),
    (lambda: embed(word=None), TypeError, "ids is torch.int64"),
    (lambda: embed(positions=LONG[:3]), ValueError, r"positions has shape \(3,\)"),
    (lambda: embed(word=torch.randn(5, 9)), ValueError, r"word has shape \(5, 9\)"),
    (lambda: embed(p=1.5), ValueError, "p is 1.5"),
    (lambda: embed(padding_idx=9), ValueError, "padding_idx is 9"),
    # feed_forward
    (
        lambda: F.feed_forward(X, torch.randn(4, 8), None, torch.randn(8, 5), None),
        ValueError,
        r"w2 has shape \(8, 5\)",
    ),
    (
        lambda: F.feed_forward(X, torch.randn(4, 7), None, torch.randn(8, 4), None),
        ValueError,
        r"w1 has shape \(4, 7\)",
    ),
    # gated_feed_forward
    (
        lambda: F.gated_feed_forward(X, [WORD, WORD], None, torch.randn(8, 4), None),
        ValueError,
        r"w2 has shape \(8, 4\), expected \(-1, 5\)",
    ),
    (
        lambda: F.gated_feed_forward(X, [WORD], None, torch.randn(8, 2), None),
        ValueError,
        r"w1\[0\] has 5 rows: half of them are activated, pass an even number",
    ),
    (
        lambda: F.gated_feed_forward(X, [WORD] * 3, None, WORD.t(), None),
        ValueError,
        r"w1 holds 3 tensors: pass one \(2F, C\) or two",
    ),
    (
        lambda: F.gated_feed_forward(X, [WORD, WORD], [X[0, :5]], WORD.t(), None),
        ValueError,
        "b1 holds 1 tensors for 2 in w1: pass as many, or None",
    ),
    (
        lambda: F.gated_feed_forward(X, [WORD, WORD[:4]], None, WORD.t(), None),
        ValueError,
        r"w1\[1\] has shape \(4, 8\)",
    ),
    (
        lambda: F.gated_feed_forward(X, [WORD, WORD.half()], None, WORD.t(), None),
        TypeError,
        "w1 holds torch.float32 and torch.float16: use one dtype for both",
    ),
    (
        lambda: F.gated_feed_forward(X, [WORD, WORD], None, WORD.t(), None, "relu"),
        ValueError,
        "activation is 'relu': choose one of gelu, gelu_tanh, silu",
    ),
    # cross_entropy
    (lambda: F.cross_entropy(X, LONG + 8), IndexError, r"is 8, outside \[0, 8\)"),
    (lambda: F.cross_entropy(X[:, :0], LONG), ValueError, "no class to choose"),
    (lambda: F.mlm_loss(X[:, :0], WORD[:, :0], None, LONG), ValueError, "must not be 0"),
    (lambda: F.cross_entropy(X, LONG - 1), IndexError, "is -1"),
    (lambda: F.cross_entropy(X, LONG[:4]), ValueError, r"labels has shape \(4,\)"),
    (lambda: F.cross_entropy(X, X[:, 0]), TypeError, "labels is torch.float32"),
    (lambda: F.cross_entropy(X, LONG, reduction="avg"), ValueError, "reduction is 'avg'"),
    # mlm_loss
    (lambda: F.mlm_loss(X, WORD, None, LONG + 5), IndexError, r"is 5, outside \[0, 5\)"),
    (
        lambda: F.mlm_loss(X, torch.randn(5, 7), None, LONG),
        ValueError,
        r"weight has shape \(5, 7\)",
    ),
    (lambda: F.mlm_loss(X, WORD, None, LONG, max_rows=0), ValueError, "max_rows is 0"),
    (lambda: F.mlm_loss(X, WORD, None, LONG, rows=LONG[:2] + 6), IndexError, "6"),
    (lambda: F.mlm_loss(X, WORD, None, LONG, reduction="none"), ValueError, "reduction is 'none'"),
    # relation_loss
    (lambda: F.relation_loss(X, X[:5], CU, 4, 2), ValueError, r"teacher has shape \(5, 8\)"),
    (lambda: F.relation_loss(X[None], X, CU, 4, 2), ValueError, r"student has shape \(1, 6, 8\)"),
    (lambda: F.relation_loss(X, X, CU, 4, 0), ValueError, "num_heads is 0: .* at least 1"),
    (
        lambda: F.relation_loss(X, X, CU, 4, 3),
        ValueError,
        "student has 8 columns, which 3 heads do not divide: choose num_heads among",
    ),
    (
        lambda: F.relation_loss(X, X[:, :6], CU, 4, 4),
        ValueError,
        "teacher has 6 columns, which 4 heads do not divide",
    ),
    (lambda: F.relation_loss(X, X[:, :0], CU, 4, 2), ValueError, "teacher has 0 columns"),
    (
        lambda: F.relation_loss(X, X.bfloat16(), CU, 4, 2),
        TypeError,
        "student is torch.float32 and teacher torch.bfloat16: cast one of them",
    ),
    (lambda: F.relation_loss(X.int(), X, CU, 4, 2), TypeError, "student is torch.int32"),
    (lambda: F.relation_loss(X, X, CU[:0], 4, 2), ValueError, "cu_seqlens is empty"),
    (lambda: F.relation_loss(X, X, CU.long(), 4, 2), TypeError, "cu_seqlens is torch.int64"),
    (lambda: F.relation_loss(X, X, CU * 2, 8, 2), ValueError, "ends at 12 but there are 6 tokens"),
    (lambda: F.relation_loss(X, X, CU, 3, 2), ValueError, "sequence 0 has 4 tokens"),
    (lambda: F.relation_loss(X, X, CU, -1, 2), ValueError, "max_seqlen is -1"),
    (
        lambda: F.relation_loss(X, X, CU, 4, 2, reduction="none"),
        ValueError,
        "reduction is 'none': choose one of mean, sum",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[c[2][:40] for c in CASES])
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_meta_tensors_give_shapes():
    """Every op runs on the meta device, which has neither values nor autocast."""
    for slug in chooser.SLUGS:
        sample = parity.samples(slug, torch.float32)[1]
        kwargs = {k: parity.tree_map(v, lambda t: t.to("meta")) for k, v in sample.kwargs.items()}
        if slug == "mlm_loss":
            kwargs["compacted"] = True
        expected = getattr(F, slug)(**sample.kwargs)
        assert getattr(F, slug)(**kwargs).shape == expected.shape
