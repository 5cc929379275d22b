"""Our operations in bf16, as compiled code: forward and gradients, held to fp64 by the rule of `compare`."""

from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from flashgau.kernels.attention import attention_with
from flashgau.kernels.gau import gau_with
from own_functions import sigmoid, sigmoid_slope
from strategies import randn

import flashgau
from flashgau import bias, nn, tables
from flashgau.integrations.flash_attn import flash_attn_with_kvcache
from flashgau.ops import dispatch
from flashgau.ops.rank_form import rank_form
from flashgau.ptx import executing, numbers
from flashgau.tables.config import Config

TARGETS = ["sm_80", "sm_90"]
BF16 = torch.bfloat16


def draw(*shapes, dtype=BF16):
    return [randn(i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]


def calls(dtype=BF16):
    heads, rows = [(1, 2, 70, 16)] * 3, [(1, 70, 16)] * 2
    return {
        "attention": (draw(*heads, dtype=dtype), {"causal": True, "window": (40, 0), "return_lse": True}),
        "glu": (draw((3, 1030), (3, 1030), dtype=dtype), {"activation": "gelu"}),
        "glu_linear": (draw((33, 24), (40, 24), (40, 24), dtype=dtype), {"activation": "silu"}),
        "gau_attention": (draw(*rows, (1, 70, 40), (1, 70, 40), dtype=dtype), {"causal": True}),
        "mixed_chunk_attention": (
            draw(*rows, *rows, (1, 70, 40), (1, 70, 40), dtype=dtype), {"causal": True, "chunk_size": 32},
        ),
    }  # fmt: skip


def small(kernel, x, width, rows=None, options=False):
    """Blocks that the rows cross, and that Hopper's products of 64 rows still take."""
    return Config(64, 64 if "gau" in kernel or "mixed" in kernel else 32, block_k=32)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", calls())
def test_operations_agree_with_fp64(op, target):
    tensors, options = calls()[op]
    with executing(target, seed=0) as executed, tables.configured(small):
        report = flashgau.compare(getattr(flashgau, op), *tensors, backend="triton", **options)
    assert report, str(report)
    assert len(executed.launches) >= 2
    if op not in ("glu", "glu_linear"):
        assert executed.counts.matrix_flops > 0


def test_wide_heads_that_begin_products_ahead_agree_with_fp64():
    """dV has a launch of its own. Of a group of heads, each begins with a product of zeros, and ends with one more."""
    ahead = Config(32, 64, 4, 3, asynchronous=True)
    tensors = draw((1, 2, 140, 16), (1, 1, 140, 16), (1, 1, 140, 136))
    with executing("sm_90", seed=0) as executed, tables.configured(lambda *_, **__: ahead):
        report = flashgau.compare(flashgau.attention, *tensors, backend="triton", causal=True, window=(90, 0))
    assert report, str(report)
    assert [launch.kernel for launch in executed.launches].count("dkv_kernel") == 2


def gradients(seed):
    """Of attention, in some order of warps and blocks."""
    tensors, options = calls()["attention"]
    leaves = [x.clone().requires_grad_() for x in tensors]
    with executing("sm_80", seed=seed), tables.configured(small):
        out, _ = flashgau.attention(*leaves, backend="triton", **options)
        return [out, *torch.autograd.grad(out.sum(), leaves)]


def test_results_are_the_same_in_any_order_of_warps_and_blocks(monkeypatch):
    monkeypatch.setattr(numbers, "_scattered", lambda x, seed: 0.0)  # whose approximate functions are the same
    assert all(torch.equal(a, b) for a, b in zip(gradients(1), gradients(2), strict=True))


@triton.jit
def tilted(b_s, o_query, o_key, i_head, aux):
    return b_s * tl.load(aux + o_key) + 0.01 * (o_query - o_key)


@triton.jit
def tilted_slope(b_s, o_query, o_key, i_head, aux):
    return tl.load(aux + o_key)


AUX = torch.linspace(0.5, 1.5, 70)
OWN = {"weight_mod": sigmoid, "weight_slope": sigmoid_slope, "score_mod": tilted, "score_slope": tilted_slope,
       "aux": AUX}  # fmt: skip


def naive(q, k, v, gate=1.0, *, scale):
    i, j = torch.arange(70)[:, None], torch.arange(70)[None, :]
    s = scale * q @ k.mT * AUX.to(q.dtype) + 0.01 * (i - j).to(q.dtype)
    return gate * (torch.sigmoid(s).tril() @ v)


@pytest.mark.parametrize("target", TARGETS)
def test_own_scores_agree_with_fp64(target):
    heads, gated = draw(*[(1, 2, 70, 16)] * 3), draw(*[(1, 70, 16)] * 2, (1, 70, 40), (1, 70, 40))
    for fn, tensors, scale in (
        (partial(attention_with, **OWN, causal=True), heads, 0.25),
        (partial(gau_with, **OWN, causal=True, normalizer=4.0), gated, 0.25),
    ):
        with executing(target), tables.configured(small):
            report = flashgau.compare(fn, *tensors, reference=partial(naive, scale=scale))
        assert report, str(report)


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_a_token_of_a_flash_layer(target):
    """In two launches between its products, at a position whose angles are many turns."""
    x, layers = draw((3, 14, 24))[0], {}
    for dtype in (BF16, torch.float32, torch.float64):
        layers[dtype] = nn.FLASH(24, hidden=70, key_dim=12, chunk_size=8, causal=True, dtype=dtype)
        for i, p in enumerate(layers[dtype].parameters()):
            p.copy_(randn(i, *p.shape) / 2)
    _, state = layers[BF16](x[:, :13], return_state=True)
    state.memory.position.add_(8 * 1000)

    def naive(x):
        with flashgau.use_backend("reference"):
            return layers[x.dtype].step(x, state.to(x.dtype))[0]

    layer, in_triton, in_layers = layers[BF16], flashgau.use_backend("triton"), dispatch.use_backend_in_layers("triton")
    with executing(target, seed=0) as executed, tables.configured(small), in_triton, in_layers:
        report = flashgau.compare(
            lambda x: layer.step(x, state.clone(), inplace=True)[0], x[:, 13:], reference=naive, grad=False
        )
    assert report, str(report)
    launched = [launch.kernel for launch in executed.launches]
    assert launched[:3] == ["norm_kernel", "token_kernel", "close_kernel"]  # then those of the plain formula


def paged(q, k, v, *, table, leftpad, lengths):
    """One token a row on a cache in pages (pages, tokens of a page, Hkv, .)."""
    return flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, cache_leftpad=leftpad, block_table=table, causal=True, return_softmax_lse=True
    )


