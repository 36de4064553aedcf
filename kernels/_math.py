"""Device maths shared by the kernels, without loads and stores; activations come with their derivatives."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
RSQRT_2 = tl.constexpr(0.7071067811865476)
RSQRT_2PI = tl.constexpr(0.3989422804014327)
# twice sqrt(2 / pi): tanh(x) is computed as 2 sigmoid(2 x) - 1
TWICE_SQRT_2_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def gelu_and_derivative(u, TANH: tl.constexpr, SHORT: tl.constexpr):
    """gelu(u) and its derivative Phi(u) + u phi(u); in the tanh form s + u s (1 - s) z'(u) with s = sigmoid(z(u)).

    SHORT is for 16-bit results: erfc by Abramowitz and Stegun 7.1.26, to 1.5e-7, from the exponential of the density.
    """
    if TANH:
        z = TWICE_SQRT_2_PI * (u + CUBIC * u * u * u)
        cdf = 1.0 / (1.0 + tl.exp(0.0 - z))
        density = cdf * (1.0 - cdf) * TWICE_SQRT_2_PI * (1.0 + 3.0 * CUBIC * u * u)
    else:
        power = tl.exp(-0.5 * u * u)
        if SHORT:
            t = 1.0 / (1.0 + 0.3275911 * RSQRT_2 * tl.abs(u))
            tail = 1.061405429 * t - 1.453152027
            tail = tail * t + 1.421413741
            tail = tail * t - 0.284496736
            tail = 0.5 * power * t * (tail * t + 0.254829592)
            cdf = tl.where(u > 0, 1.0 - tail, tail)
        else:
            cdf = 0.5 + 0.5 * tl.erf(u * RSQRT_2)
        density = RSQRT_2PI * power
    return u * cdf, cdf + u * density


@triton.jit
def activation_and_derivative(u, ACTIVATION: tl.constexpr, SHORT: tl.constexpr):
    """act(u) and its derivative for "gelu", "gelu_tanh" or "silu": u s and s + u s (1 - s) with s = sigmoid(u)."""
    if ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(0.0 - u))
        value = u * s
        derivative = s + value * (1.0 - s)
    else:
        value, derivative = gelu_and_derivative(u, ACTIVATION == "gelu_tanh", SHORT)
    return value, derivative


@triton.jit
def _wide(a: tl.constexpr, c):
    """High and low half of a 32 x 32-bit product by one instruction; tl.umulhi and a product take two."""
    product = c.to(tl.uint64) * a
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Philox4x32-10 of uint32 counters that broadcast against each other; the key is the int64 seed."""
    k0, k1 = seed.to(tl.uint32), (seed.to(tl.uint64) >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = _wide(0xD2511F53, c0)
        high1, low1 = _wide(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def keep(seed, c0, c1, c2, c3, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Mask (ROWS, COLS) of the elements that dropout keeps; fastbert/backend/reference/philox.py has the counter.

    c0 (1, COLS / 4) numbers the quads of columns, c1 (ROWS, 1) the rows; one Philox call serves four elements.
    """
    zero = tl.zeros((1, 1), tl.uint32)
    c2, c3 = (zero + c2).to(tl.uint32), (zero + c3).to(tl.uint32)
    w0, w1, w2, w3 = philox(seed, c0.to(tl.uint32), c1.to(tl.uint32), c2, c3)
    least = threshold.to(tl.uint32)
    even = tl.join(w0 >= least, w2 >= least)
    odd = tl.join(w1 >= least, w3 >= least)
    return tl.reshape(tl.join(even, odd), (ROWS, COLS))


@triton.jit
def moments(x, inside, C, eps):
    """x - mean (0 outside the row), the mean and 1 / sqrt(variance + eps) of the rows x (ROWS, BLOCK_C) fp32."""
    mean = tl.sum(x, 1) / C
    centred = tl.where(inside, x - mean[:, None], 0.0)
    return centred, mean, tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)


@triton.jit
def norm_backward(g, xhat, rstd, C):
    """dx = rstd (g - mean(g) - xhat mean(g xhat)) of rows (ROWS, BLOCK_C); g and xhat are 0 outside the row."""
    along = tl.sum(g * xhat, 1) / C
    return rstd[:, None] * (g - (tl.sum(g, 1) / C)[:, None] - xhat * along[:, None])
