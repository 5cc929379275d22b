"""flash-attn's functions: what they refuse, in whose name, and what they cast."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from flash_attn_formula import draw
from torch import Tensor

import flashgau
from flashgau.integrations import flash_attn as fa

Q, C = draw(2, 3, 4, 8), draw(2, 6, 2, 8)
CU = torch.tensor([0, 2, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fa.flash_attn_func(Q, C, C[:, :5]), ValueError, "`v` has shape"),
        (lambda: fa.flash_attn_func(Q[:, :, :3], C, C), ValueError, "`q` has 3 heads"),
        (lambda: fa.flash_attn_func(Q, C, C, window_size=3), TypeError, "`window_size` is 3"),
        (lambda: fa.flash_attn_func(Q, C, C, window_size=(-2, 0)), ValueError, r"`window_size\[0\]` is -2"),
        (lambda: fa.flash_attn_func(Q, C, C, alibi_slopes=torch.ones(3)), ValueError, "`alibi_slopes` has shape"),
        (lambda: fa.flash_attn_func(Q, C, C, dropout_p=2), ValueError, "dropout_p"),
        (lambda: fa.flash_attn_qkvpacked_func(Q), ValueError, "`qkv` has shape"),
        (lambda: fa.flash_attn_kvpacked_func(Q, None), TypeError, "`kv` is a NoneType"),
        (lambda: fa.flash_attn_varlen_func(Q[0], C[0], C[0], CU, CU, 2, 2), ValueError, "cu_seqlens_k"),
        (lambda: fa.flash_attn_varlen_func(Q[0], Q[0], Q[0], CU, CU, 1, 2), ValueError, "`max_seqlen_q` is 1"),
        (lambda: fa.flash_attn_varlen_func(Q[0], Q[0], Q[0], CU.float(), CU, 2, 2), TypeError, "cu_seqlens_q"),
        (
            lambda: fa.flash_attn_varlen_func(Q[0], C, C, CU, CU, 2, 2, block_table=CU.view(1, 3)),
            ValueError,
            "`block_table` has shape",
        ),
        (lambda: fa.flash_attn_with_kvcache(Q, C[:1], C[:1]), ValueError, "`k_cache` has 1 rows"),
        (lambda: fa.flash_attn_with_kvcache(Q, C, C, C), ValueError, "`v` is missing"),
        (lambda: fa.flash_attn_with_kvcache(Q, C, C, C[:, :1], C[:, :1]), ValueError, "`cache_seqlens` is missing"),
        (lambda: fa.flash_attn_with_kvcache(Q, C, C, C[:, :1], C[:, :1], cache_seqlens=6), ValueError, "at most 5"),
        (
            lambda: fa.flash_attn_with_kvcache(Q, C, C, C[:, :1], C[:, :1], cache_seqlens=torch.tensor([5, 6])),
            ValueError,
            "from 0 to 5",
        ),
        (
            lambda: fa.flash_attn_with_kvcache(Q, C, C, cache_batch_idx=torch.tensor([0, 2])),
            ValueError,
            "`cache_batch_idx` is",
        ),
        (
            lambda: fa.flash_attn_with_kvcache(Q, C, C, cache_seqlens=2, cache_leftpad=torch.tensor([0, 3])),
            ValueError,
            "`cache_leftpad` is",
        ),
        (lambda: fa.flash_attn_with_kvcache(Q, C, C, rotary_cos=draw(9, 4)), ValueError, "`rotary_sin` is missing"),
        (
            lambda: fa.flash_attn_with_kvcache(Q, C, C, C[:, :1], C[:, :1], draw(7, 4), draw(7, 4), 5),
            ValueError,
            "at least 8 positions",
        ),
        (
            lambda: fa.flash_attn_with_kvcache(Q, C, C, block_table=torch.tensor([[0], [2]])),
            ValueError,
            "`block_table` is",
        ),
    ],
)  # fmt: skip
def test_bad_calls_are_refused_by_name(call: Any, error: type[Exception], words: str) -> None:
    before = C.clone()
    with pytest.raises(error, match=words):
        call()
    assert torch.equal(C, before)


# Every function with arguments that are right.

HELD, NEW, TABLES = torch.tensor([2, 5]), draw(2, 1, 2, 8, seed=5), (draw(9, 4).cos(), draw(9, 4).sin())
PAGES = torch.tensor([[0, 1, 2], [3, 4, 5]])


def right() -> dict[str, dict[str, Any]]:
    q, kv = draw(3, 4, 8), draw(3, 2, 2, 8)
    k, v = kv.unbind(1)
    packed = {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 2, "max_seqlen_k": 2}
    batch = {"alibi_slopes": torch.rand(4).double(), "window_size": (1, 0), "softcap": 2.0, "softmax_scale": 0.5}
    cache = {
        "k_cache": C.clone(), "v_cache": C.clone(), "k": NEW, "v": NEW, "cache_seqlens": HELD,
        "cache_leftpad": torch.tensor([0, 1]), "rotary_cos": TABLES[0], "rotary_sin": TABLES[1],
    }  # fmt: skip
    return {
        "flash_attn_func": {"q": Q, "k": C, "v": C, **batch, "dropout_p": 0.1, "deterministic": True},
        "flash_attn_kvpacked_func": {"q": Q, "kv": torch.stack((C, C), 2), **batch},
        "flash_attn_qkvpacked_func": {"qkv": torch.stack((Q, Q, Q), 2), **batch},
        "flash_attn_varlen_func": {"q": q, "k": k, "v": v, **packed, **batch},
        "flash_attn_varlen_kvpacked_func": {"q": q, "kv": kv, **packed, **batch},
        "flash_attn_varlen_qkvpacked_func": {
            "qkv": torch.stack((q, q, q), 1), "cu_seqlens": CU, "max_seqlen": 2, **batch,
        },
        "flash_attn_with_kvcache": {"q": Q[:, :2], **cache, "cache_batch_idx": torch.tensor([1, 0]), **batch},
    }  # fmt: skip


WRONG: tuple[Any, ...] = (
    "text", None, -3, 2.5, 10**9, (1,), (-2, 0), torch.tensor(7.0), torch.zeros(2, 2), torch.full((3,), 5),
    torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor([0, 9, 3], dtype=torch.int32), torch.tensor([-1, 3]),
)  # fmt: skip


def changed(x: Any) -> list[Any]:
    """The same argument, wrong in one thing."""
    if not isinstance(x, Tensor):
        return []
    return [x.to(torch.complex64), x[..., :-1], x[None], x.to("meta"), x.half() if x.is_floating_point() else x.float()]


def complaint(call: Any) -> str | None:
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", right())
def test_errors_name_the_function_that_was_called_and_its_own_arguments(name: str) -> None:
    """Whatever is wrong, the message has only words of the caller's signature, and the cache is as it was."""
    call = getattr(fa, name)
    own, refused = set(inspect.signature(call).parameters), set()
    call(**right()[name])
    for argument, value in right()[name].items():
        for wrong in (*WRONG, *changed(value)):
            arguments = {**right()[name], argument: wrong}
            caches = [x for x in (arguments.get("k_cache"), arguments.get("v_cache")) if isinstance(x, Tensor)]
            before = [x.clone() for x in caches]
            message = complaint(lambda arguments=arguments: call(**arguments))
            if message is None:  # another right value
                continue
            assert re.match(rf"{name}: `\w", message), (argument, wrong, message)
            assert set(re.findall(r"`(\w+)", message)) <= own, (argument, wrong, message)
            refused.add(argument)
            for cache, untouched in zip(caches, before, strict=True):
                assert cache.is_meta or torch.equal(cache, untouched), (argument, wrong)
    assert refused == set(right()[name]), "some argument takes anything"


