"""The PyTorch operators under the operations: schemas, shape functions, tracing, autocast."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from backends import backends_of
from checks import close, gradients, outputs, weighted
from hypothesis import given
from hypothesis import strategies as st
from strategies import Call, attention_calls, gau_calls, glu_calls, glu_linear_calls, mixed_chunk_calls, randn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import flashgau
from flashgau import nn
from flashgau.integrations.flash_attn import flash_attn_with_kvcache
from flashgau.ops import dispatch

T = torch.tensor
NOT_DIFFERENTIABLE = ("flashgau::mixed_chunk_step", "flashgau::flash_unit_token", "flashgau::attention_in_pages")


def heads(n: int = 9, dtype: torch.dtype = torch.float32, batch: int = 2) -> list[Tensor]:
    return [randn(i, batch, n, w, dtype=dtype) for i, w in enumerate((4, 4, 4, 4, 6, 6))]


def state() -> flashgau.MixedChunkState:
    kv, quad_k, lin_k, v = (randn(i, 2, *s) for i, s in enumerate(((4, 6), (4, 4), (4, 4), (4, 6))))
    return flashgau.MixedChunkState(kv, quad_k, lin_k, v, T([4, 8]))


def attention(*shape: int, **options: Any) -> Call:
    return Call("attention", tuple(randn(i, *shape) for i in range(3)), options)


CALLS = {
    "attention": attention(2, 2, 9, 4),
    "attention, causal": attention(2, 2, 9, 4, causal=True, return_lse=True),
    "attention, all": attention(
        2, 2, 9, 4, softcap=2.0, window=(3, 1), rel_bias=randn(3, 2, 17), sinks=randn(4, 2), lengths=T([9, 4]),
        dropout_p=0.2, dropout_seed=3, return_lse=True,
    ),
    "attention, packed": attention(1, 2, 9, 4, causal=True, cu_seqlens=T([0, 4, 9]), cu_seqlens_k=T([0, 2, 9])),
    "attention, gated": attention(2, 2, 9, 4, causal=True, gate=randn(3, 2, 2, 9, 4), return_lse=True),
    "glu": Call("glu", (randn(0, 3, 4), randn(1, 3, 4)), {}),
    "glu, packed": Call("glu", (randn(0, 3, 4),), {"activation": "gelu"}),
    "glu_linear": Call("glu_linear", (randn(0, 2, 3, 4), randn(1, 5, 4), randn(2, 5, 4)), {}),
    "glu_linear, biases": Call(
        "glu_linear", (randn(0, 3, 4), randn(1, 5, 4), randn(2, 5, 4), randn(3, 5), randn(4, 5)), {}
    ),
    "gau": Call("gau_attention", (*heads()[:2], *heads()[4:]), {"causal": True}),
    "gau, softmax": Call("gau_attention", (*heads()[:2], heads()[4]), {"score": "softmax", "lengths": T([9, 4])}),
    "gau, bias": Call("gau_attention", (*heads()[:2], *heads()[4:]), {"rel_bias": randn(3, 17)}),
    "mixed_chunk": Call("mixed_chunk_attention", tuple(heads()), {"chunk_size": 4}),
    "mixed_chunk, causal": Call(
        "mixed_chunk_attention", tuple(heads()[:5]), {"chunk_size": 4, "causal": True, "rel_bias": randn(3, 7)}
    ),
    "mixed_chunk, states": Call(
        "mixed_chunk_attention", tuple(heads()),
        {"chunk_size": 4, "causal": True, "initial_state": state(), "return_state": True},
    ),
}  # fmt: skip


def layers(form: str) -> None:
    """Run layers forward and backward: they use operators that no public operation does."""
    torch.manual_seed(0)
    for layer in (nn.GAU(8, key_dim=4), nn.FLASH(8, key_dim=4, chunk_size=4)):
        x = randn(0, 2, 9, 8).requires_grad_(form == "training")
        out = layer(x)
        if form == "training":
            out.sum().backward()
    with dispatch.use_backend_in_layers("triton"):  # elsewhere these are PyTorch's
        norm, x = nn.ScaleNorm(8), randn(0, 2, 9, 8).requires_grad_(form == "training")
        for out in (norm(x), nn.RotaryBias(8)(5)):
            if form == "training":
                out.sum().backward()
    with torch.no_grad(), flashgau.use_backend("triton"):
        flashgau.mixed_chunk_step(*heads(1), state=state())  # where gradients are wanted it is a call of one token
        with dispatch.use_backend_in_layers("triton"):
            nn.FLASH(8, hidden=6, key_dim=4, chunk_size=4, causal=True).step(
                randn(0, 2, 1, 8), nn.UnitState(state()), inplace=True
            )
        pool, table = randn(0, 3, 2, 1, 4), T([[2, 0], [1, 1]])
        flash_attn_with_kvcache(randn(1, 2, 1, 1, 4), pool, pool, cache_seqlens=T([3, 1]), block_table=table)


def recorded(function: Callable[[], Any]) -> dict[str, tuple[Any, tuple]]:
    """The first call of each flashgau operator inside `function`, by the operator's name."""
    found: dict[str, tuple[Any, tuple]] = {}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "flashgau":
                found.setdefault(func.name(), (func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        function()
    return found


def samples() -> list[tuple[str, str]]:
    return [(name, kind) for name in (*CALLS, "layers") for kind in ("forward", "backward")]


def calls_of(name: str) -> dict[str, tuple[Any, tuple]]:
    return recorded((lambda: layers("training")) if name == "layers" else lambda: second_gradients(CALLS[name]))


def second_gradients(call: Call) -> None:
    """The gradients of a function of the gradients."""
    call = call.leaves()
    leaves = [x for x in call.tensors() if x.requires_grad]
    grads = torch.autograd.grad(weighted(outputs(call())), leaves, create_graph=True, materialize_grads=True)
    weighted(list(grads)).backward()


def registered() -> set[str]:
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("flashgau::")}


def test_every_operator_is_tried():
    tried = set()
    for name in (*CALLS, "layers"):
        tried |= set(calls_of(name))
    assert tried == registered()


@pytest.mark.parametrize("name", [*CALLS, "layers"])
def test_operators_are_well_formed(name):
    """Schema true (nothing written, no result shares memory with an operand), autograd and shape function in order."""
    for operator, args in calls_of(name).values():
        detached = tree_map_only(Tensor, Tensor.detach, args)
        differentiable = (
            not operator.name().endswith(("backward", "second")) and operator.name() not in NOT_DIFFERENTIABLE
        )
        if differentiable:
            tree_map_only(Tensor, lambda x: x.requires_grad_(x.is_floating_point()), detached)
        # The others' own derivative is an error on purpose, and needs no tracing.
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator, detached, test_utils=tests)
        if differentiable:
            torch.library.opcheck(operator, detached, test_utils=("test_aot_dispatch_static",))


