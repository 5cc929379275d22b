"""`flashgau.mixed_chunk_attention` and its step on every optimised backend: states, and tokens taken back."""

import re
from dataclasses import replace

import pytest
import torch
from backends import backend_fixture, backends_of, dtypes_of
from checks import close, close_gradients, outputs
from hypothesis import given
from hypothesis import strategies as st
from mixed_chunk_inputs import concatenated_state, draw_dense
from strategies import Call, mixed_chunk_calls, randn
from torch import Tensor

import flashgau
import flashgau.models

backend = backend_fixture("mixed_chunk_attention")
data = st.data()


# ---------------------------------------------------------------- states


@given(data)
def test_parallel_chunked_and_recurrent_agree(backend, data):
    """The whole at once, cut at any tokens, and token by token: results, states and gradients."""
    chunk = data.draw(st.integers(1, 2)) if backend == "triton" else None
    call = draw_dense(data, backend, chunk=chunk, causal=True, dtype=torch.float32)
    n, (b, _, width) = call.args[0].shape[1], call.args[0].shape
    value_width, chunk = call.args[4].shape[-1], call.kwargs["chunk_size"]
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=1 if backend == "triton" else 3)))
    options = {key: x for key, x in call.kwargs.items() if key not in ("causal", "chunk_size")}

    def parallel(*operands: Tensor) -> tuple[Tensor, flashgau.MixedChunkState]:
        return Call(call.name, operands, call.kwargs)(return_state=True)

    def chunked(*operands: Tensor) -> tuple[Tensor, flashgau.MixedChunkState]:
        state, outs = None, []
        for start, stop in zip([0, *cuts], [*cuts, n], strict=True):
            piece = Call(call.name, tuple(x[:, start:stop] for x in operands), call.kwargs)
            out, state = piece(initial_state=state, return_state=True)
            outs.append(out)
        return torch.cat(outs, 1), state

    def recurrent(*operands: Tensor) -> tuple[Tensor, flashgau.MixedChunkState]:
        state, outs = flashgau.MixedChunkState.empty(b, width, value_width, chunk), []
        for i in range(n):
            out, state = flashgau.mixed_chunk_step(*(x[:, i : i + 1] for x in operands), state=state, **options)
            outs.append(out)
        return torch.cat(outs, 1), state

    found = []
    for form in (parallel, chunked, recurrent):
        operands = [x.clone().requires_grad_() for x in call.args]
        out, state = form(*operands)
        results = [out, *concatenated_state(state)]
        cotangents = [torch.cos(torch.arange(x.numel()).view(x.shape) / 3.0) for x in results[:-1]]
        loss = sum((x * c).sum() for x, c in zip(results[:-1], cotangents, strict=True))
        grads = torch.autograd.grad(loss, operands, allow_unused=True)
        grads = [torch.zeros_like(x) if g is None else g for x, g in zip(operands, grads, strict=True)]
        found.append([x.detach() for x in results] + grads)
    for other in found[1:]:
        for a, whole in zip(other[:6], found[0][:6], strict=True):
            if whole.is_floating_point():
                close(a, whole, ulps=64)
            else:
                assert torch.equal(a, whole)
        close_gradients(other[6:], found[0][6:], ulps=128)


@given(data)
def test_states_are_what_they_say(backend, data):
    call = data.draw(mixed_chunk_calls(backend, causal=True, stateful=True)).with_options(return_state=True)
    _, state = call()
    size = call.kwargs["chunk_size"]
    v = call.args[4]
    if "cu_seqlens" in call.kwargs:
        tokens = call.kwargs["cu_seqlens"].diff().long()
    else:
        tokens = call.kwargs.get("lengths", torch.full((v.shape[0],), v.shape[1])).long()
    before = call.kwargs.get("initial_state")
    assert torch.equal(state.position, tokens if before is None else tokens + before.position)
    assert state.kv.dtype == (torch.float64 if v.dtype == torch.float64 else torch.float32)
    assert state.quad_k.dtype == state.lin_k.dtype == state.v.dtype == v.dtype
    behind = torch.arange(size) >= (state.position % size)[:, None]
    for x in (state.quad_k, state.lin_k, state.v):
        assert x.shape[:2] == (len(tokens), size)
        assert not x[behind].any()


@given(data)
def test_empty_state_changes_nothing(backend, data):
    call = draw_dense(data, backend, causal=True)
    b, _, width = call.args[0].shape
    dtype = call.args[0].dtype
    sizes = b, width, call.args[4].shape[-1], call.kwargs["chunk_size"]
    state = flashgau.MixedChunkState.empty(*sizes, dtype=dtype)
    fresh, continued = call(return_state=True), call(initial_state=state, return_state=True)
    for a, x in zip(outputs(continued), outputs(fresh), strict=True):
        if x.is_floating_point():
            close(a, x, ulps=4)
        else:
            assert torch.equal(a, x)