@pytest.mark.parametrize("name", right())
def test_a_backend_that_cannot_run_is_refused_in_the_name_of_the_function(name: str, monkeypatch: Any) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = right()[name]
    caches = [arguments[x].clone() for x in ("k_cache", "v_cache") if x in arguments]
    with pytest.raises(RuntimeError, match=rf'^{name}: use_backend\("triton"\) cannot'), flashgau.use_backend("triton"):
        getattr(fa, name)(**arguments)
    assert all(torch.equal(arguments[x], y) for x, y in zip(("k_cache", "v_cache"), caches, strict=False))


def test_a_cache_that_cannot_be_written_is_refused_before_the_other_is() -> None:
    arguments = {**right()["flash_attn_with_kvcache"], "v_cache": C[:1].expand(2, -1, -1, -1)}
    with pytest.raises(ValueError, match="`v_cache` has strides"):
        fa.flash_attn_with_kvcache(**arguments)
    with torch.inference_mode():
        arguments["v_cache"] = C.clone()
    with pytest.raises(ValueError, match="`v_cache` was made in inference mode"):
        fa.flash_attn_with_kvcache(**arguments)
    assert torch.equal(arguments["k_cache"], C)
    arguments = right()["flash_attn_with_kvcache"]
    del arguments["cache_batch_idx"], arguments["cache_leftpad"]
    arguments |= {x: arguments[x].view(6, 2, 2, 8) for x in ("k_cache", "v_cache")}
    with pytest.raises(ValueError, match=r"`block_table` is \[\[0, 1, 2\], \[3, 4, 6\]\]"):
        fa.flash_attn_with_kvcache(**arguments, block_table=PAGES + (PAGES == 5))
    assert torch.equal(arguments["k_cache"], C.view(6, 2, 2, 8))