def check_fakes(function: Callable[[], Any]) -> None:
    """Shapes, strides and dtypes of the fakes are those of the real results."""
    for operator, args in recorded(function).values():
        real = outputs(operator(*args))
        with FakeTensorMode() as mode, torch.no_grad():
            fake = outputs(operator(*tree_map_only(Tensor, mode.from_tensor, args)))
        assert len(real) == len(fake)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), operator.name()
            if a.numel():
                strides = [(x, y) for s, x, y in zip(a.shape, a.stride(), b.stride(), strict=True) if s > 1]
                assert all(x == y for x, y in strides), f"{operator.name()}: {a.stride()} against {b.stride()}"


def test_fakes_are_like_the_real_of_a_transposed_gate():
    """Its gradient is contiguous, whatever its own strides."""
    check_fakes(lambda: gradients(attention(1, 2, 9, 4, gate=randn(3, 1, 9, 2, 4).transpose(1, 2))))


@pytest.mark.parametrize(
    "calls",
    [attention_calls, partial(attention_calls, plain=True), glu_calls, glu_linear_calls, gau_calls, mixed_chunk_calls],
    ids=["attention", "plain attention", "glu", "glu_linear", "gau", "mixed_chunk"],
)
@given(data=st.data())
def test_fakes_are_like_the_real(calls, data):
    call = data.draw(calls())
    check_fakes(lambda: gradients(call))
    with torch.no_grad():
        check_fakes(call)