def gathered(q, k, v, *, table, leftpad, lengths):
    begin = torch.zeros_like(lengths) if leftpad is None else leftpad
    k, v = (x[table].flatten(1, 2).transpose(1, 2).repeat_interleave(2, 1) for x in (k, v))
    place = torch.arange(k.shape[2])
    hidden = (place < begin[:, None]) | (place >= lengths[:, None])
    s = (q.transpose(1, 2) @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden[:, None, None], -torch.inf)
    return (torch.softmax(s, -1) @ v.nan_to_num()).transpose(1, 2), s.logsumexp(-1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("page", "leftpad"), [(32, None), (20, None), (20, (7, 0))], ids=["whole", "cut", "leftpad"])
def test_a_decoded_token_reads_pages_in_parts(page, leftpad, target):
    """Blocks of 32 keys in one page, or across several; the keys of a row are split over programs, and merged."""
    table = torch.tensor([[6, 0, 3, 8, 1, 5, 9], [2, 7, 4, 0, 0, 0, 0]])
    lengths = torch.tensor([6 * page + 3, 2 * page + 1])
    q, k, v = draw((2, 1, 4, 64), (10, page, 2, 64), (10, page, 2, 48))
    pads = None if leftpad is None else torch.tensor(leftpad)
    with executing(target, seed=0) as executed, tables.configured(small), flashgau.use_backend("triton"):
        report = flashgau.compare(
            partial(paged, table=table, leftpad=pads, lengths=lengths), q, k, v,
            reference=partial(gathered, table=table, leftpad=pads, lengths=lengths), names=("out", "lse"), grad=False,
        )  # fmt: skip
    assert report, str(report)
    assert [launch.kernel for launch in executed.launches] == ["forward_kernel", "merge_kernel"]
    assert executed.counts.matrix_flops > 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_a_rank_form_agrees_with_fp64(target, dtype):
    """A relative bias of 100 distances and 12 pairs of channels, and the gradients of both vectors."""
    turns = bias.rank_turns(randn(2, 24), 50)[:100]
    vectors = draw((24,), (24,), dtype=dtype)
    with executing(target, seed=0) as executed, dispatch.use_backend_in_layers("triton"):
        report = flashgau.compare(
            lambda a, b: rank_form(a, b, turns),
            *vectors,
            reference=lambda a, b: bias.rank_form(a, b, turns.double() if a.dtype == torch.float64 else turns),
        )
    assert report, str(report)
    assert [x.kernel for x in executed.launches][-2:] == ["rank_form_backward_kernel", "rank_form_factors_kernel"]
