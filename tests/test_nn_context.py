"""GAU as cross attention: keys and values of a context."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import stirred
from torch import Tensor

import flashgau
from flashgau import nn

DOUBLE = torch.float64
DIM, S = 12, 6
PLAIN = {"bias": "none", "rotary_dim": 0}


def cross(**options):
    torch.manual_seed(0)
    return stirred(nn.GAU(DIM, key_dim=S, dtype=DOUBLE, **{**PLAIN, **options}))


def given(m: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(2, size, DIM, dtype=DOUBLE, generator=generator) for size in (m, n))
    return x.requires_grad_(), context.requires_grad_()


def formula(layer: nn.GAU, x: Tensor, context: Tensor, lengths: list[int]) -> Tensor:
    """Row by row, with the fp64 reference on the whole projections of both sequences."""
    rows = []
    for row, length in enumerate(lengths):
        heads = []
        for sequence in (x[row : row + 1], context[row : row + 1, :length]):
            hidden = F.silu(F.linear(layer.norm(sequence), layer.to_hidden.weight, layer.to_hidden.bias))
            heads.append(hidden.split((layer.hidden, layer.hidden, S), -1))
        (u, _, zq), (_, v, zk) = heads
        q, k = layer.offset_scale(zq)[:, 0], layer.offset_scale(zk)[:, 1]
        out = flashgau.reference.gau_attention(q, k, v, u, score=layer.score, normalizer=layer.normalizer)
        y = F.linear(out, layer.to_out.weight, layer.to_out.bias)
        rows.append(layer.post_norm(x[row : row + 1] + y if layer.residual else y))
    return torch.cat(rows)


@pytest.mark.parametrize("sizes", [(5, 9), (7, 7), (9, 4), (1, 1)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"score": "laplace", "normalizer": "row"}, {"score": "softmax"}, {"spec": "gau-alpha"}, {"residual": False}],
    ids=str,
)
def test_cross_attention_is_its_formula(options, padded, sizes):
    layer, (x, context) = cross(**options), given(*sizes)
    m, n = sizes
    lengths = [n, max(1, n - 2)] if padded else [n, n]
    spoilt = context.clone()
    for row, length in enumerate(lengths):
        spoilt.data[row, length:] = 1e3
    got = layer(x, context=spoilt, context_lengths=torch.tensor(lengths) if padded else None)
    wanted = formula(layer, x, context, lengths)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    weights = torch.randn(2, m, DIM, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    leaves = [x, context, *layer.parameters()]
    ours, theirs = (torch.autograd.grad((y * weights).sum(), leaves) for y in (got, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_padding_of_x_gets_nothing_and_gives_nothing():
    layer, (x, context) = cross(), given(5, 8)
    got = layer(x, context=context, lengths=torch.tensor([5, 2]))
    whole = layer(x, context=context)
    torch.testing.assert_close(got[0], whole[0])
    torch.testing.assert_close(got[1, :2], whole[1, :2])
    torch.testing.assert_close(got[1, 2:], x[1, 2:] + layer.to_out.bias)
    (dcontext,) = torch.autograd.grad(got[1, 2:].sum(), context)
    assert not dcontext.any()


@pytest.mark.parametrize("lengths", [None, torch.tensor([6, 3])], ids=["whole", "padded"])
def test_decoding_looks_at_keys_that_were_made_once(lengths, monkeypatch):
    layer, (x, context) = cross(), given(9, 6)
    with torch.no_grad():
        whole = layer(x, context=context, context_lengths=lengths)
        first, state = layer(x[:, :2], context=context, context_lengths=lengths, return_state=True)
        keys = state.memory.keys.clone()
        made = []
        monkeypatch.setattr(nn.KeyValueCache, "append", lambda *_: made.append(1))
        parts = [first, layer(x[:, 2:5], state=state)]  # several tokens, then one by one; 1 and 6 tokens among them
        for token in x[:, 5:].split(1, 1):
            y, after = layer.step(token, state, inplace=True)
            assert after is state
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
        assert made == []
        assert torch.equal(state.memory.keys, keys)
        assert state.truncate(3) is state
        for twin in (state.clone(), state.to(DOUBLE)):
            torch.testing.assert_close(layer.step(x[:, :1], twin)[0], whole[:, :1], rtol=1e-9, atol=1e-9)
        twin.reorder(torch.tensor([1, 0]))
        torch.testing.assert_close(layer.step(x.flip(0)[:, :1], twin)[0], whole.flip(0)[:, :1], rtol=1e-9, atol=1e-9)


def test_another_attention_gets_the_context():
    seen = {}

    def attend(q, k, v, gate, **options):
        seen.update(options, shapes=[tuple(t.shape) for t in (q, k, v, gate)])
        return flashgau.gau_attention(q, k, v, gate, **options)

    layer, (x, context) = cross(), given(3, 5)
    wanted = layer(x, context=context)
    layer.attention_fn = attend
    torch.testing.assert_close(layer(x, context=context), wanted)
    assert seen["shapes"] == [(2, 3, S), (2, 5, S), (2, 5, 2 * DIM), (2, 3, 2 * DIM)]
    assert not seen["causal"]
    assert seen["rel_bias"] is None


X, CONTEXT = (t.detach() for t in given(3, 5))
STATE = cross()(X, context=CONTEXT, return_state=True)[1]
REFUSED = {
    "causal": (lambda: cross(causal=True)(X, context=CONTEXT), r"made with `causal=True`; expected False"),
    "token-shift": (lambda: cross(token_shift=True)(X, context=CONTEXT), r"`token_shift=True`; expected False"),
    "bias": (lambda: cross(bias="t5")(X, context=CONTEXT), r"with positions, .* expected bias=\"none\""),
    "rotary": (lambda: cross(rotary_dim=4)(X, context=CONTEXT), r"with positions, .* expected rotary_dim=0"),
    "packed": (
        lambda: cross()(X[:1], context=CONTEXT[:1], cu_seqlens=torch.tensor([0, 3])),
        r"`cu_seqlens` and a context together",
    ),
    "both": (lambda: cross()(X, context=CONTEXT, state=STATE), r"`context` and `state` together"),
    "lengths-of-state": (
        lambda: cross()(X, context_lengths=torch.tensor([1, 2]), state=STATE),
        r"`context_lengths` and `state` together",
    ),
    "no-context": (lambda: cross()(X, context_lengths=torch.tensor([1, 2])), r"`context_lengths` without a `context`"),
    "width": (lambda: cross()(X, context=CONTEXT[..., 1:]), r"`context` has shape \(2, 5, 11\); expected \(2, L, 12\)"),
    "rows": (lambda: cross()(X, context=CONTEXT[:1]), r"`context` has shape \(1, 5, 12\); expected \(2, L, 12\)"),
    "x": (lambda: cross()(X[0], context=CONTEXT), r"`x` has shape \(3, 12\); expected \(B, N, 12\)"),
    "too-long": (
        lambda: cross()(X, context=CONTEXT, context_lengths=torch.tensor([1, 6])),
        r"`context_lengths` holds 6; expected values from 0 to N = 5",
    ),
    "rows-of-state": (lambda: cross()(X[:1], state=STATE), r"GAU: 1 rows to append; the cache has 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused_by_name(case):
    call, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_the_reference_and_half_precision_agree():
    layer = cross().float()
    x, context = (t.detach().float() for t in given(4, 7))
    wanted = layer(x, context=context)
    with flashgau.use_backend("reference"):
        torch.testing.assert_close(layer(x, context=context), wanted, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x, context=context).float(), wanted, rtol=5e-2, atol=5e-2)