@given(data)
def test_step_of_each_row_at_its_own_place(backend, data):
    """Rows of one batch may stand at different tokens of their chunks."""
    call = draw_dense(data, backend, causal=True, dtype=torch.float32)
    b, n, _ = call.args[0].shape
    lengths = torch.tensor([data.draw(st.integers(0, n - 1)) for _ in range(b)])
    _, state = call(lengths=lengths, return_state=True)
    rows = torch.arange(b)
    token = tuple(x[rows, lengths][:, None] for x in call.args)
    options = {key: x for key, x in call.kwargs.items() if key not in ("causal", "chunk_size")}
    out, after = flashgau.mixed_chunk_step(*token, state=state, **options)
    whole, expected = call(lengths=lengths + 1, return_state=True)
    terms, sums = call.map(torch.abs)(lengths=lengths + 1, return_state=True)  # how large they are: results may cancel
    close(out, whole[rows, lengths][:, None], ulps=64, scale=float(terms.abs().max()))
    for a, x, y in zip(*map(concatenated_state, (after, expected, sums)), strict=True):
        close(a, x, ulps=64, scale=float(y.abs().max())) if x.is_floating_point() else None
    assert torch.equal(after.position, lengths + 1)


@given(data)
def test_states_of_chosen_rows_continue_alone(backend, data):
    call = draw_dense(data, backend, causal=True, dtype=torch.float32)
    b = call.args[0].shape[0]
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, b - 1), min_size=1, max_size=4)))
    _, state = call(return_state=True)
    out = call(initial_state=state)
    picked = Call(call.name, tuple(x[chosen] for x in call.args), call.kwargs)
    close(picked(initial_state=state.select(chosen)), out[chosen], ulps=32)


def test_state_is_left_as_it_was(backend):
    operands = [randn(i, 2, 5, 3) for i in range(6)]
    _, state = flashgau.mixed_chunk_attention(*operands, chunk_size=3, causal=True, return_state=True)
    before = [x.clone() for x in concatenated_state(state)]
    for _ in range(2):
        flashgau.mixed_chunk_attention(*operands, chunk_size=3, causal=True, return_state=True, initial_state=state)
        flashgau.mixed_chunk_step(*(x[:, :1] for x in operands), state=state)
    assert all(torch.equal(a, x) for a, x in zip(concatenated_state(state), before, strict=True))


# ---------------------------------------------------------------- taking tokens back, and layers


@given(data)
def test_a_truncated_state_is_that_of_fewer_tokens(data):
    call = draw_dense(data, "eager", causal=True)
    b, n, _ = call.args[0].shape
    lengths = torch.tensor([data.draw(st.integers(0, n)) for _ in range(b)])
    taken = torch.stack(
        [data.draw(st.integers(0, int(x % call.kwargs["chunk_size"]))) * x.new_ones(()) for x in lengths]
    )
    _, state = call(lengths=lengths, return_state=True)
    _, expected = call(lengths=lengths - taken, return_state=True)
    for a, x in zip(concatenated_state(state.truncate(taken)), concatenated_state(expected), strict=True):
        assert torch.equal(a, x)
    assert torch.equal(state.truncate(0).v, state.v)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (3, ValueError, "truncate: `tokens` is [3, 3]; expected at most what the open chunks hold, [2, 2]"),
        (-1, ValueError, "expected at most what the open chunks hold"),
        (0.5, TypeError, "truncate: `tokens` is 0.5; expected an int or (2,) integers"),
        (
            torch.tensor([1]),
            TypeError,
            "truncate: `tokens` is shape (1,), torch.int64; expected an int or (2,) integers",
        ),
    ],
)
def test_a_state_is_not_truncated_past_its_open_chunk(tokens, error, message):
    _, state = flashgau.mixed_chunk_attention(
        *(randn(i, 2, 6, 3) for i in range(5)), chunk_size=4, causal=True, return_state=True
    )
    with pytest.raises(error, match=re.escape(message)):
        state.truncate(tokens)


TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("kept", TYPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_state_is_taken_in_every_type_by_both(backend, dtype, kept):
    """Attention and step take the same states, make the same of them, and leave theirs in the call's types."""
    if dtype not in dtypes_of(backend):
        pytest.skip("no such type on this backend")
    x, v, token, value = (randn(i, 1, n, 8).to(dtype) for i, n in enumerate((6, 6, 1, 1)))
    _, first = flashgau.mixed_chunk_attention(x, x, x, x, v, chunk_size=4, causal=True, return_state=True)
    state = flashgau.MixedChunkState(*(t.to(kept) if t.is_floating_point() else t for t in first.tensors()))
    operands = (token, token, token, token, value)
    out, after = flashgau.mixed_chunk_attention(
        *operands, chunk_size=4, causal=True, initial_state=state, return_state=True
    )
    with torch.no_grad():
        stepped, after_step = flashgau.mixed_chunk_step(*operands, state=state)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    for found in (after, after_step):
        assert [t.dtype for t in found.tensors()] == [sums, dtype, dtype, dtype, torch.int64]
    u = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * (dtype != torch.float64))
    exact = flashgau.reference.mixed_chunk_attention(
        *(t.double() for t in operands), chunk_size=4, causal=True, initial_state=state.to(dtype).to(torch.float64)
    )
    for found in (out, stepped):
        assert (found.double() - exact).abs().max() < 16 * u * exact.abs().max()
    for one, other in zip(after.tensors(), after_step.tensors(), strict=True):
        torch.testing.assert_close(one, other, rtol=16 * u, atol=16 * u)