@pytest.mark.parametrize("name", right())
def test_mixed_dtypes_under_autocast_are_cast_as_attention_casts_them(name: str) -> None:
    """The first tensor in fp32, the others in bf16, or the reverse: as all in bf16."""
    low = {x: y.bfloat16() if isinstance(y, Tensor) and y.is_floating_point() else y for x, y in right()[name].items()}
    low |= {x: low[x].float() for x in ("alibi_slopes", "rotary_cos", "rotary_sin") if x in low}
    low |= {"dropout_p": 0.0} if "dropout_p" in low else {}
    wanted = getattr(fa, name)(**{x: y.clone() if x.endswith("cache") else y for x, y in low.items()})
    tensors = [x for x in ("q", "k", "v", "kv", "qkv", "k_cache", "v_cache") if x in low]
    for wide in (tensors[:1], tensors[1:2], tensors[2:]):
        mixed = {x: y.clone() if x.endswith("cache") else y for x, y in low.items()}
        mixed |= {x: mixed[x].float() for x in wide}
        dtypes = {x: mixed[x].dtype for x in tensors}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = getattr(fa, name)(**mixed)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)
        assert {x: mixed[x].dtype for x in tensors} == dtypes
    if len(tensors) > 1:
        with pytest.raises(TypeError, match="has dtype"):
            getattr(fa, name)(**{**low, tensors[-1]: low[tensors[-1]].float()})


X, T = draw(2, 3, 4), draw(9, 1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fa.index_first_axis([1], CU), TypeError, "index_first_axis: `input` is a list"),
        (lambda: fa.index_first_axis(X, CU.float()), TypeError, "index_first_axis: `indices` has dtype"),
        (lambda: fa.index_first_axis(X, CU), ValueError, r"`indices` is \[0, 2, 3\]; expected rows of `input`, 0 to 1"),
        (lambda: fa.index_first_axis(X, CU[None]), ValueError, "`indices` has shape"),
        (lambda: fa.unpad_input(X[0, 0], X), ValueError, r"unpad_input: `hidden_states` has shape \(4,\)"),
        (lambda: fa.unpad_input(X, X[..., 0]), TypeError, "`attention_mask` has dtype torch.float64"),
        (lambda: fa.unpad_input(X, X[..., 1] > 0, CU), ValueError, r"`unused_mask` has shape \(3,\)"),
        (lambda: fa.unpad_input(X, None), TypeError, "`attention_mask` is a NoneType"),
        (lambda: fa.pad_input(X, CU, 2, 3), ValueError, "pad_input: `indices` has shape"),
        (lambda: fa.pad_input(X, CU[:2] + 5, 2, 3), ValueError, r"`indices` is \[5, 7\]; expected .* 0 to 5"),
        (lambda: fa.pad_input(X, CU[:2], 2.0, 3), TypeError, "`batch` is 2.0"),
        (lambda: fa.pad_input(X, CU[:2], 2, -3), ValueError, "`seqlen` is -3"),
        (lambda: fa.apply_rotary_emb(X, T, T), ValueError, r"apply_rotary_emb: `x` has shape \(2, 3, 4\)"),
        (lambda: fa.apply_rotary_emb(X[None], T, T[:5]), ValueError, "`sin` has shape"),
        (lambda: fa.apply_rotary_emb(X[None], T, T.half()), TypeError, "`sin` has dtype"),
        (lambda: fa.apply_rotary_emb(X[None], T.expand(9, 3), T.expand(9, 3)), ValueError, "`cos` has shape"),
        (lambda: fa.apply_rotary_emb(X[None], T, T, False, False, 8), ValueError, "at least 10 positions"),
        (lambda: fa.apply_rotary_emb(X[None], T, T, seqlen_offsets=CU[1:]), ValueError, "`seqlen_offsets` has shape"),
        (lambda: fa.apply_rotary_emb(X[None], T, T, seqlen_offsets=-CU[1:2]), ValueError, r"`seqlen_offsets` is"),
        (lambda: fa.apply_rotary_emb(X, T, T, cu_seqlens=CU), ValueError, r"`cu_seqlens` is \[0, 2, 3\]"),
        (lambda: fa.apply_rotary_emb(X[None], T, T, 1), TypeError, "`interleaved` is 1"),
    ],
)  # fmt: skip
def test_bad_calls_beside_attention_are_refused_by_name(call: Any, error: type[Exception], words: str) -> None:
    before = X.clone()
    with pytest.raises(error, match=words):
        call()
    assert torch.equal(X, before)
