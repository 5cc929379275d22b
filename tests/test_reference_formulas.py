"""The reference against scalar loops, which write the formulas a second time, and PyTorch's own attention."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from reference_values import ACTIVATIONS, INF, SCORES, close, randoms, seeds
from torch import Tensor

from flashgau import reference

GAU_SCORES = [
    *itertools.product(SCORES[:2], ["keys", "row", 2.5, 3]),
    *((score, "keys") for score in SCORES[2:]),
]


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