def test_states_move_between_types_and_devices():
    empty = flashgau.MixedChunkState.empty(2, 8, 16, 4)
    half = empty.to(torch.bfloat16)
    assert [t.dtype for t in half.tensors()] == [torch.float32, *3 * [torch.bfloat16], torch.int64]
    assert {t.dtype for t in half.to(dtype=torch.float64).tensors()} == {torch.float64, torch.int64}
    assert empty.to() is empty.to("cpu", torch.float32) is empty
    there = empty.to("meta", torch.float16)
    assert {t.device.type for t in there.tensors()} == {"meta"}
    assert there.v.dtype == torch.float16
    assert {t.device.type for t in empty.tensors()} == {"cpu"}
    for dtype in (torch.int64, "half"):
        with pytest.raises(TypeError, match=r"MixedChunkState.to: `dtype` is .*; expected float16"):
            empty.to(dtype=dtype)


@pytest.mark.parametrize(
    ("field", "change", "error", "message"),
    [
        *((name, lambda t: t.to("meta"), ValueError, "is on meta; expected cpu") for name in ("kv", "v", "position")),
        ("lin_k", lambda t: t.to(torch.int32), TypeError, "has dtype torch.int32; expected float16"),
        ("kv", lambda t: t.to(torch.complex64), TypeError, "has dtype torch.complex64; expected float16"),
        ("position", lambda t: t.to(torch.int32), TypeError, "has dtype torch.int32; expected int64"),
        ("quad_k", lambda t: t.tolist(), TypeError, "is a list; expected a torch.Tensor"),
        ("v", lambda t: t[:, :, :3], ValueError, "has shape"),
    ],
)
def test_states_that_do_not_fit_are_refused_by_name(backend, field, change, error, message):
    """One of another device would be read as what its memory happens to hold."""
    x, v = randn(0, 1, 1, 8), randn(1, 1, 1, 16)
    state = flashgau.MixedChunkState.empty(1, 8, 16, 4)
    wrong = replace(state, **{field: change(getattr(state, field))})
    with pytest.raises(error, match=rf"mixed_chunk_step: `state\.{field}` {message}"):
        flashgau.mixed_chunk_step(x, x, x, x, v, state=wrong)
    with pytest.raises(error, match=rf"mixed_chunk_attention: `initial_state\.{field}` {message}"):
        flashgau.mixed_chunk_attention(x, x, x, x, v, chunk_size=4, causal=True, initial_state=wrong)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.uint16, torch.bool], ids=str)
def test_rows_are_chosen_by_numbers_of_every_type(dtype):
    """PyTorch itself takes uint8 for a mask."""
    state = flashgau.MixedChunkState.empty(2, 8, 16, 4)
    state = replace(state, position=torch.tensor([5, 7]))
    expected = [7] if dtype == torch.bool else [5, 7]
    assert state.select(torch.tensor([0, 1]).to(dtype)).position.tolist() == expected
    if dtype != torch.bool:
        assert state.truncate(torch.tensor([1, 0]).to(dtype)).position.tolist() == [4, 7]
    else:
        with pytest.raises(TypeError, match=r"truncate: `tokens` is shape \(2,\), torch.bool"):
            state.truncate(torch.tensor([True, False]))


@pytest.mark.skipif("triton" not in backends_of("mixed_chunk_attention"), reason="no GPU, and not interpreting")
def test_a_flash_model_runs_and_decodes_on_triton():
    """Loss, gradients and the continuation of a prompt are those of the reference."""
    config = flashgau.models.ModelConfig.named("flash-tiny", dim=16, depth=2, key_dim=8, chunk_size=4, vocab_size=11)
    torch.manual_seed(5)
    model = flashgau.models.CausalLM(config)
    tokens = torch.randint(11, (2, 11))
    found = []
    for name in ("triton", "reference"):
        with flashgau.use_backend(name):
            grads = torch.autograd.grad(model.loss(tokens), list(model.parameters()))
            found.append([*grads, model.generate(tokens, 6, temperature=0, lengths=torch.tensor([11, 6]))])
    close_gradients(found[0][:-1], found[1][:-1], ulps=256)
    assert torch.equal(found[0][-1], found[1][-1])
