"""Layers: their formulas, and that every way of computing a sequence gives the same numbers."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashgau import nn
from flashgau.nn.gated_unit import last_shifted, shift_tokens
from flashgau.nn.norms import NORMS, make_norm
from flashgau.nn.rotary import packed_positions

DOUBLE = torch.float64
TIGHT = {"rtol": 1e-11, "atol": 1e-12}
DIM = 12


def stirred(layer: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The layer with parameters large enough that every part of it shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.4 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return layer


def gau(**options):
    return nn.GAU(DIM, key_dim=6, dtype=DOUBLE, **options)


def flash(**options):
    return nn.FLASH(DIM, **({"key_dim": 6, "chunk_size": 4, "dtype": DOUBLE} | options))


def mha(**options):
    return nn.MultiHeadAttention(DIM, 6, kv_heads=2, dtype=DOUBLE, **options)


def mixed(**options):
    return nn.MultiHeadMixedChunk(DIM, 6, kv_heads=3, chunk_size=4, dtype=DOUBLE, **options)


CAUSAL = {
    "gau-row": lambda: gau(causal=True, normalizer="row"),
    "gau-number-shift": lambda: gau(causal=True, normalizer=8.0, score="laplace", token_shift=True, bias="t5"),
    "gau-number-lucidrains": lambda: gau(causal=True, spec="lucidrains", normalizer=8.0),
    "gau-softmax": lambda: gau(causal=True, score="softmax", bias="toeplitz", max_length=40),
    "gau-alpha": lambda: gau(causal=True, spec="gau-alpha"),
    "flash": lambda: flash(causal=True),
    "flash-lucidrains": lambda: flash(causal=True, spec="lucidrains", token_shift=True),
    "flash-laplace": lambda: flash(causal=True, score="laplace", bias="rotary", norm="rmsnorm", post_norm="rms"),
    "mha": lambda: mha(causal=True),
    "mha-alibi": lambda: mha(causal=True, rotary_dim=0, bias="alibi", linear_bias=True),
    "mha-t5": lambda: mha(causal=True, bias="t5"),
    "mha-toeplitz": lambda: mha(causal=True, bias="toeplitz", max_length=40),
    "mixed": lambda: mixed(causal=True),
    "mixed-t5": lambda: mixed(causal=True, bias="t5", score="laplace", rotary_dim=0),
}
BOTH = CAUSAL | {
    "gau-keys": lambda: gau(),
    "gau-causal-keys": lambda: gau(causal=True),
    "gau-lucidrains": lambda: gau(spec="lucidrains", token_shift=True),
    "gau-alpha-both": lambda: gau(spec="gau-alpha"),
    "flash-both": lambda: flash(token_shift=True),
    "flash-lucidrains-both": lambda: flash(spec="lucidrains"),
    "mha-both": lambda: mha(bias="t5"),
    "mixed-both": lambda: mixed(),
}
CANNOT_PACK = {"gau-lucidrains"}
lengths_of_sequences = st.lists(st.integers(0, 11), min_size=1, max_size=4)


# --- small parts ---------------------------------------------------------------------------------------------------


def test_scale_norm_is_g_x_over_rms():
    x = torch.randn(3, 5, 8, dtype=DOUBLE)
    norm = stirred(nn.ScaleNorm(8, dtype=DOUBLE))
    torch.testing.assert_close(norm(x), norm.g * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt(), **TIGHT)
    clamped = nn.ScaleNorm(8, clamp=True, dtype=DOUBLE)
    torch.testing.assert_close(clamped(x).square().mean(-1), torch.ones(3, 5, dtype=DOUBLE), **TIGHT)
    torch.testing.assert_close(clamped(x * 1e-9), x * 1e-9 / 1e-5, **TIGHT)


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_a_zero_row_have_finite_values_and_gradients(name):
    x = torch.zeros(2, 8, requires_grad=True)
    y = make_norm(name, 8)(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


def test_scale_norm_of_half_precision_is_computed_in_fp32():
    x = (300 * torch.randn(4, 64)).half()  # its squares overflow fp16
    torch.testing.assert_close(nn.ScaleNorm(64)(x), nn.ScaleNorm(64)(x.float()).half())


def test_offset_scale():
    layer = stirred(nn.OffsetScale(6, 4, dtype=DOUBLE))
    z = torch.randn(2, 5, 6, dtype=DOUBLE)
    heads = layer(z)
    for h in range(4):
        torch.testing.assert_close(heads[:, h], z * layer.gamma[h] + layer.beta[h], **TIGHT)
    assert nn.OffsetScale(6, 2, bias=False).beta is None


@given(st.integers(1, 4), st.integers(0, 500), st.integers(0, 500), st.integers(0, 10**6), st.booleans(), st.booleans())
def test_rotary_scores_depend_on_the_distance_only(half, p, j, shift, interleaved, partial):
    rotary = nn.RotaryEmbedding(2 * half if partial else None, interleaved=interleaved)
    width = 2 * half + 2 * partial
    q, k = torch.randn(2, 1, 1, width, dtype=DOUBLE, generator=torch.Generator().manual_seed(p))
    score = lambda p, j: (rotary(q, p) * rotary(k, j)).sum()
    torch.testing.assert_close(score(p, j), score(p + shift, j + shift), rtol=1e-8, atol=1e-8)


@given(st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_rotary_keeps_lengths_and_leaves_the_rest(half, interleaved, rest):
    rotary = nn.RotaryEmbedding(2 * half, interleaved=interleaved)
    x = torch.randn(2, 3, 7, 2 * half + rest, dtype=DOUBLE)
    y = rotary(x, 5)
    torch.testing.assert_close(y.square().sum(-1), x.square().sum(-1), **TIGHT)
    assert torch.equal(y[..., 2 * half :], x[..., 2 * half :])
    torch.testing.assert_close(rotary(x)[:, :, 0], x[:, :, 0], **TIGHT)


def test_rotary_interleaved_is_a_permutation_of_half_split():
    x = torch.randn(2, 7, 8, dtype=DOUBLE)
    split_to_pairs = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    torch.testing.assert_close(
        nn.RotaryEmbedding()(x)[..., split_to_pairs],
        nn.RotaryEmbedding(interleaved=True)(x[..., split_to_pairs]),
        **TIGHT,
    )


def test_rotary_turns_the_first_pair_by_one_radian_per_token():
    y = nn.RotaryEmbedding()(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], dtype=DOUBLE))
    torch.testing.assert_close(y[0, 1], torch.tensor([math.cos(1), math.sin(1)], dtype=DOUBLE), **TIGHT)


def test_rotary_positions_in_every_form():
    rotary = nn.RotaryEmbedding()
    x = torch.randn(2, 3, 4, 6)
    start = torch.tensor([0, 7])
    alone = torch.stack([rotary(x[0], 0), rotary(x[1], 7)])
    torch.testing.assert_close(rotary(x, start), alone)
    torch.testing.assert_close(rotary(x, positions=start[:, None] + torch.arange(4)), alone)
    torch.testing.assert_close(rotary(x[:, 0], start), alone[:, 0])
    torch.testing.assert_close(rotary(x, positions=torch.arange(7, 11))[1], alone[1])
    assert rotary(x.bfloat16(), 10_000).dtype == torch.bfloat16
    torch.testing.assert_close(rotary(x.bfloat16(), 10_000), rotary(x.bfloat16().float(), 10_000).bfloat16())


@given(lengths_of_sequences)
def test_packed_positions_restart(lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    expected = [p for n in lengths for p in range(n)]
    assert packed_positions(sum(lengths), bounds).tolist() == expected


def test_rotary_bias_is_the_product_of_turned_vectors():
    bias = stirred(nn.RotaryBias(8, dtype=DOUBLE))
    rotary = nn.RotaryEmbedding()
    n = 6
    a, b = (rotary(t.expand(1, n, 8))[0] for t in (bias.a, bias.b))
    matrix = a @ b.T
    p, j = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    torch.testing.assert_close(bias(n)[n - 1 + j - p], matrix, rtol=1e-6, atol=1e-6)


def test_toeplitz_bias_is_centred():
    bias = nn.ToeplitzBias(5, heads=3)
    assert bias(5).shape == (3, 9)
    assert torch.equal(bias(2), bias.weight[:, 3:6])
    with pytest.raises(ValueError, match="`max_length` = 5"):
        bias(6)


def test_t5_bias_scales_and_has_heads():
    bias = nn.T5Bias(4, causal=True, scale=3.0)
    assert bias(6).shape == (4, 11)
    torch.testing.assert_close(bias(6)[:, 5], 3 * bias.weight[0])
    torch.testing.assert_close(bias(6)[:, 2], 3 * bias.weight[3])
    assert nn.T5Bias()(6).shape == (11,)


def test_shift_tokens_restarts_per_sequence():
    x = torch.arange(1.0, 9.0).reshape(1, 4, 2)
    shifted, moving = shift_tokens(x, None, torch.tensor([0, 1, 1, 4]))
    assert shifted[0, :, 0].tolist() == [0.0, 0.0, 3.0, 5.0]
    assert shifted[0, :, 1].tolist() == x[0, :, 1].tolist()
    assert last_shifted(moving, None).item() == 7.0
    assert last_shifted(moving, torch.tensor([2])).item() == 3.0
    assert last_shifted(moving, torch.tensor([0])).item() == 0.0


@pytest.mark.parametrize(
    ("variant", "function"),
    [
        ("glu", torch.sigmoid),
        ("bilinear", lambda g: g),
        ("reglu", F.relu),
        ("geglu", F.gelu),
        ("swiglu", F.silu),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_gated_feed_forward(variant, function, bias):
    layer = stirred(nn.GatedFeedForward(DIM, 20, variant, bias=bias, dtype=DOUBLE))
    x = torch.randn(2, 3, DIM, dtype=DOUBLE)
    expected = layer.to_out(function(layer.gate(x)) * layer.up(x))
    torch.testing.assert_close(layer(x), expected, **TIGHT)


def test_feed_forward_and_its_gated_form_have_equal_parameters():
    count = lambda layer: sum(p.numel() for p in layer.parameters())
    plain, gated = nn.FeedForward(768), nn.GatedFeedForward(768)
    assert gated.gate.out_features == 2048
    assert count(plain) == count(gated)
    assert nn.GatedFeedForward(100).gate.out_features == 272
    x = torch.randn(2, 768)
    torch.testing.assert_close(plain(x), F.gelu(x @ plain.to_hidden.weight.T) @ plain.to_out.weight.T)


# --- GAU and FLASH against their formulas --------------------------------------------------------------------------


def turned(x: Tensor) -> Tensor:
    n, s = x.shape[-2:]
    angle = torch.arange(n, dtype=DOUBLE)[:, None] * (1 / (10000 ** (torch.arange(0, s, 2).float() / s))).double()
    a, b = x[..., : s // 2], x[..., s // 2 :]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def test_gau_is_its_formula():
    layer, n = stirred(gau()), 7
    x = torch.randn(2, n, DIM, dtype=DOUBLE)
    normed = layer.norm.g * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    hidden = F.silu(normed @ layer.to_hidden.weight.T + layer.to_hidden.bias)
    u, v, z = hidden[..., : 2 * DIM], hidden[..., 2 * DIM : 4 * DIM], hidden[..., 4 * DIM :]
    q, k = (turned(z * layer.offset_scale.gamma[h] + layer.offset_scale.beta[h]) for h in range(2))
    place = torch.arange(n)
    bias = layer.rel_bias(n)[n - 1 + place[None] - place[:, None]]
    a = F.relu(q @ k.mT / n + bias).square()
    expected = x + (u * (a @ v)) @ layer.to_out.weight.T + layer.to_out.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


def test_flash_is_its_formula():
    layer, n, c = stirred(flash(causal=True)), 10, 4
    x = torch.randn(1, n, DIM, dtype=DOUBLE)
    normed = layer.norm.g * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    hidden = F.silu(normed @ layer.to_hidden.weight.T + layer.to_hidden.bias)[0]
    u, v, z = hidden[:, : 2 * DIM], hidden[:, 2 * DIM : 4 * DIM], hidden[:, 4 * DIM :]
    qq, qk, lq, lk = (turned(z * layer.offset_scale.gamma[h] + layer.offset_scale.beta[h]) for h in range(4))
    out = torch.zeros(n, 2 * DIM, dtype=DOUBLE)
    for i in range(n):
        closed = i - i % c
        for j in range(closed, i + 1):
            out[i] += F.relu(qq[i] @ qk[j] / c + layer.rel_bias.weight[c - 1 + j - i]).square() * v[j]
        for j in range(closed):
            out[i] += (lq[i] @ lk[j]) * v[j] / closed
    expected = x + (u * out) @ layer.to_out.weight.T + layer.to_out.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


def test_attention_is_its_formula():
    layer, n = stirred(mha(causal=True, rotary_dim=0, linear_bias=True)), 6
    x = torch.randn(2, n, DIM, dtype=DOUBLE)
    q, k, v = layer.to_qkv(x).split((DIM, 4, 4), dim=-1)
    heads = []
    for h in range(6):
        group = slice(h // 3 * 2, h // 3 * 2 + 2)
        scores = q[..., 2 * h : 2 * h + 2] @ k[..., group].mT / math.sqrt(2)
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[..., group])
    torch.testing.assert_close(layer(x), layer.to_out(torch.cat(heads, -1)), rtol=1e-9, atol=1e-9)


def test_post_norm_and_no_residual():
    x = torch.randn(2, 5, DIM, dtype=DOUBLE)
    layer = stirred(gau(spec="gau-alpha"))
    torch.testing.assert_close(layer(x).square().mean(-1), torch.ones(2, 5, dtype=DOUBLE))
    assert layer.to_hidden.bias is None
    assert layer.offset_scale.beta is None
    with_x, without = stirred(flash()), flash(residual=False)
    without.load_state_dict(with_x.state_dict())
    torch.testing.assert_close(with_x(x), x + without(x), **TIGHT)


@pytest.mark.parametrize("layer", [nn.GAU, nn.FLASH])
def test_parameter_count_and_initialisation(layer):
    dim, e, s = 256, 512, 64
    unit = layer(dim, key_dim=s)
    count = sum(p.numel() for p in unit.parameters())
    assert 3 * dim * e + dim * s <= count <= 1.02 * (3 * dim * e + dim * s)
    for name, p in unit.named_parameters():
        if name.endswith(("bias", "beta")):
            assert not p.any(), name
        elif name != "norm.g":
            # Four standard errors of a mean and of a standard deviation.
            assert abs(p.std() - 0.02) < 4 * 0.02 / math.sqrt(2 * p.numel()), name
            assert abs(p.mean()) < 4 * 0.02 / math.sqrt(p.numel()), name


@pytest.mark.parametrize("name", BOTH)
def test_state_dict_round_trip(name):
    source, target = stirred(BOTH[name]()), BOTH[name]()
    target.load_state_dict(source.state_dict())
    x = torch.randn(1, 9, DIM, dtype=DOUBLE)
    assert torch.equal(target(x), source(x))


# --- every way to compute a sequence -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
@given(lengths=lengths_of_sequences)
def test_padded_is_alone(name, lengths):
    layer = stirred(BOTH[name]())
    x = torch.randn(len(lengths), max(lengths), DIM, dtype=DOUBLE)
    y = layer(x, lengths=torch.tensor(lengths))
    for b, n in enumerate(lengths):
        torch.testing.assert_close(y[b, :n], layer(x[b : b + 1, :n])[0], **TIGHT)


@pytest.mark.parametrize("name", sorted(set(BOTH) - CANNOT_PACK))
@given(lengths=lengths_of_sequences)
def test_packed_is_alone(name, lengths):
    layer = stirred(BOTH[name]())
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    x = torch.randn(1, sum(lengths), DIM, dtype=DOUBLE)
    y = layer(x, cu_seqlens=bounds)
    for start, end in pairwise(bounds.tolist()):
        torch.testing.assert_close(y[:, start:end], layer(x[:, start:end]), **TIGHT)


@pytest.mark.parametrize("name", ["gau-keys", "flash", "flash-lucidrains", "mha-t5", "mixed"])
def test_gradients_of_padded_and_packed_are_those_of_alone(name):
    lengths = [5, 1, 9]
    x = torch.randn(3, 9, DIM, dtype=DOUBLE)
    weight = torch.randn(3, 9, DIM, dtype=DOUBLE)
    valid = torch.arange(9) < torch.tensor(lengths)[:, None]
    layer = stirred(BOTH[name]())
    parameters = list(layer.parameters())

    def gradients(loss):
        return torch.autograd.grad(loss, parameters)

    padded = gradients((layer(x, lengths=torch.tensor(lengths)) * weight)[valid].sum())
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = gradients((layer(x[valid][None], cu_seqlens=bounds) * weight[valid]).sum())
    alone = gradients(sum((layer(x[b : b + 1, :n]) * weight[b, :n]).sum() for b, n in enumerate(lengths)))
    for p, q, r in zip(padded, packed, alone, strict=True):
        torch.testing.assert_close(p, r, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(q, r, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CAUSAL)
@given(parts=st.lists(st.integers(1, 6), min_size=1, max_size=5))
@torch.no_grad()
def test_part_by_part_is_parallel(name, parts):
    layer = stirred(CAUSAL[name]())
    x = torch.randn(2, sum(parts), DIM, dtype=DOUBLE)
    pieces, state = [], None
    for part in x.split(parts, dim=1):
        y, state = layer(part, state=state, return_state=True)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), layer(x), **TIGHT)


@pytest.mark.parametrize("name", CAUSAL)
@given(prompts=st.lists(st.integers(1, 9), min_size=1, max_size=3))
@torch.no_grad()
def test_decoding_unequal_prompts_is_parallel(name, prompts):
    layer, new = stirred(CAUSAL[name]()), 6
    lengths = torch.tensor(prompts)
    longest, rows = max(prompts), torch.arange(len(prompts))
    x = torch.randn(len(prompts), longest + new, DIM, dtype=DOUBLE)
    parallel = layer(x)
    y, state = layer(x[:, :longest], lengths=lengths, return_state=True)
    for b, n in enumerate(prompts):
        torch.testing.assert_close(y[b, :n], parallel[b, :n], **TIGHT)
    for i in range(new):
        y, state = layer.step(x[rows, lengths + i][:, None], state)
        torch.testing.assert_close(y[:, 0], parallel[rows, lengths + i], **TIGHT)


@torch.no_grad()
def test_flash_state_is_constant_in_size_and_can_be_reused():
    layer = stirred(flash(causal=True))
    x = torch.randn(1, 50, DIM, dtype=DOUBLE)
    sizes = set()
    for n in (1, 7, 50):
        _, state = layer(x[:, :n], return_state=True)
        memory = state.memory
        sizes.add(sum(t.numel() for t in (memory.kv, memory.quad_k, memory.lin_k, memory.v)))
    assert len(sizes) == 1
    first, _ = layer.step(x[:, :1], state)
    again, _ = layer.step(x[:, :1], state)
    assert torch.equal(first, again)


def test_a_cache_is_converted_and_refused_by_name():
    k, v = torch.randn(2, 1, 2, 3, 4), torch.randn(2, 1, 2, 1, 4)
    for kept in (torch.float16, torch.float32, torch.float64):
        for lengths in (None, torch.tensor([2], dtype=torch.uint8)):
            cache = nn.KeyValueCache(k[0], k[1], lengths)
            moved = cache.to(kept)
            assert moved.keys.dtype == kept
            moved.append(v[0], v[1])
            cache.append(v[0], v[1])
            assert moved.keys.dtype == moved.values.dtype == torch.float32
            torch.testing.assert_close(moved.keys, cache.keys, rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(moved.values, cache.values, rtol=2e-3, atol=2e-3)
            assert moved.start == cache.start
    assert cache.to("meta").keys.device.type == "meta"
    longest, before = cache.longest, cache.keys.clone()
    for a, b, message in (
        (v[0].to("meta"), v[1].to("meta"), "the cache's `keys` are on cpu; expected meta"),
        (v[0][:, :1], v[1], r"`k` has shape \(1, 1, 1, 4\)"),
        (v[0], v[1][..., :3], r"`v` has shape \(1, 2, 1, 3\)"),
        (v[0].int(), v[1], "dtype torch.int32; expected .* in a floating type"),
    ):
        with pytest.raises(ValueError, match=f"KeyValueCache: .*{message}"):
            cache.append(a, b)
    assert cache.longest == longest
    assert torch.equal(cache.keys, before)
    for lengths, error in ((torch.tensor([9]), ValueError), (torch.tensor([1.0]), TypeError)):
        with pytest.raises(error, match="KeyValueCache: `lengths`"):
            nn.KeyValueCache(k[0], k[1], lengths)


@pytest.mark.parametrize("name", ["flash-lucidrains", "gau-row", "mha", "mixed"])
def test_a_step_takes_one_token_and_a_state_of_its_own_kind(name):
    layer = CAUSAL[name]()
    x = torch.zeros(1, 3, DIM, dtype=DOUBLE)
    _, state = layer(x, return_state=True)
    for n in (0, 2):
        with pytest.raises(ValueError, match=rf"step: `x` has shape \(1, {n}, 12\); expected \(B, 1, d\): one token"):
            layer.step(x[:, :n], state)
    with pytest.raises(TypeError, match="`state` is a list; expected a"):
        layer.step(x[:, :1], [state])
    with pytest.raises(ValueError, match="meta"):
        layer.step(x[:, :1], state.to("meta"))
    y, after = layer.step(x[:, :1], state)
    assert y.shape == (1, 1, DIM)
    assert type(after) is type(state)


def test_cache_grows_by_doubling():
    cache = nn.KeyValueCache(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 3))
    buffers = set()
    for i in range(1, 100):
        cache.append(torch.full((1, 1, 1, 2), float(i)), torch.full((1, 1, 1, 3), float(i)))
        buffers.add(cache.keys.data_ptr())
    assert cache.keys[0, 0, :, 0].tolist() == list(range(100))
    assert cache.values.shape == (1, 1, 100, 3)
    assert len(buffers) <= 8
    twin = cache.copy()
    twin.append(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 3))
    assert (cache.longest, twin.longest) == (100, 101)


# --- dtypes, training, errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.GAU(32, key_dim=16),
        lambda: nn.FLASH(32, key_dim=16, chunk_size=8, causal=True),
        lambda: nn.FLASH(32, key_dim=16, chunk_size=8, spec="lucidrains", token_shift=True),
        lambda: nn.MultiHeadAttention(32, 4, causal=True, bias="t5"),
        lambda: nn.MultiHeadMixedChunk(32, 4, chunk_size=8, causal=True),
        lambda: nn.GatedFeedForward(32),
    ],
)
def test_autocast_bf16(make):
    layer = stirred(make()).float()
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(0.5)
    x = torch.randn(2, 20, 32)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert (y - exact).norm() < 0.05 * exact.norm()
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [lambda: gau(qk_dropout=0.5), lambda: mha(dropout=0.5)])
def test_dropout_while_training_only(make):
    layer = stirred(make())
    x = torch.randn(1, 9, DIM, dtype=DOUBLE)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("batch_and_length", [(0, 5), (2, 0)])
@pytest.mark.parametrize("name", BOTH)
def test_empty_input(name, batch_and_length):
    x = torch.randn(*batch_and_length, DIM, dtype=DOUBLE, requires_grad=True)
    y = BOTH[name]()(x)
    assert y.shape == x.shape
    y.sum().backward()


x3 = torch.zeros(1, 3, DIM, dtype=DOUBLE)
ERRORS = {
    "spec": (lambda: gau(spec="other"), "GAU: `spec` is 'other'; expected one of 'paper', 'lucidrains', 'gau-alpha'"),
    "spec-flash": (lambda: flash(spec="gau-alpha"), "FLASH: `spec`"),
    "norm": (lambda: gau(norm="batch"), "norm: 'batch' is not one of layernorm"),
    "bias": (lambda: gau(bias="alibi"), "bias: 'alibi' is not possible here; one head takes"),
    "bias-heads": (lambda: mha(bias="rotary"), "several heads take"),
    "table": (lambda: gau(bias="toeplitz"), "needs `max_length`"),
    "order": (lambda: flash(head_order=("quad_q", "quad_k")), "`head_order`"),
    "odd": (lambda: nn.GAU(8, key_dim=5), "`dim` is 5; expected an even number"),
    "over-n": (lambda: gau(spec="lucidrains", normalizer="row"), "`bias_over_n`"),
    "over-n-packed": (lambda: gau(spec="lucidrains")(x3, cu_seqlens=torch.tensor([0, 3])), "`bias_over_n` with packed"),
    "heads": (lambda: nn.MultiHeadAttention(12, 5), "multiple of `heads` = 5"),
    "kv-heads": (lambda: nn.MultiHeadAttention(12, 6, kv_heads=4), "multiple of `kv_heads` = 4"),
    "mixed-heads": (lambda: nn.MultiHeadMixedChunk(12, 5), "multiple of `heads` = 5"),
    "mixed-kv-heads": (lambda: nn.MultiHeadMixedChunk(12, 6, kv_heads=4), "multiple of `kv_heads` = 4"),
    "variant": (lambda: nn.GatedFeedForward(8, variant="gelu"), "expected one of glu, bilinear, reglu"),
    "activation": (lambda: nn.FeedForward(8, activation="swiglu"), "expected one of identity"),
    "width": (lambda: flash()(x3[..., :5]), r"FLASH: `x` has shape \(1, 3, 5\); expected \(B, N, 12\)"),
    "axes": (lambda: mha()(x3[0]), r"expected \(B, N, 12\)"),
    "mixed-axes": (lambda: mixed()(x3[0]), r"expected \(B, N, 12\)"),
    "not-causal": (lambda: flash()(x3, return_state=True), "only a causal layer"),
    "not-causal-mha": (lambda: mha()(x3, return_state=True), "only a causal layer"),
    "not-causal-mixed": (lambda: mixed()(x3, return_state=True), "only a causal layer"),
    "keys": (lambda: gau(causal=True)(x3, return_state=True), 'normalizer "keys" divides by the full length'),
    "packed-state": (
        lambda: flash(causal=True)(x3, cu_seqlens=torch.tensor([0, 3]), return_state=True),
        "`cu_seqlens` and a state",
    ),
    "packed-cache": (
        lambda: mha(causal=True)(x3, cu_seqlens=torch.tensor([0, 3]), return_state=True),
        "`cu_seqlens` and a cache",
    ),
    "packed-mixed": (
        lambda: mixed(causal=True)(x3, cu_seqlens=torch.tensor([0, 3]), return_state=True),
        "`cu_seqlens` and a state",
    ),
    "lengths-cache": (
        lambda: mha(causal=True)(x3, lengths=torch.tensor([1]), state=mha(causal=True)(x3, return_state=True)[1]),
        "`lengths` and `state` together",
    ),
    "cache-batch": (
        lambda: mha(causal=True).step(x3[:, :1], mha(causal=True)(x3.expand(2, 3, DIM), return_state=True)[1]),
        "1 rows to append; the cache has 2",
    ),
    "rotary-width": (lambda: nn.RotaryEmbedding(8)(torch.zeros(1, 1, 6)), "at least 8"),
    "rotary-odd": (lambda: nn.RotaryEmbedding(3), "even number of channels"),
    "rotary-bias": (lambda: nn.RotaryBias(3), "`dim` is 3"),
    "sinusoidal": (lambda: nn.ScaledSinusoidal(3), "`dim` is 3"),
    "scale-norm": (lambda: nn.ScaleNorm(4)(torch.zeros(2, 5)), r"\(2, 5\); expected \(..., 4\)"),
    "toeplitz": (lambda: nn.ToeplitzBias(0), "`max_length` is 0"),
    "dim": (lambda: nn.GAU(0), "GAU: `dim` is 0; expected an int, at least 1"),
    "chunk": (lambda: flash(chunk_size=0), "FLASH: `chunk_size` is 0"),
    "score": (lambda: flash(score="softmax"), "FLASH: `score` is 'softmax'; expected one of 'relu2', 'laplace'"),
    "score-gau": (lambda: gau(score="relu"), "GAU: `score` is 'relu'"),
    "normalizer": (lambda: gau(normalizer="columns"), "GAU: `normalizer` is 'columns'; expected 'keys', 'row' or"),
    "normalizer-softmax": (lambda: gau(score="softmax", normalizer=3.0), "a softmax has its own"),
    "score-mixed": (lambda: mixed(score="softmax"), "MultiHeadMixedChunk: `score` is 'softmax'"),
    "packed-rows-mixed": (
        lambda: mixed()(x3.expand(2, 3, DIM), cu_seqlens=torch.tensor([0, 3])),
        "MultiHeadMixedChunk: `x` has B = 2 rows; expected B = 1 with `cu_seqlens`",
    ),
    "dropout": (lambda: mha(dropout=1.5), r"MultiHeadAttention: `dropout` is 1.5; expected a probability in \[0, 1\]"),
    "qk-dropout": (lambda: gau(qk_dropout=-1.0), "GAU: `qk_dropout` is -1.0"),
}
TYPE_ERRORS = {
    "flag": (lambda: gau(token_shift="no"), "GAU: `token_shift` is 'no'; expected True or False"),
    "flag-mha": (lambda: mha(causal=1), "MultiHeadAttention: `causal` is 1; expected True or False"),
    "width": (lambda: mixed(head_dim=2.0), "MultiHeadMixedChunk: `head_dim` is 2.0; expected an int, at least 1"),
    "rotary": (lambda: flash(rotary_dim=True), "FLASH: `rotary_dim` is True; expected an int, at least 0"),
}


@pytest.mark.parametrize("name", TYPE_ERRORS)
def test_types_of_options_are_checked(name):
    call, message = TYPE_ERRORS[name]
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("gate", "width"), [("elementwise", 4), ("headwise", 1)])
def test_attention_may_be_gated(gate, width):
    """act(x W_g) multiplies each head's output before the last projection, also token by token."""
    torch.manual_seed(0)
    layer = nn.MultiHeadAttention(12, 3, causal=True, gate=gate, gate_activation="silu", dtype=torch.float64)
    plain = nn.MultiHeadAttention(12, 3, causal=True, dtype=torch.float64)
    plain.load_state_dict({name: x for name, x in layer.state_dict().items() if not name.startswith("to_gate")})
    plain.to_out = layer.to_out = torch.nn.Identity()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    gates = F.silu(layer.to_gate(x)).view(2, 9, 3, width).expand(2, 9, 3, 4)
    torch.testing.assert_close(layer(x), plain(x) * gates.flatten(2), rtol=1e-12, atol=1e-12)
    _, cache = layer(x[:, :8], return_state=True)
    torch.testing.assert_close(layer.step(x[:, 8:], cache)[0], layer(x)[:, 8:], rtol=1e-10, atol=1e-12)


def test_an_unknown_gate_is_refused():
    with pytest.raises(ValueError, match="MultiHeadAttention: `gate` is 'yes'; expected one of 'none', 'elementwise'"):
        nn.MultiHeadAttention(12, 3, gate="yes")
