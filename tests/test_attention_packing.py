"""`flashgau.attention` on every optimised backend: padded and packed rows."""

import math

import pytest
import torch
from attention_inputs import windows
from backends import TINY, backend_fixture, backends_of, blocks, dtypes_of
from checks import REST, check_rest_is_padding, close
from hypothesis import given
from hypothesis import strategies as st
from strategies import Call, randn, seeds
from torch import Tensor

import flashgau

backend = backend_fixture("attention")
data = st.data()


def ragged_options(data, heads: int, dtype: torch.dtype) -> dict:
    """Options that mean the same for a sequence alone as in a batch."""
    options = windows(data) | {"softcap": data.draw(st.sampled_from([None, 2.0])), "return_lse": True}
    if data.draw(st.booleans()):
        options["rel_bias"] = randn(data.draw(seeds), heads, 2 * 40 - 1, dtype=dtype)
    if data.draw(st.booleans()):
        options["sinks"] = randn(data.draw(seeds), heads, dtype=dtype)
    return options


@given(data)
def test_packed_is_alone(backend, data):
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    own_keys = data.draw(st.booleans())
    counts = data.draw(st.lists(st.sampled_from([0, 1, 7, 16, 33]), min_size=1, max_size=4))
    counts_k = [data.draw(st.sampled_from([0, 1, 9, 34])) for _ in counts] if own_keys else counts
    seed, heads = data.draw(seeds), 2
    options = ragged_options(data, heads, dtype)
    sequences = [
        (
            randn(seed, 1, heads, m, 4, dtype=dtype),
            randn(seed + 1, 1, 1, n, 4, dtype=dtype),
            randn(seed + 2, 1, 1, n, 4, dtype=dtype),
        )
        for m, n in zip(counts, counts_k, strict=True)
    ]
    cu = {"cu_seqlens": torch.tensor([0, *counts]).cumsum(0)}
    if own_keys:
        cu["cu_seqlens_k"] = torch.tensor([0, *counts_k]).cumsum(0)
    packed = Call("attention", tuple(torch.cat(parts, 2) for parts in zip(*sequences, strict=True)), options | cu)

    def run(call: Call) -> list[Tensor]:
        call = call.leaves()
        q, k, v = call.args
        out, lse = call()
        # The weights of each token are its own values, so that they are the same in a pack and alone.
        loss = (out * torch.cos(7 * out.detach())).sum() + torch.where(torch.isfinite(lse), lse, 0).sum()
        grads = torch.autograd.grad(loss, [q, k, v])
        return [out.detach(), lse[..., None].detach(), *grads]

    together = run(packed)
    alone = [run(Call("attention", parts, options)) for parts in sequences]
    for a, parts in zip(together, zip(*alone, strict=True), strict=True):
        close(a, torch.cat(parts, 2), ulps=4)


@given(data)
def test_padded_is_alone_and_padding_is_irrelevant(backend, data):
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 7, 16, 33]), min_size=1, max_size=4))
    n = max(lengths) + data.draw(st.sampled_from([0, 1, 5]))
    m = data.draw(st.sampled_from([None, 1, 20]))  # None: as many queries as keys, padded like these
    rows = [x if m is None else m for x in lengths] if m != n else lengths
    seed, heads = data.draw(seeds), 2
    options = ragged_options(data, heads, dtype)
    b = len(lengths)
    q = randn(seed, b, heads, n if m is None else m, 4, dtype=dtype)
    k, v = randn(seed + 1, b, 1, n, 4, dtype=dtype), randn(seed + 2, b, 1, n, 4, dtype=dtype)
    weight = randn(seed + 3, *q.shape[:3], 4, dtype=dtype)
    lse_weight = randn(seed + 4, *q.shape[:3])
    for x, valid in ((q, rows), (k, lengths), (v, lengths), (weight, rows), (lse_weight, rows)):
        for i, length in enumerate(valid):
            x[i, :, length:] = math.nan

    def run(b: slice, m: slice, n: slice, **padding) -> list[Tensor]:
        leaves = [x[b, :, s].clone().requires_grad_() for x, s in ((q, m), (k, n), (v, n))]
        out, lse = flashgau.attention(*leaves, **options, **padding)
        seeing = torch.isfinite(lse.detach())
        cotangents = [weight[b, :, m], torch.where(seeing, lse_weight[b, :, m].to(lse.dtype), 0)]
        return [out.detach(), lse[..., None].detach(), *torch.autograd.grad([out, lse], leaves, cotangents)]

    padded = run(slice(None), slice(None), slice(None), lengths=torch.tensor(lengths))
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        alone = run(slice(i, i + 1), slice(0, row), slice(0, length))
        for a, w, valid in zip(alone, padded, (row, row, row, length, length), strict=True):
            close(w[i : i + 1, :, :valid], a, ulps=4)
            rest = w[i, :, valid:]
            assert torch.equal(rest, torch.full_like(rest, -math.inf if w is padded[1] else 0))


@pytest.mark.parametrize("name", [*backends_of("attention"), "reference"])
@pytest.mark.parametrize("case", range(len(REST)), ids=lambda case: str(REST[case][0]))
def test_rows_of_no_sequence_are_padding(name, case):
    ends, m = REST[case]
    packed, n = {"q": ends}, m
    options = {"causal": case != 1, "return_lse": True, "sinks": randn(3, 2)}
    if case % 2:  # keys that are packed otherwise
        packed["k"], n = [max(0, 3 * x // 4 - 2) for x in ends], m + 3
    if case == 1:
        options["rel_bias"] = randn(4, 2 * n - 1)
    q, k, v = randn(0, 1, 2, m, 4), randn(1, 1, 1, n, 4), randn(2, 1, 1, n, 3)
    with flashgau.use_backend(name), blocks(TINY):
        check_rest_is_padding(Call("attention", (q, k, v), options), 2, packed, "qkk" if case % 2 else "qqq", "qq")
