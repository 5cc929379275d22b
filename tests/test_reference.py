"""The reference against scalar loops, PyTorch's own attention, numerical derivatives and its own laws."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flashgau.reference.attention import dropout_kept, philox
from flashgau.reference.mixed_chunk import MixedChunkState
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from flashgau import reference

INF = math.inf
SCORES = ["relu2", "laplace", "softmax", "softmax_plus"]
GAU_SCORES = [
    *itertools.product(SCORES[:2], ["keys", "row", 2.5, 3]),
    *((score, "keys") for score in SCORES[2:]),
]
ACTIVATIONS = ["identity", "sigmoid", "relu", "relu2", "gelu", "gelu_tanh", "silu"]
seeds = st.integers(0, 2**32)


def randoms(seed: int, *shapes: tuple[int, ...], grad: bool = False) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=gen, dtype=torch.float64).requires_grad_(grad) for s in shapes]


def close(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, rtol=1e-10, atol=1e-11)


# ---------------------------------------------------------------- scalar loops: the formulas a second time


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def loop_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    bias: Tensor | None,
    sink: float,
) -> tuple[list[list[float]], list[float]]:
    """One head of one sequence: rows of O, and LSE."""
    m, n, width = len(q), len(k), q.shape[1]
    outs, lses = [], []
    for i in range(m):
        p = i + n - m
        terms = []
        for j in range(n):
            s = dot(q[i].tolist(), k[j].tolist()) / math.sqrt(width)
            if softcap is not None:
                s = softcap * math.tanh(s / softcap)
            if bias is not None:
                s += bias[(len(bias) - 1) // 2 + j - p].item()
            left, right = window if window is not None else (None, None)
            hidden = (causal and j > p) or (left is not None and j < p - left)
            if not (hidden or (right is not None and j > p + right)):
                terms.append((math.exp(s), v[j].tolist()))
        total = math.fsum(w for w, _ in terms) + math.exp(sink)
        outs.append([math.fsum(w * x[e] for w, x in terms) / (total or 1) for e in range(v.shape[1])])
        lses.append(math.log(total) if total else -INF)
    return outs, lses


def loop_score(x: float, score: str) -> float:
    if score == "relu2":
        return max(x, 0.0) ** 2
    mu, sigma = math.sqrt(0.5), math.sqrt(1 / (4 * math.pi))
    return 0.5 * (1 + math.erf((x - mu) / (sigma * math.sqrt(2))))


def loop_gau(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    score: str,
    normalizer: Any,
    causal: bool,
    bias: Tensor | None,
) -> list[list[float]]:
    m, n, width = len(q), len(k), q.shape[1]
    outs = []
    for i in range(m):
        p = i + n - m
        seen = [j for j in range(n) if not causal or j <= p]
        a = []
        for j in seen:
            s = dot(q[i].tolist(), k[j].tolist())
            b = 0.0 if bias is None else bias[(len(bias) - 1) // 2 + j - p].item()
            if score in ("relu2", "laplace"):
                divisor = {"keys": n, "row": len(seen)}.get(normalizer, normalizer)
                a.append(loop_score(s / divisor + b, score))
            else:
                c = math.log(max(len(seen), 16), 512) if score == "softmax_plus" else 1.0
                a.append(math.exp(c * s / math.sqrt(width) + b))
        if score in ("softmax", "softmax_plus"):
            a = [x / math.fsum(a) for x in a]
        out = [math.fsum(x * v[j, e].item() for x, j in zip(a, seen, strict=True)) for e in range(v.shape[1])]
        outs.append(out if gate is None else [g * x for g, x in zip(gate[i].tolist(), out, strict=True)])
    return outs


def loop_mixed_chunk(
    qq: Tensor,
    qk: Tensor,
    lq: Tensor,
    lk: Tensor,
    v: Tensor,
    gate: Tensor | None,
    chunk: int,
    score: str,
    causal: bool,
    quad_normalizer: float | None,
    lin_normalizer: Any,
    bias: Tensor | None,
) -> list[list[float]]:
    """Token by token: what token i takes from token j is a number, summed over j."""
    n = len(qq)
    outs = []
    for i in range(n):
        g = i // chunk
        out = [0.0] * v.shape[1]
        for j in range(n):
            weight = 0.0
            if j // chunk == g and (not causal or j <= i):
                x = dot(qq[i].tolist(), qk[j].tolist()) / (quad_normalizer or chunk)
                weight += loop_score(x + (0 if bias is None else bias[(len(bias) - 1) // 2 + j - i].item()), score)
            if not causal or j // chunk < g:
                tokens = g * chunk if causal else n
                divisor = tokens if lin_normalizer == "tokens" else lin_normalizer
                weight += dot(lq[i].tolist(), lk[j].tolist()) / divisor
            out = [o + weight * x for o, x in zip(out, v[j].tolist(), strict=True)]
        outs.append(out if gate is None else [g * x for g, x in zip(gate[i].tolist(), out, strict=True)])
    return outs


def as_rows(rows: list[list[float]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), width)


@st.composite
def rows_and_lengths(draw: Callable[..., Any], most: int) -> tuple[int, int, list[int] | None]:
    """A batch size, a row length, and valid lengths or None."""
    batch, n = draw(st.integers(0, 2)), draw(st.integers(0, most))
    lengths = draw(st.none() | st.lists(st.integers(0, n), min_size=batch, max_size=batch))
    return batch, n, lengths


sides = st.none() | st.integers(0, 3)


@given(
    seeds,
    rows_and_lengths(5),
    st.none() | st.integers(0, 5),
    st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
    st.booleans(),
    st.none() | st.tuples(sides, sides),
    st.none() | st.floats(0.5, 3),
    st.sampled_from([None, (), ("H",), ("B", "H"), (1, "H"), ("B", 1)]),
    st.booleans(),
)
def test_attention_is_its_formula(seed, rows, n_queries, heads, causal, window, softcap, bias_form, has_sinks):
    (batch, n, lengths), (hq, hkv) = rows, heads
    m = n if n_queries is None else n_queries
    reach = max(m, n, 1) + seed % 2
    lead = [{"B": batch, "H": hq}.get(x, x) for x in bias_form or ()]
    q, k, v, bias, sinks = randoms(
        seed, (batch, hq, m, 3), (batch, hkv, n, 3), (batch, hkv, n, 2), (*lead, 2 * reach - 1), (hq,)
    )
    out, lse = reference.attention(
        q,
        k,
        v,
        causal=causal,
        window=window,
        softcap=softcap,
        rel_bias=None if bias_form is None else bias,
        sinks=sinks if has_sinks else None,
        lengths=None if lengths is None else torch.tensor(lengths, dtype=torch.int32),
        return_lse=True,
    )
    full = bias.expand(batch, hq, -1)
    expected, expected_lse = torch.zeros_like(out), torch.full_like(lse, -INF)
    for b in range(batch):
        keys = n if lengths is None else lengths[b]
        queries = keys if m == n else m
        for h in range(hq):
            rows_o, row_lse = loop_attention(
                q[b, h, :queries],
                k[b, h * hkv // hq, :keys],
                v[b, h * hkv // hq, :keys],
                causal,
                window,
                softcap,
                None if bias_form is None else full[b, h],
                sinks[h].item() if has_sinks else -INF,
            )
            expected[b, h, :queries] = as_rows(rows_o, 2)
            expected_lse[b, h, :queries] = torch.tensor(row_lse, dtype=torch.float64)
    close(out, expected)
    close(lse, expected_lse)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("score", "normalizer"), GAU_SCORES)
@given(seeds, rows_and_lengths(5), st.none() | st.integers(0, 5), st.booleans(), st.booleans())
def test_gau_is_its_formula(score, normalizer, causal, seed, rows, n_queries, has_gate, has_bias):
    batch, n, lengths = rows
    m = n if n_queries is None else n_queries
    reach = max(m, n, 1)
    q, k, v, gate, bias = randoms(
        seed, (batch, m, 2), (batch, n, 2), (batch, n, 3), (batch, m, 3), (batch, 2 * reach - 1)
    )
    out = reference.gau_attention(
        q,
        k,
        v,
        gate if has_gate else None,
        score=score,
        normalizer=normalizer,
        causal=causal,
        rel_bias=bias if has_bias else None,
        lengths=None if lengths is None else torch.tensor(lengths),
    )
    expected = torch.zeros_like(out)
    for b in range(batch):
        keys = n if lengths is None else lengths[b]
        queries = keys if m == n else m
        rows_o = loop_gau(
            q[b, :queries],
            k[b, :keys],
            v[b, :keys],
            gate[b] if has_gate else None,
            score,
            normalizer,
            causal,
            bias[b] if has_bias else None,
        )
        expected[b, :queries] = as_rows(rows_o, 3)
    close(out, expected)


def test_softmax_plus_counts_more_than_16_keys():
    q, k, v = randoms(0, (1, 40, 2), (1, 40, 2), (1, 40, 1))
    out = reference.gau_attention(q, k, v, score="softmax_plus", causal=True)
    close(out[0], as_rows(loop_gau(q[0], k[0], v[0], None, "softmax_plus", "keys", True, None), 1))


@given(
    seeds,
    rows_and_lengths(9),
    st.integers(1, 4),
    st.sampled_from(SCORES[:2]),
    st.booleans(),
    st.sampled_from([None, 1.5]),
    st.sampled_from(["tokens", 0.7, 3]),
    st.booleans(),
    st.booleans(),
)
def test_mixed_chunk_is_its_formula(seed, rows, chunk, score, causal, quad_n, lin_n, has_gate, has_bias):
    batch, n, lengths = rows
    *four, v, gate, bias = randoms(seed, *[(batch, n, 2)] * 4, *[(batch, n, 3)] * 2, (batch, 2 * chunk + 1))
    out = reference.mixed_chunk_attention(
        *four,
        v,
        gate if has_gate else None,
        chunk_size=chunk,
        score=score,
        causal=causal,
        quad_normalizer=quad_n,
        lin_normalizer=lin_n,
        rel_bias=bias if has_bias else None,
        lengths=None if lengths is None else torch.tensor(lengths, dtype=torch.int64),
    )
    expected = torch.zeros_like(out)
    for b in range(batch):
        keep = n if lengths is None else lengths[b]
        rows_o = loop_mixed_chunk(
            *(x[b, :keep] for x in (*four, v)),
            gate[b] if has_gate else None,
            chunk,
            score,
            causal,
            quad_n,
            lin_n,
            bias[b] if has_bias else None,
        )
        expected[b, :keep] = as_rows(rows_o, 3)
    close(out, expected)


def loop_activation(name: str, x: float) -> float:
    tanh_form = math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return {
        "identity": x,
        "sigmoid": 1 / (1 + math.exp(-x)),
        "relu": max(x, 0.0),
        "relu2": max(x, 0.0) ** 2,
        "gelu": x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
        "gelu_tanh": x * 0.5 * (1 + tanh_form),
        "silu": x / (1 + math.exp(-x)),
    }[name]


@given(seeds, st.sampled_from(ACTIVATIONS), st.sampled_from(ACTIVATIONS), st.integers(0, 4))
def test_glu_is_its_formula(seed, activation, up_activation, n):
    gate, up = randoms(seed, (2, n), (2, n))
    names = {"activation": activation, "up_activation": up_activation}
    expected = [
        loop_activation(activation, g) * loop_activation(up_activation, u)
        for g, u in zip(gate.flatten().tolist(), up.flatten().tolist(), strict=True)
    ]
    out = reference.glu(gate, up, **names)
    close(out, torch.tensor(expected, dtype=torch.float64).reshape(2, n))
    close(reference.glu(torch.cat([gate, up], -1), **names), out)
    w_gate, w_up, b_gate, b_up = randoms(seed + 1, (3, n), (3, n), (3,), (3,))
    x = gate
    projected = reference.glu(x @ w_gate.T + b_gate, x @ w_up.T + b_up, **names)
    close(reference.glu_linear(x, w_gate, w_up, b_gate, b_up, **names), projected)
    projected = reference.glu(x @ w_gate.T, x @ w_up.T, **names)
    close(reference.glu_linear(x, w_gate, w_up, **names), projected)


# ---------------------------------------------------------------- PyTorch's own attention


@given(seeds, st.integers(1, 6), st.integers(1, 6), st.booleans(), st.sampled_from([None, 0.3]))
def test_attention_is_pytorch_attention(seed, m, n, causal, scale):
    q, k, v = randoms(seed, (2, 4, m, 3), (2, 2, n, 3), (2, 2, n, 5))
    causal = causal and m <= n  # PyTorch gives NaN where a query sees nothing
    mask = torch.ones(m, n, dtype=torch.bool).tril(n - m) if causal else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    close(reference.attention(q, k, v, causal=causal, scale=scale), expected)


@given(seeds, st.integers(1, 6))
def test_bias_is_an_additive_mask(seed, n):
    q, k, v, bias = randoms(seed, (2, 2, n, 3), (2, 2, n, 3), (2, 2, n, 4), (2, 2 * n - 1))
    dense = torch.stack([torch.stack([bias[:, n - 1 + j - p] for j in range(n)], -1) for p in range(n)], -2)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    close(reference.attention(q, k, v, rel_bias=bias), expected)


def test_gau_softmax_is_attention_with_one_head():
    q, k, v, bias = randoms(0, (2, 5, 3), (2, 7, 3), (2, 7, 4), (2, 13))
    out = reference.gau_attention(q, k, v, score="softmax", causal=True, rel_bias=bias)
    expected = reference.attention(q[:, None], k[:, None], v[:, None], causal=True, rel_bias=bias[:, None])
    close(out, expected[:, 0])


# ---------------------------------------------------------------- laws


@given(seeds, st.integers(1, 7), st.booleans())
def test_attention_ignores_the_order_of_keys_and_keeps_constants(seed, n, has_sinks):
    q, k, v, sinks = randoms(seed, (1, 2, 3, 4), (1, 2, n, 4), (1, 2, n, 2), (2,))
    options = {"sinks": sinks} if has_sinks else {}
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    expected = reference.attention(q, k, v, **options)
    close(reference.attention(q, k[:, :, order], v[:, :, order], **options), expected)
    if not has_sinks:
        close(reference.attention(q, k, torch.full_like(v, 3.0)), torch.full((1, 2, 3, 2), 3.0).double())


@given(seeds, st.integers(0, 8))
def test_attention_over_split_keys_merges_by_lse(seed, cut):
    q, k, v = randoms(seed, (2, 2, 3, 4), (2, 2, 8, 4), (2, 2, 8, 5))
    parts = [
        reference.attention(q, k[:, :, part], v[:, :, part], return_lse=True) for part in (slice(0, cut), slice(cut, 8))
    ]
    out, lse = reference.attention(q, k, v, return_lse=True)
    merged = torch.logaddexp(parts[0][1], parts[1][1])
    close(merged, lse)
    close(sum(o * (part_lse - merged).exp()[..., None] for o, part_lse in parts), out)


@given(seeds, st.integers(1, 6), st.integers(0, 6))
def test_causal_prefix_is_stable(seed, prefix, more):
    """What a causal token gets does not depend on what follows, if the normaliser does not."""
    n = prefix + more
    q, k, v = randoms(seed, (1, n, 2), (1, n, 2), (1, n, 3))

    def heads(*xs: Tensor) -> list[Tensor]:
        return [x[:, None] for x in xs]

    cut = [x[:, :prefix] for x in (q, k, v)]
    full = reference.attention(*heads(q, k, v), causal=True)
    close(reference.attention(*heads(*cut), causal=True), full[:, :, :prefix])
    for normalizer in ("row", 4.0):
        for score in SCORES[:2]:
            options = {"causal": True, "score": score, "normalizer": normalizer}
            full = reference.gau_attention(q, k, v, **options)
            close(reference.gau_attention(*cut, **options), full[:, :prefix])
            # Fewer queries than keys stand at the end: this is how decoding calls it.
            close(reference.gau_attention(q[:, prefix:], k, v, **options), full[:, prefix:])
    full = reference.mixed_chunk_attention(q, k, k, q, v, causal=True, chunk_size=3)
    close(
        reference.mixed_chunk_attention(*(x[:, :prefix] for x in (q, k, k, q, v)), causal=True, chunk_size=3),
        full[:, :prefix],
    )


def test_one_chunk_is_gau_and_no_chunks_is_linear():
    *four, v, bias = randoms(0, *[(1, 6, 2)] * 4, (1, 6, 3), (11,))
    options = {"rel_bias": bias, "causal": True}
    out = reference.mixed_chunk_attention(*four, v, chunk_size=6, **options)
    close(out, reference.gau_attention(four[0], four[1], v, normalizer=6, **options))
    # With scores pushed to zero by the bias, what is left of the non-causal form is (lin_q lin_k^T) v / N.
    off = torch.full((11,), -1e3, dtype=torch.float64)
    out = reference.mixed_chunk_attention(*four, v, chunk_size=2, rel_bias=off)
    close(out, four[2] @ four[3].mT @ v / 6)


# ---------------------------------------------------------------- packing and padding


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def pad(x: Tensor, n: int, value: float, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = n - shape[dim]
    return torch.cat([x, x.new_full(shape, value)], dim)


# Each case: shapes of the sequence inputs (N for the tokens), of the shared inputs, the token axis, a call.
Case = tuple[list[tuple[Any, ...]], list[tuple[int, ...]], int, Callable[..., Tensor]]


def call_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor, **where: Any) -> Tensor:
    out, lse = reference.attention(
        q, k, v, rel_bias=bias, sinks=sinks, causal=True, window=(4, None), return_lse=True, **where
    )
    return torch.cat([out, torch.where(lse == -INF, 0.0, lse)[..., None]], -1)


def call_gau(score: str, normalizer: Any, causal: bool) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor, **where: Any) -> Tensor:
        return reference.gau_attention(
            q, k, v, gate, rel_bias=bias, score=score, normalizer=normalizer, causal=causal, **where
        )

    return call


def call_mixed_chunk(causal: bool) -> Callable[..., Tensor]:
    def call(*xs: Tensor, **where: Any) -> Tensor:
        *inputs, bias = xs
        return reference.mixed_chunk_attention(*inputs, rel_bias=bias, causal=causal, chunk_size=3, **where)

    return call


GAU_SHAPES = [("N", 2), ("N", 2), ("N", 3), ("N", 3)]
MIXED_SHAPES = [("N", 2)] * 4 + [("N", 3)] * 2
CASES: dict[str, Case] = {
    "attention": ([(4, "N", 2), (2, "N", 2), (2, "N", 3)], [(4, 21), (4,)], -2, call_attention),
    "relu2 keys": (GAU_SHAPES, [(21,)], -2, call_gau("relu2", "keys", True)),
    "relu2 row": (GAU_SHAPES, [(21,)], -2, call_gau("relu2", "row", True)),
    "laplace": (GAU_SHAPES, [(21,)], -2, call_gau("laplace", 2.0, False)),
    "softmax_plus": (GAU_SHAPES, [(21,)], -2, call_gau("softmax_plus", "keys", True)),
    "mixed causal": (MIXED_SHAPES, [(21,)], -2, call_mixed_chunk(True)),
    "mixed": (MIXED_SHAPES, [(21,)], -2, call_mixed_chunk(False)),
}


@pytest.mark.parametrize("name", CASES)
@given(
    seeds,
    st.lists(st.integers(0, 7), min_size=1, max_size=3),
    st.integers(0, 3),
    st.sampled_from([0.0, math.nan]),
)
def test_packed_and_padded_are_alone(name, seed, sizes, spare, filler):
    """Outputs and gradients of each sequence, run alone, packed and padded, whatever the padding holds."""
    shapes, shared_shapes, axis, call = CASES[name]
    shared = randoms(seed, *shared_shapes)
    alone = [
        randoms(seed + 1 + g, *[tuple(n if x == "N" else x for x in s) for s in shapes]) for g, n in enumerate(sizes)
    ]

    shared_a, outs, grads = leaves(shared), [], []
    for tensors in alone:
        inputs = leaves([x[None] for x in tensors])
        out = call(*inputs, *shared_a)
        out.square().sum().backward()
        outs.append(out[0])
        grads.append([x.grad[0] for x in inputs])

    # Packed: end to end in one row, with tokens of no sequence after them.
    total, bounds = sum(sizes), torch.tensor([0, *sizes]).cumsum(0).int()
    packed = leaves([pad(torch.cat(xs, axis), total + spare, filler, axis)[None] for xs in zip(*alone, strict=True)])
    shared_p = leaves(shared)
    out = call(*packed, *shared_p, cu_seqlens=bounds)
    out.square().sum().backward()
    close(out[0], pad(torch.cat(outs, axis), total + spare, 0.0, axis))
    for x, parts in zip(packed, zip(*grads, strict=True), strict=True):
        close(x.grad[0], pad(torch.cat(parts, axis), total + spare, 0.0, axis))

    # Padded: each in its row.
    longest = max(sizes) + spare
    padded = leaves([torch.stack([pad(x, longest, filler, axis) for x in xs]) for xs in zip(*alone, strict=True)])
    shared_b = leaves(shared)
    out = call(*padded, *shared_b, lengths=torch.tensor(sizes))
    out.square().sum().backward()
    close(out, torch.stack([pad(o, longest, 0.0, axis) for o in outs]))
    for x, parts in zip(padded, zip(*grads, strict=True), strict=True):
        close(x.grad, torch.stack([pad(part, longest, 0.0, axis) for part in parts]))
    for a, p, b in zip(shared_a, shared_p, shared_b, strict=True):
        close(p.grad, a.grad)
        close(b.grad, a.grad)


@given(seeds, st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=3))
def test_packed_cross_attention_is_alone(seed, sizes):
    ms, ns = [m for m, _ in sizes], [n for _, n in sizes]
    q, k, v, bias = randoms(seed, (1, 2, sum(ms), 3), (1, 1, sum(ns), 3), (1, 1, sum(ns), 2), (2, 9))
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (ms, ns))
    options = {"causal": True, "rel_bias": bias, "return_lse": True}
    out, lse = reference.attention(q, k, v, cu_seqlens=cu_q, cu_seqlens_k=cu_k, **options)
    assert out.shape == (1, 2, sum(ms), 2)
    for g in range(len(sizes)):
        rows, keys = slice(cu_q[g], cu_q[g + 1]), slice(cu_k[g], cu_k[g + 1])
        alone = reference.attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], **options)
        close((out[:, :, rows], lse[:, :, rows]), alone)


def test_padding_has_no_lse_even_with_sinks():
    q, k, v, sinks = randoms(0, (1, 2, 4, 3), (1, 2, 4, 3), (1, 2, 4, 3), (2,))
    sinks.requires_grad_()
    _, lse = reference.attention(q, k, v, sinks=sinks, lengths=torch.tensor([0]), return_lse=True)
    assert (lse == -INF).all()
    lse.sum().backward()
    assert (sinks.grad == 0).all()


def test_a_row_that_sees_nothing_is_zero_with_zero_gradient():
    q, k, v = randoms(0, (1, 1, 5, 3), (1, 1, 2, 3), (1, 1, 2, 4), grad=True)
    out, lse = reference.attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :, :3] == 0).all()
    assert (lse[:, :, :3] == -INF).all()
    out[:, :, :3].sum().backward()
    assert all((x.grad == 0).all() for x in (q, k, v))
    sinks = torch.tensor([0.3], dtype=torch.float64)
    out, lse = reference.attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert (out[:, :, :3] == 0).all()
    close(lse[0, 0, :3], sinks.expand(3))
    for score in SCORES:
        q1, k1, v1 = (x[:, 0].detach().requires_grad_() for x in (q, k, v))
        out = reference.gau_attention(q1, k1, v1, score=score, causal=True)
        assert (out[:, :3] == 0).all()
        out[:, :3].sum().backward()
        assert all((x.grad == 0).all() for x in (q1, k1, v1))


@pytest.mark.parametrize(("batch", "m", "n"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0)])
def test_empty_tensors_give_empty_or_zero_results_with_gradients(batch, m, n):
    q, k, v = randoms(0, (batch, 2, m, 3), (batch, 2, n, 3), (batch, 2, n, 4), grad=True)
    for out in (
        reference.attention(q, k, v),
        reference.gau_attention(q[:, 0], k[:, 0], v[:, 0]),
        reference.mixed_chunk_attention(*[k[:, 0]] * 4, v[:, 0], chunk_size=2, causal=True),
    ):
        assert (out == 0).all() or out.shape[-2] == n
        out.sum().backward()
    assert all(x.grad.shape == x.shape for x in (q, k, v))


def test_heads_may_be_absent():
    q = torch.zeros(2, 0, 3, 4)
    assert reference.attention(q, q, q).shape == (2, 0, 3, 4)


def test_short_bias_is_refused():
    q = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="needs 7"):
        reference.attention(q, q, q, rel_bias=torch.zeros(5))


# ---------------------------------------------------------------- mixed chunk state

FIELDS = ("kv", "quad_k", "lin_k", "v", "position")


def mixed_inputs(seed: int, batch: int, n: int) -> tuple[list[Tensor], Tensor]:
    *inputs, bias = randoms(seed, *[(batch, n, 2)] * 4, *[(batch, n, 3)] * 2, (batch, 9))
    return inputs, bias


@given(seeds, st.integers(1, 4), st.integers(0, 9), st.data())
def test_a_sequence_continues_from_its_state(seed, chunk, n, data):
    inputs, bias = mixed_inputs(seed, 2, n)
    options: dict[str, Any] = {"chunk_size": chunk, "causal": True, "rel_bias": bias, "return_state": True}
    expected, last = reference.mixed_chunk_attention(*inputs, **options)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=3)))
    state, outs = None, []
    for start, stop in zip([0, *cuts], [*cuts, n], strict=True):
        out, state = reference.mixed_chunk_attention(
            *(x[:, start:stop] for x in inputs), initial_state=state, **options
        )
        outs.append(out)
    close(torch.cat(outs, 1), expected)
    for name in FIELDS:
        close(getattr(state, name), getattr(last, name))
    assert last.position.tolist() == [n, n]
    assert last.open_tokens.tolist() == [n % chunk] * 2
    closed = n - n % chunk
    close(last.kv, inputs[3][:, :closed].mT @ inputs[4][:, :closed])
    for x, kept in ((inputs[1], last.quad_k), (inputs[3], last.lin_k), (inputs[4], last.v)):
        close(kept, pad(x[:, closed:], chunk, 0.0, 1))


@given(seeds, st.integers(1, 3), st.integers(1, 7), st.sampled_from(["tokens", 1.5]))
def test_token_by_token_is_parallel(seed, chunk, n, lin_normalizer):
    inputs, bias = mixed_inputs(seed, 2, n)
    options: dict[str, Any] = {"rel_bias": bias, "lin_normalizer": lin_normalizer, "score": "laplace"}
    _, state = reference.mixed_chunk_attention(
        *(x[:, :0] for x in inputs), chunk_size=chunk, causal=True, return_state=True, **options
    )
    outs = []
    for i in range(n):
        out, state = reference.mixed_chunk_step(*(x[:, i : i + 1] for x in inputs), state=state, **options)
        outs.append(out)
    expected = reference.mixed_chunk_attention(*inputs, chunk_size=chunk, causal=True, **options)
    close(torch.cat(outs, 1), expected)


@given(
    seeds,
    st.lists(st.integers(0, 7), min_size=2, max_size=2),
    st.lists(st.integers(0, 5), min_size=2, max_size=2),
)
def test_states_of_padded_and_packed_sequences(seed, first, second):
    """Two sequences of different lengths, continued by different lengths: padded, then packed, as alone."""
    options: dict[str, Any] = {"chunk_size": 3, "causal": True, "return_state": True}
    inputs, _ = mixed_inputs(seed, 2, 12)
    cut = [
        [torch.cat([x[b : b + 1, : first[b]] for b in range(2)], 1) for x in inputs],
        [torch.cat([x[b : b + 1, first[b] : first[b] + second[b]] for b in range(2)], 1) for x in inputs],
    ]
    bounds = [torch.tensor([0, *x]).cumsum(0) for x in (first, second)]
    _, state = reference.mixed_chunk_attention(*(x[:, :7] for x in inputs), lengths=torch.tensor(first), **options)
    _, packed_state = reference.mixed_chunk_attention(*cut[0], cu_seqlens=bounds[0], **options)
    for name in FIELDS:
        close(getattr(packed_state, name), getattr(state, name))
    out, state = reference.mixed_chunk_attention(*cut[1], cu_seqlens=bounds[1], initial_state=state, **options)
    expected, alone = reference.mixed_chunk_attention(
        *inputs, lengths=torch.tensor(first) + torch.tensor(second), **options
    )
    close(out[0], torch.cat([expected[b, first[b] : first[b] + second[b]] for b in range(2)]))
    for name in FIELDS:
        close(getattr(state, name), getattr(alone, name))


def test_gradients_flow_through_the_state():
    inputs, bias = mixed_inputs(0, 1, 8)
    options: dict[str, Any] = {"chunk_size": 3, "causal": True, "rel_bias": bias}
    whole, parts = leaves(inputs), leaves(inputs)
    reference.mixed_chunk_attention(*whole, **options).square().sum().backward()
    a, state = reference.mixed_chunk_attention(*(x[:, :5] for x in parts), return_state=True, **options)
    b = reference.mixed_chunk_attention(*(x[:, 5:] for x in parts), initial_state=state, **options)
    (a.square().sum() + b.square().sum()).backward()
    for x, y in zip(parts, whole, strict=True):
        close(x.grad, y.grad)


def test_state_ignores_rows_past_the_open_tokens_and_selects_rows():
    inputs, _ = mixed_inputs(0, 2, 5)
    options: dict[str, Any] = {"chunk_size": 3, "causal": True}
    _, state = reference.mixed_chunk_attention(*inputs, return_state=True, **options)
    expected = reference.mixed_chunk_attention(*inputs, initial_state=state, **options)
    dirty = {name: getattr(state, name).clone() for name in ("quad_k", "lin_k", "v")}
    for x in dirty.values():
        x[:, 2:] = math.nan
    close(reference.mixed_chunk_attention(*inputs, initial_state=replace(state, **dirty), **options), expected)
    index = torch.tensor([1, 1, 0])
    picked = state.select(index)
    assert isinstance(picked, MixedChunkState)
    assert picked.chunk_size == 3
    out = reference.mixed_chunk_attention(*(x[index] for x in inputs), initial_state=picked, **options)
    close(out, expected[index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_of_half_inputs_keeps_a_wide_sum(dtype):
    inputs = [x.to(dtype) for x in mixed_inputs(0, 2, 5)[0]]
    options: dict[str, Any] = {"chunk_size": 3, "causal": True, "return_state": True}
    out, state = reference.mixed_chunk_attention(*inputs, **options)
    out2, state2 = reference.mixed_chunk_step(*(x[:, :1] for x in inputs), state=state)
    assert out.dtype == out2.dtype == dtype
    for s in (state, state2):
        assert s.kv.dtype == torch.float32
        assert s.quad_k.dtype == s.lin_k.dtype == s.v.dtype == dtype


def test_state_of_an_empty_batch():
    inputs, _ = mixed_inputs(0, 0, 4)
    _, state = reference.mixed_chunk_attention(*inputs, chunk_size=3, causal=True, return_state=True)
    assert [tuple(getattr(state, name).shape) for name in FIELDS] == [
        (0, 2, 3),
        (0, 3, 2),
        (0, 3, 2),
        (0, 3, 3),
        (0,),
    ]


# ---------------------------------------------------------------- dropout


def philox_by_ints(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox-4x32-10 with Python's own integers."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        x, y = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (y >> 32) ^ b ^ k0, y % 2**32, (x >> 32) ^ d ^ k1, x % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return a, b, c, d


ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI[:4], PI[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_known_answers(counter, key, words):
    """The vectors published with Random123 (Salmon et al. 2011)."""
    assert philox_by_ints(counter, key) == words
    assert tuple(x.item() for x in philox(tuple(torch.tensor(c) for c in counter), key)) == words


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 5), st.sampled_from([0.1, 0.5, 0.9]))
def test_kept_set_is_the_function_of_seed_and_place(seed, number, p):
    kept = dropout_kept(torch.tensor([seed]), p, number, 2, 3, 6)
    assert (kept == dropout_kept(seed, p, number, 2, 3, 6)).all()
    for h in range(2):
        for i in range(3):
            for j in range(6):
                word = philox_by_ints((j // 4, i, h, number), (seed % 2**32, (seed >> 32) % 2**32))[j % 4]
                assert kept[h, i, j].item() == (word >= math.floor(p * 2**32))


@given(seeds, st.sampled_from([0.0, 0.3, 1.0]))
def test_dropout_scales_the_kept_weights_and_nothing_else(seed, p):
    q, k, sinks = randoms(seed, (2, 2, 5, 3), (2, 2, 5, 3), (2,))
    v = torch.eye(5, dtype=torch.float64).expand(2, 2, 5, 5)  # so that the output is the matrix of weights
    options: dict[str, Any] = {"sinks": sinks, "causal": True, "return_lse": True}
    weights, lse = reference.attention(q, k, v, **options)
    out, lse_d = reference.attention(q, k, v, dropout_p=p, dropout_seed=seed, **options)
    kept = torch.stack([dropout_kept(seed, p, b, 2, 5, 5) for b in range(2)])
    close(out, weights * kept / (1 - p) if p < 1 else torch.zeros_like(weights))
    close(lse_d, lse)


@given(seeds, st.lists(st.integers(0, 6), min_size=1, max_size=3))
def test_dropout_of_packed_sequences_is_that_of_rows(seed, sizes):
    rows = [randoms(seed + g, *[(2, n, 3)] * 3) for g, n in enumerate(sizes)]
    packed = [torch.cat(xs, 1)[None] for xs in zip(*rows, strict=True)]
    padded = [torch.stack([pad(x, 6, 0.0, 1) for x in xs]) for xs in zip(*rows, strict=True)]
    drop: dict[str, Any] = {"dropout_p": 0.4, "dropout_seed": seed}
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    out = reference.attention(*packed, cu_seqlens=bounds, **drop)[0]
    by_row = reference.attention(*padded, lengths=torch.tensor(sizes), **drop)
    close(out, torch.cat([by_row[g, :, :n] for g, n in enumerate(sizes)], 1))


def test_dropout_drops_its_share_and_draws_its_seed_from_torch():
    kept = dropout_kept(7, 0.25, 0, 4, 64, 64).double()
    assert abs(kept.mean().item() - 0.75) < 5 * math.sqrt(0.25 * 0.75 / kept.numel())
    q = torch.randn(1, 1, 8, 4)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(reference.attention(q, q, q, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


# ---------------------------------------------------------------- derivatives


def finite_lse(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return out, torch.where(lse == -INF, 0.0, lse)


LENGTHS, BOUNDS = torch.tensor([3, 1]), torch.tensor([0, 1, 1, 3])
HEADS = [(2, 2, 3, 2), (2, 1, 3, 2), (2, 1, 3, 1)]
ROW = [(1, 2, 3, 2), (1, 1, 3, 2), (1, 1, 3, 1)]
GAU = [(2, 3, 2), (2, 3, 2), (2, 3, 1), (2, 3, 1), (5,)]
MIXED = [(1, 5, 1)] * 4 + [(1, 5, 2)] * 2 + [(5,)]
STATE = [*MIXED, (1, 1, 2), (1, 2, 1), (1, 2, 1), (1, 2, 2)]


def continued(*xs: Tensor) -> tuple[Tensor, ...]:
    *inputs, bias, kv, quad_k, lin_k, v = xs
    state = MixedChunkState(kv, quad_k, lin_k, v, torch.tensor([5]))
    out, state = reference.mixed_chunk_attention(
        *inputs, chunk_size=2, causal=True, rel_bias=bias, initial_state=state, return_state=True
    )
    return out, state.kv, state.quad_k, state.lin_k, state.v


def gau(**options: Any) -> Callable[..., Any]:
    return lambda *xs: reference.gau_attention(*xs[:4], rel_bias=xs[4], **options)


def mixed(**options: Any) -> Callable[..., Any]:
    return lambda *xs: reference.mixed_chunk_attention(*xs[:6], rel_bias=xs[6], chunk_size=2, **options)


DERIVATIVES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "attention": (reference.attention, HEADS),
    "attention causal window lse": (
        lambda q, k, v: reference.attention(q, k, v, causal=True, window=(1, 0), return_lse=True),
        HEADS,
    ),
    "attention softcap bias sinks lse": (
        lambda q, k, v, b, s: reference.attention(
            q, k, v, softcap=1.5, rel_bias=b, sinks=s, scale=0.8, return_lse=True
        ),
        [*HEADS, (2, 5), (2,)],
    ),
    "attention lengths": (
        lambda q, k, v: finite_lse(*reference.attention(q, k, v, lengths=LENGTHS, return_lse=True)),
        HEADS,
    ),
    "attention packed": (
        lambda q, k, v, b: reference.attention(
            q, k, v, cu_seqlens=BOUNDS, cu_seqlens_k=torch.tensor([0, 0, 2, 3]), rel_bias=b
        ),
        [*ROW, (1, 2, 5)],
    ),
    "attention more queries than keys": (
        lambda q, k, v: finite_lse(*reference.attention(q, k, v, causal=True, return_lse=True)),
        [(1, 1, 3, 2), (1, 1, 2, 2), (1, 1, 2, 2)],
    ),
    "attention dropout": (
        lambda q, k, v: reference.attention(q, k, v, dropout_p=0.4, dropout_seed=3),
        HEADS,
    ),
    **{f"gau {score}": (gau(score=score), GAU) for score in SCORES},
    "gau row causal": (gau(normalizer="row", causal=True), GAU),
    "gau number lengths": (gau(score="laplace", normalizer=2.0, lengths=LENGTHS), GAU),
    "gau softmax causal lengths": (gau(score="softmax", causal=True, lengths=LENGTHS), GAU),
    "mixed": (mixed(), MIXED),
    "mixed laplace lengths": (mixed(score="laplace", lengths=torch.tensor([3])), MIXED),
    "mixed causal packed": (
        mixed(causal=True, lin_normalizer=1.5, cu_seqlens=torch.tensor([0, 3, 5])),
        MIXED,
    ),
    "mixed state": (continued, STATE),
    **{
        f"glu {a}": (lambda g, u, a=a: reference.glu(g, u, activation=a, up_activation=a), [(3,), (3,)])
        for a in ACTIVATIONS
    },
    "glu halves": (lambda g: reference.glu(g), [(2, 4)]),
    "glu_linear": (reference.glu_linear, [(2, 2), (3, 2), (3, 2), (3,), (3,)]),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_first_and_second_derivatives(name):
    function, shapes = DERIVATIVES[name]
    inputs = randoms(0, *shapes, grad=True)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", DERIVATIVES)
def test_third_derivatives_exist(name):
    function, shapes = DERIVATIVES[name]
    inputs = randoms(1, *shapes, grad=True)
    out = function(*inputs)
    value = sum(x.pow(4).sum() for x in (out if isinstance(out, tuple) else (out,)))
    for _ in range(3):
        grads = torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)
        assert all(torch.isfinite(g).all() for g in grads)
        value = sum(g.square().sum() for g in grads)


# ---------------------------------------------------------------- dtypes

CALLS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "attention": (reference.attention, [(1, 2, 9, 4)] * 3),
    "gau": (reference.gau_attention, [(1, 9, 4)] * 4),
    "mixed": (reference.mixed_chunk_attention, [(1, 9, 4)] * 6),
    "glu": (reference.glu, [(9, 4)] * 2),
    "glu_linear": (reference.glu_linear, [(9, 4), (5, 4), (5, 4), (5,), (5,)]),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_fp32(name, dtype):
    function, shapes = CALLS[name]
    inputs = [x.to(dtype) for x in randoms(0, *shapes)]
    wide = function(*(x.float() for x in inputs))
    out = function(*inputs)
    assert out.dtype == dtype
    assert torch.equal(out, wide.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(*inputs), out)
    plain = function.__wrapped__(*inputs)
    assert plain.dtype == dtype
    assert_close(plain.float(), wide, rtol=0.1, atol=0.1)
    leaf = inputs[0].clone().requires_grad_()
    function(leaf, *inputs[1:]).float().sum().backward()
    assert leaf.grad.dtype == dtype


def test_side_inputs_and_lse_may_be_fp32_beside_half():
    q, k, v, bias, sinks = (x.bfloat16() for x in randoms(0, *[(1, 2, 3, 4)] * 3, (5,), (2,)))
    out, lse = reference.attention(q, k, v, rel_bias=bias.float(), sinks=sinks.float(), return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    same, _ = reference.attention(q, k, v, rel_bias=bias, sinks=sinks, return_lse=True)
    assert torch.equal(out, same)
    plain = reference.attention.__wrapped__(q, k, v, rel_bias=bias.float(), sinks=sinks.float())
    assert plain.dtype == torch.bfloat16