@pytest.mark.parametrize("form", ["training", "inference"])
def test_fakes_of_layers_are_like_the_real(form):
    with torch.set_grad_enabled(form == "training"):
        check_fakes(lambda: layers(form))


# ---------------------------------------------------------------- observers


class Silent(TorchDispatchMode):
    """Sees every operator and changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_an_observed_call_is_the_same_call(name):
    """Through PyTorch's dispatcher, or past it: every bit of the results and gradients is the same."""
    alone = gradients(CALLS[name])
    with Silent():
        observed = gradients(CALLS[name])
    for xs, ys in zip(alone, observed, strict=True):
        for x, y in zip(xs, ys, strict=True):
            assert torch.equal(x.nan_to_num(), y.nan_to_num())


def arguments_and_sum(name: str) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """A call's floating arguments, and the sum of its results' squares as a function of them."""
    call = CALLS[name]

    def total(*args: Tensor) -> Tensor:
        results = outputs(getattr(flashgau, call.name)(*args, **call.kwargs))
        return sum((torch.where(torch.isfinite(x), x, 0) ** 2).sum() for x in results if x.is_floating_point())

    return call.args, total


@pytest.mark.parametrize("name", CALLS)
def test_grad_of_torch_func_is_that_of_backward(name):
    args, total = arguments_and_sum(name)
    leaves = [x.clone().requires_grad_() for x in args]
    expected = torch.autograd.grad(total(*leaves), leaves)
    for a, b in zip(torch.func.grad(total, argnums=tuple(range(len(args))))(*args), expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_vmap_is_a_loop(name):
    """Of values, and of gradients: those of each sample, which per-sample clipping needs."""
    args, total = arguments_and_sum(name)
    stacked = tuple(torch.stack([x, 0.5 * x, -x]) for x in args)
    for function in (total, torch.func.grad(total, argnums=tuple(range(len(args))))):
        mapped = torch.vmap(function)(*stacked)
        single = [function(*(x[i] for x in stacked)) for i in range(3)]
        for i, results in enumerate(single):
            for a, b in zip(outputs(mapped), outputs(results), strict=True):
                close(a[i], b)
    leaves = [x.clone().requires_grad_() for x in stacked]
    through = torch.autograd.grad(torch.vmap(total)(*leaves).sum(), leaves)
    for a, parts in zip(through, zip(*(outputs(results) for results in single), strict=True), strict=True):
        close(a, torch.stack(parts))
    along_the_last = torch.vmap(total, in_dims=(None, -1, *[None] * (len(args) - 2)))
    if len(args) > 1:
        mapped = along_the_last(args[0], stacked[1].movedim(0, -1), *args[2:])
        close(mapped, torch.stack([total(args[0], x, *args[2:]) for x in stacked[1]]))


def test_lengths_can_be_mapped():
    q = randn(0, 3, 1, 2, 9, 4)
    lengths = T([[9], [4], [0]])
    mapped = torch.vmap(lambda q, n: flashgau.attention(q, q, q, lengths=n))(q, lengths)
    for a, x, n in zip(mapped, q, lengths, strict=True):
        close(a, flashgau.attention(x, x, x, lengths=n))


def test_what_a_transform_leaves_behind_is_a_tensor_like_others():
    """A product made under torch.func.grad is still a function of the weights outside."""
    w, x = randn(0, 3, 4).requires_grad_(), randn(1, 3, 4)
    kept = []

    def inside(x: Tensor) -> Tensor:
        kept.append(x * w)
        return x.sum()

    torch.func.grad(inside)(x)
    (got,) = torch.autograd.grad(flashgau.glu(*kept * 2).sum(), w)
    product = x * w
    (expected,) = torch.autograd.grad(flashgau.glu(product, product).sum(), w)
    assert torch.equal(got, expected)


def test_values_are_checked_under_transforms():
    q = randn(0, 1, 2, 9, 4)
    for options in ({"lengths": T([10])}, {"cu_seqlens": T([0, 7, 5, 9])}):
        with pytest.raises(ValueError, match=r"attention: `(lengths|cu_seqlens)`"):
            torch.func.grad(lambda q, options=options: flashgau.attention(q, q, q, **options).sum())(q)


def test_an_axis_of_size_zero_cannot_be_mapped():
    with pytest.raises(RuntimeError, match="flashgau::glu cannot be mapped over an axis of size 0"):
        torch.vmap(flashgau.glu)(torch.empty(0, 3, 4))


@pytest.mark.parametrize("name", [name for name in CALLS if "states" not in name])
def test_without_values_there_are_shapes(name):
    """Tensors on the device meta have no values: the results have only shapes, without work."""
    call = CALLS[name]
    meta = Call(call.name, *tree_map_only(Tensor, lambda x: x.to("meta"), (call.args, call.kwargs)))
    for a, b in zip(outputs(meta()), outputs(call()), strict=True):
        assert (a.device.type, a.shape, a.dtype) == ("meta", b.shape, b.dtype)


@pytest.mark.parametrize("backend", backends_of("glu"))
@pytest.mark.parametrize("name", [name for name in CALLS if "attention" not in name])
def test_results_may_be_written_over(name, backend):
    """As those of PyTorch's own operations: `y += x` after a layer. (Attention's backward needs its result.)"""
    leaves = CALLS[name].leaves()
    operands = [x for x in leaves.tensors() if x.requires_grad]
    result = outputs(leaves(backend=backend))[0]
    # Gradients of equal strides: products of others may have other last bits, on some processors.
    weights = randn(9, *result.shape)
    expected = torch.autograd.grad(result, operands, 2 * weights, retain_graph=True, allow_unused=True)
    result.mul_(2)
    for a, b in zip(torch.autograd.grad(result, operands, weights, allow_unused=True), expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_profile_names_the_operators():
    x = randn(0, 3, 4).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        flashgau.glu(x, x).sum().backward()
    assert {"flashgau::glu", "flashgau::glu_backward"} <= {event.key for event in profile.key_averages()}


def test_a_trace_holds_one_node():
    x = randn(0, 3, 4)
    traced = torch.jit.trace(lambda x: flashgau.glu(x, x), x)
    assert [node.kind() for node in traced.graph.nodes() if "flashgau" in node.kind()] == ["flashgau::glu"]


def test_a_negated_view_is_negated():
    """The imaginary part of a conjugate: a view whose numbers in memory have the other sign."""
    view = torch.view_as_complex(randn(0, 3, 4, 2)).conj().imag
    assert view.is_neg()
    assert torch.equal(flashgau.glu(view), flashgau.glu(view.resolve_neg()))


def test_forward_mode_of_the_reference_agrees_with_reverse():
    x, tangent, cotangent = (randn(i, 3, 4, dtype=torch.float64) for i in range(3))
    _, forward = torch.func.jvp(partial(flashgau.glu, x, backend="reference"), (x,), (tangent,))
    x.requires_grad_()
    (reverse,) = torch.autograd.grad(flashgau.glu(x.detach(), x), x, cotangent)
    close((reverse * tangent).sum(), (forward * cotangent).sum(), ulps=64)


COMPILED = ["attention, all", "attention, causal", "glu", "glu_linear, biases", "gau, bias", "mixed_chunk, causal",
            "mixed_chunk, states"]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole(name, dynamic):
    """One graph without a break, forward and backward, with the results of the plain call."""
    torch.compiler.reset()
    call = CALLS[name]
    function = getattr(flashgau, call.name)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)

    def run(f: Callable[..., Any]) -> list[Tensor]:
        leaves = call.leaves()
        operands = [x for x in leaves.tensors() if x.requires_grad]
        results = outputs(f(*leaves.args, **leaves.kwargs))
        through = [x for x in results if x.requires_grad]
        cotangents = [torch.cos(torch.arange(x.numel()).view(x.shape) / 3.0) for x in through]
        finite = [torch.where(torch.isfinite(x), x, 0) for x in through]
        grads = torch.autograd.grad(finite, operands, cotangents, allow_unused=True)
        return [x.detach() for x in results] + [x for x in grads if x is not None]

    for a, b in zip(run(compiled), run(function), strict=True):
        if a.is_floating_point():
            close(a, b, ulps=8)
        else:
            assert torch.equal(a, b)


def test_compiles_for_any_length():
    """One graph serves every length once lengths vary."""
    torch.compiler.reset()
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(flashgau.attention, backend=count, fullgraph=True, dynamic=True)
    for n in (5, 9, 17, 33):
        q, k, v = (randn(i, 2, 2, n, 4) for i in range(3))
        close(compiled(q, k, v, causal=True), flashgau.attention(q, k, v, causal=True))
    assert len(graphs) == 1


def test_compiles_for_any_length_with_a_bias_for_each_head():
    """Whose number is fixed where that of the heads is symbolic."""
    bias = torch.nn.Parameter(randn(3, 3, 17))

    def call(q: torch.Tensor) -> Any:
        return flashgau.attention(q, q, q, rel_bias=bias)

    q = randn(0, 2, 3, 9, 4)
    close(torch.compile(call, backend="eager", fullgraph=True, dynamic=True)(q).detach(), call(q).detach())


# ---------------------------------------------------------------- autocast

CAST = {
    "attention": attention(2, 2, 40, 8, causal=True, rel_bias=randn(3, 79), sinks=randn(4, 2)),
    "glu_linear": Call("glu_linear", (randn(0, 3, 40), randn(1, 5, 40), randn(2, 5, 40), randn(3, 5)), {}),
    "gau_attention": Call("gau_attention", (*heads(40)[:2], *heads(40)[4:]), {"rel_bias": randn(3, 79)}),
    "mixed_chunk_attention": Call(
        "mixed_chunk_attention", tuple(heads(40)), {"chunk_size": 16, "rel_bias": randn(3, 31)}
    ),
}


def autocast(dtype: torch.dtype = torch.bfloat16) -> Any:
    return torch.autocast("cpu", dtype=dtype)


@pytest.mark.parametrize("name", CAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_autocast_is_a_cast_of_the_operands(name, dtype, backend):
    """Equal, bit by bit, to casting q, k, v by hand: nothing inside is cast once more."""
    call = CAST[name]
    with autocast(dtype):
        out = call(backend=backend)
    cast = Call(call.name, tuple(x.to(dtype) for x in call.args), call.kwargs)
    assert out.dtype == dtype
    assert torch.equal(out, cast(backend=backend))
    with autocast(dtype), torch.autocast("cpu", enabled=False):
        assert call(backend=backend).dtype == torch.float32


@pytest.mark.parametrize("name", CAST)
def test_gradients_under_autocast_have_the_dtype_of_their_operands(name):
    call = CAST[name].leaves()
    leaves = [x for x in call.tensors() if x.requires_grad]
    with autocast():
        out = call()
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)
    plain = torch.autograd.grad(call().square().sum(), leaves)
    for g, p in zip(grads, plain, strict=True):
        assert (g - p).norm() <= 0.03 * p.norm()


def test_autocast_leaves_fp64_alone():
    call = CAST["attention"]
    double = Call("attention", tuple(x.double() for x in call.args), {"causal": True})
    with autocast():
        assert double().dtype == torch.float64
        q, k, v = double.args
        assert torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype == torch.float64


def test_autocast_does_not_touch_glu():
    """Elementwise functions keep their operands' dtype under autocast, as PyTorch's own do."""
    gate, up = randn(0, 3, 4), randn(1, 3, 4)
    with autocast():
        assert flashgau.glu(gate, up).dtype == torch.float32
        assert torch.nn.functional.silu(gate).dtype == torch.float32


def test_step_under_autocast():
    tokens = [randn(i, 2, 1, w) for i, w in enumerate((4, 4, 4, 4, 6, 6))]
    empty = flashgau.MixedChunkState.empty(2, 4, 6, 4, dtype=torch.bfloat16)
    with autocast():
        out, after = flashgau.mixed_chunk_step(*tokens, state=empty)
    assert out.dtype == torch.bfloat16
    assert after.v.dtype == torch.bfloat16
    assert after.kv.dtype == torch.float32
