"""`flashgau.mixed_chunk_attention` and its step on every optimised backend: the reference, its laws, its states."""

import math
import re
from dataclasses import fields, replace

import pytest
import torch
from backends import DTYPES, PANELS, TINY, backend_fixture, backends_of, blocks, dtypes_of, largest_storages, needs
from checks import (
    REST,
    check_agrees,
    check_backward_repeats,
    check_leaves_inputs_alone,
    check_refuses_second_derivative,
    check_repeats_bitwise,
    check_rest_is_padding,
    check_some_gradients,
    close,
    close_gradients,
    gradients,
    outputs,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import Call, mixed_chunk_calls, randn, seeds, step_calls
from torch import Tensor

import flashgau
import flashgau.models

backend = backend_fixture("mixed_chunk_attention")
data = st.data()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data)
def test_agrees_with_the_reference(backend, dtype, data):
    needs(backend, dtype)
    check_agrees(data.draw(mixed_chunk_calls(backend, dtype=dtype)), backend)


@pytest.mark.parametrize("chunk", [64, 65])
@pytest.mark.parametrize("n", [65, 200])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_chunks_as_wide_as_they_are_cut(chunk, n, causal):
    """From 64 tokens on a causal chunk is computed as two blocks, which leave out a quarter of it."""
    heads, v, gate = [randn(i, 2, n, 8) for i in range(4)], randn(4, 2, n, 12), randn(5, 2, n, 12)
    bias = randn(6, 2 * chunk - 1)
    options = {"chunk_size": chunk, "causal": causal, "rel_bias": bias}
    check_agrees(Call("mixed_chunk_attention", (*heads, v, gate), options), "eager")


@pytest.mark.parametrize("spare", [0, 1, 6], ids="P = chunk + {}".format)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_every_entry_of_the_bias(backend, causal, spare):
    """About 0.7 the laplace score is steepest, so that the gradient's first and last entries count."""
    heads, v = [randn(i, 2, 41, 8) for i in range(4)], randn(4, 2, 41, 12)
    bias = 0.7 + 0.1 * randn(5, 2 * (16 + spare) - 1)
    options = {"chunk_size": 16, "causal": causal, "score": "laplace", "rel_bias": bias}
    check_agrees(Call("mixed_chunk_attention", (*heads, v), options), backend)


@given(data)
def test_with_states_agrees_with_the_reference(backend, data):
    check_agrees(data.draw(mixed_chunk_calls(backend, causal=True, stateful=True)), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data)
def test_step_agrees_with_the_reference(backend, dtype, data):
    needs(backend, dtype)
    check_agrees(data.draw(step_calls(dtype=dtype)), backend)


@given(data)
def test_step_without_gradients_agrees_with_the_reference(backend, data):
    """On Triton a kernel of its own; a step that is differentiated is a call of one token."""
    call = data.draw(step_calls(backend))
    report = flashgau.compare(flashgau.mixed_chunk_step, *call.args, grad=False, **call.kwargs)
    assert report.ok, f"\n{report}"


@given(data)
def test_repeats_bitwise(backend, data):
    check_repeats_bitwise(data.draw(mixed_chunk_calls(backend)))


@given(data)
def test_leaves_its_inputs_alone(backend, data):
    check_leaves_inputs_alone(data.draw(mixed_chunk_calls(backend)))


@given(data)
def test_step_leaves_its_inputs_alone(backend, data):
    check_leaves_inputs_alone(data.draw(step_calls(backend)))


@given(data)
def test_backward_repeats_over_a_kept_graph(backend, data):
    check_backward_repeats(data.draw(mixed_chunk_calls(backend)))


@given(data, st.lists(st.booleans(), min_size=11, max_size=11))
def test_gradients_of_some_operands_alone(backend, data, needed):
    check_some_gradients(data.draw(mixed_chunk_calls(backend)), needed)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("score", ["relu2", "laplace"])
def test_second_derivatives_are_refused(backend, causal, score):
    operands = [randn(i, 1, 7, 3) for i in range(6)]
    options = {"chunk_size": 3, "causal": causal, "score": score}
    check_refuses_second_derivative(Call("mixed_chunk_attention", tuple(operands), options))


@pytest.mark.parametrize("score", ["relu2", "laplace"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "return_state": True},
        {"causal": True, "lin_normalizer": 3, "lengths": torch.tensor([4])},
        {"causal": True, "return_state": True, "continued": True},
    ],
    ids=["full", "causal", "lengths", "continued"],
)
def test_gradients_are_derivatives(backend, score, options):
    needs(backend, torch.float64)
    options = {"chunk_size": 2, "score": score, **options}
    double = {"dtype": torch.float64}
    operands = [randn(i, 1, 5, 2, **double).requires_grad_() for i in range(6)]
    operands.append(randn(6, 3, **double).requires_grad_())
    state = []
    if options.pop("continued", False):
        shapes = (1, 2, 2), (1, 2, 2), (1, 2, 2), (1, 2, 2)
        # One token of the open chunk is there; what is behind it must not count.
        state = [randn(7 + i, *s, **double).requires_grad_() for i, s in enumerate(shapes)]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        *heads, bias = tensors[:7]
        start = {}
        if state:
            kv, *opened = tensors[7:]
            opened = [torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], 1) for x in opened]
            start["initial_state"] = flashgau.MixedChunkState(kv, *opened, torch.tensor([3]))
        results = outputs(flashgau.mixed_chunk_attention(*heads, rel_bias=bias, **options, **start))
        return tuple(x for x in results if x.is_floating_point())

    assert torch.autograd.gradcheck(function, (*operands, *state))


# ---------------------------------------------------------------- laws


def draw_dense(data, backend, *, chunk=None, chunks=None, dtype=None, **options) -> Call:
    """A call without padding, packing or states."""
    dtype = dtype or data.draw(st.sampled_from(dtypes_of(backend)))
    few = backend == "triton"  # programs that an interpreter goes through
    chunk = chunk or data.draw(st.integers(1, 5 if few else 9))
    if chunks is None:
        n = data.draw(st.integers(1, (2 if few else 4) * chunk + 2))
    else:
        n = chunk * chunks
    b = data.draw(st.sampled_from([1, 2] if few else [1, 2, 3]))
    width, value_width = data.draw(st.sampled_from([(8, 8), (5, 19), (16, 3)]))
    seed = data.draw(seeds)
    widths = [width] * 4 + [value_width] * data.draw(st.integers(1, 2))
    operands = tuple(randn(seed + i, b, n, w, dtype=dtype) for i, w in enumerate(widths))
    kwargs = {"chunk_size": chunk, "score": data.draw(st.sampled_from(["relu2", "laplace"]))}
    kwargs["lin_normalizer"] = data.draw(st.sampled_from(["tokens", 4]))
    if data.draw(st.booleans()):
        kwargs["rel_bias"] = randn(seed + 9, 2 * chunk + 1, dtype=dtype)
    return Call("mixed_chunk_attention", operands, kwargs | options)


@given(data)
def test_batch_rows_are_independent(backend, data):
    call = draw_dense(data, backend, causal=data.draw(st.booleans()))
    whole = call()
    for b in range(whole.shape[0]):
        alone = Call(call.name, tuple(x[b : b + 1] for x in call.args), call.kwargs)
        close(alone(), whole[b : b + 1])


@given(data)
def test_causal_prefix_knows_nothing_of_the_rest(backend, data):
    call = draw_dense(data, backend, causal=True)
    n = data.draw(st.integers(0, call.args[0].shape[1]))
    close(Call(call.name, tuple(x[:, :n] for x in call.args), call.kwargs)(), call()[:, :n])


@given(data)
def test_order_of_chunks_is_irrelevant(backend, data):
    """Without a mask whole chunks may change places."""
    chunks = data.draw(st.integers(1, 3 if backend == "triton" else 5))
    call = draw_dense(data, backend, chunks=chunks, causal=False)
    size = call.kwargs["chunk_size"]
    order = torch.randperm(chunks, generator=torch.Generator().manual_seed(data.draw(seeds)))
    rows = (order[:, None] * size + torch.arange(size)).flatten()
    moved = Call(call.name, tuple(x[:, rows] for x in call.args), call.kwargs)
    close(moved(), call()[:, rows], ulps=32)
    leaves = moved.leaves()
    weight = torch.ones_like(call.args[4])
    moved_grads = torch.autograd.grad(leaves(), list(leaves.args), weight)
    leaves = call.leaves()
    grads = torch.autograd.grad(leaves(), list(leaves.args), weight)
    close_gradients(list(moved_grads), [g[:, rows] for g in grads])


@given(data)
def test_one_chunk_is_the_gated_attention_unit(backend, data):
    """Causal within one chunk there is only the local part: quadratic attention with n = C."""
    size = data.draw(st.integers(1, 40))
    call = draw_dense(data, backend, chunk=size, chunks=1, causal=True, dtype=torch.float32)
    quad_q, quad_k, _, _, v, *gate = call.args
    options = {key: call.kwargs.get(key) for key in ("score", "causal", "rel_bias")}
    close(call(), flashgau.gau_attention(quad_q, quad_k, v, *gate, normalizer=size, **options), ulps=32)


@given(data)
def test_chunks_of_one_token_are_linear_attention(backend, data):
    """With C = 1 and a local score of zero the causal sum over tokens before is all."""
    call = draw_dense(data, backend, chunk=1, causal=True, dtype=torch.float32, lin_normalizer=2, score="relu2")
    _, _, lin_q, lin_k, v, *gate = call.args
    zero = torch.zeros_like(lin_q)
    out = Call(call.name, (zero, zero, *call.args[2:]), {**call.kwargs, "rel_bias": None})()
    scores = (lin_q.double() @ lin_k.double().mT).tril(-1) / 2
    expected = scores @ v.double()
    close(out, (expected * gate[0] if gate else expected).float(), ulps=64)


@given(data)
def test_gate_multiplies_the_ungated_output(backend, data):
    call = draw_dense(data, backend, causal=data.draw(st.booleans()), dtype=torch.float32)
    gate = randn(data.draw(seeds), *call.args[4].shape)
    ungated = Call(call.name, call.args[:5], call.kwargs)()
    close(Call(call.name, (*call.args[:5], gate), call.kwargs)(), gate * ungated)


# ---------------------------------------------------------------- states


def concatenated_state(state: flashgau.MixedChunkState) -> list[Tensor]:
    return [getattr(state, f.name) for f in fields(state)]


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


# ---------------------------------------------------------------- padding and packing


def most(backend: str) -> int:
    """How many sequences at most: an interpreted kernel takes its time for each."""
    return 3 if backend == "triton" else 4


@given(data)
def test_packed_is_alone(backend, data):
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    counts = data.draw(st.lists(st.sampled_from([0, 1, 3, 8, 13]), min_size=1, max_size=most(backend)))
    causal, seed = data.draw(st.booleans()), data.draw(seeds)
    options = {
        "chunk_size": data.draw(st.sampled_from([4, 5, 16] if backend == "triton" else [1, 3, 4, 16])),
        "score": data.draw(st.sampled_from(["relu2", "laplace"])),
        "causal": causal,
        "return_state": causal,
    }
    sequences = [tuple(randn(seed + i, 1, n, w, dtype=dtype) for i, w in enumerate((4, 4, 4, 4, 6, 6))) for n in counts]

    def run(operands: tuple[Tensor, ...], **packing: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        call = Call("mixed_chunk_attention", operands, {**options, **packing}).leaves()
        out, *state = outputs(call())
        # The weights of each token are its own values, so that they are the same in a pack and alone.
        loss = (out * torch.cos(7 * out.detach())).sum() + sum(x.sum() for x in state if x.requires_grad)
        grads = torch.autograd.grad(loss, list(call.args), allow_unused=True)
        grads = [torch.zeros_like(x) if g is None else g for x, g in zip(operands, grads, strict=True)]
        return [out.detach(), *grads], [x.detach() for x in state]

    operands = tuple(torch.cat(parts, 1) for parts in zip(*sequences, strict=True))
    rows, states = run(operands, cu_seqlens=torch.tensor([0, *counts]).cumsum(0))
    alone = [run(parts) for parts in sequences]
    for a, parts in zip(rows, zip(*(x[0] for x in alone), strict=True), strict=True):
        close(a, torch.cat(parts, 1), ulps=4)
    for a, parts in zip(states, zip(*(x[1] for x in alone), strict=True), strict=True):
        expected = torch.cat(parts)
        close(a, expected, ulps=4) if a.is_floating_point() else None


@given(data)
def test_padded_is_alone_and_padding_is_irrelevant(backend, data):
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 3, 8, 13]), min_size=1, max_size=most(backend)))
    n, b = max(lengths) + data.draw(st.sampled_from([0, 1, 5])), len(lengths)
    causal, seed = data.draw(st.booleans()), data.draw(seeds)
    chunk = data.draw(st.sampled_from([4, 5, 16] if backend == "triton" else [1, 3, 4, 16]))
    options = {"chunk_size": chunk, "causal": causal, "return_state": causal}
    if data.draw(st.booleans()):
        options["rel_bias"] = randn(seed + 9, 2 * chunk - 1, dtype=dtype)
    operands = [randn(seed + i, b, n, w, dtype=dtype) for i, w in enumerate((4, 4, 4, 4, 6, 6, 6))]
    for x in operands:
        for i, length in enumerate(lengths):
            x[i, length:] = math.nan

    def run(batch: slice, rows: slice, **padding: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        *leaves, weight = (x[batch, rows].clone() for x in operands)
        leaves = [x.requires_grad_() for x in leaves]
        out, *state = outputs(flashgau.mixed_chunk_attention(*leaves, **options, **padding))
        through = [x for x in state if x.requires_grad]
        cotangents = [weight, *(torch.ones_like(x) for x in through)]
        grads = torch.autograd.grad([out, *through], leaves, cotangents, allow_unused=True)
        grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
        return [out.detach(), *grads], [x.detach() for x in state]

    padded, states = run(slice(None), slice(None), lengths=torch.tensor(lengths))
    for i, length in enumerate(lengths):
        alone, state = run(slice(i, i + 1), slice(0, length))
        for a, w in zip(alone, padded, strict=True):
            close(w[i : i + 1, :length], a, ulps=4)
            assert not w[i, length:].any()
        for a, w in zip(state, states, strict=True):
            close(w[i : i + 1], a, ulps=4) if a.is_floating_point() else None


@given(data)
def test_what_stands_behind_the_open_chunk_is_irrelevant(backend, data):
    """A step, and a continuation, read no row of a state's buffers from its open tokens on."""
    call = data.draw(step_calls(backend))
    state = call.kwargs["state"]
    behind = (torch.arange(state.chunk_size) >= state.open_tokens[:, None])[..., None]
    opened = (torch.where(behind, math.nan, x) for x in (state.quad_k, state.lin_k, state.v))
    spoilt = flashgau.MixedChunkState(state.kv, *opened, state.position)
    for a, x in zip(outputs(call(state=spoilt)), outputs(call()), strict=True):
        assert torch.equal(a, x)
    options = {key: x for key, x in call.kwargs.items() if key != "state"}
    whole = Call("mixed_chunk_attention", call.args, {**options, "chunk_size": state.chunk_size, "causal": True})
    results = (outputs(whole(initial_state=s, return_state=True)) for s in (spoilt, state))
    for a, x in zip(*results, strict=True):
        assert torch.equal(a, x)


@pytest.mark.parametrize("name", [*backends_of("mixed_chunk_attention"), "reference"])
@pytest.mark.parametrize("case", range(len(REST)), ids=lambda case: str(REST[case][0]))
def test_rows_of_no_sequence_are_padding(name, case):
    causal = case < 2
    ends, n = REST[case]
    operands = tuple(randn(i, 1, n, 3) for i in range(6))
    options = {"chunk_size": 12, "causal": causal, "return_state": causal, "rel_bias": randn(6, 25)}
    if causal:  # sequences that go on from some token
        position = torch.arange(len(ends) - 1) * 7 + 5
        opened = (torch.arange(12) < position[:, None] % 12)[..., None]
        kv, *held = (randn(7 + i, len(position), size, 3) for i, size in enumerate((3, 12, 12, 12)))
        kv = torch.where(position[:, None, None] < 12, 0, kv)
        options["initial_state"] = flashgau.MixedChunkState(kv, *(torch.where(opened, x, 0) for x in held), position)
    with flashgau.use_backend(name), blocks({**TINY, **(PANELS if case % 2 else {})}):
        check_rest_is_padding(Call("mixed_chunk_attention", operands, options), 1, {"q": ends}, "qqqqqq", "q")


# ---------------------------------------------------------------- cost and sizes


@pytest.mark.parametrize("name", backends_of("mixed_chunk_attention"))
@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear(name, causal):
    """No tensor is longer than the input: there is neither a matrix of scores nor a state for every chunk."""
    n, width = 512 if name == "triton" else 4096, 4
    operands = [randn(i, 1, n, width) for i in range(6)]
    options = {"chunk_size": 16, "causal": causal, "rel_bias": randn(6, 31), "return_state": causal}
    # Triton keeps scores of some chunks, as many as a cache holds, here one.
    with flashgau.use_backend(name), blocks(PANELS if name == "triton" else {}), largest_storages() as found:
        gradients(Call("mixed_chunk_attention", tuple(operands), options))
    assert max(found) <= 4 * n * width


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_in_gives_nothing_out(backend, shape, causal):
    b, n = shape
    operands = [randn(i, b, n, 3) for i in range(6)]
    options = {"chunk_size": 4, "causal": causal, "return_state": causal}
    results, grads = gradients(Call("mixed_chunk_attention", tuple(operands), options))
    assert results[0].shape == (b, n, 3)
    assert not any(x.any() for x in [*results, *grads])
    if causal:
        assert results[1].shape == (b, 3, 3)
        assert results[2].shape == (b, 4, 3)


def test_packing_without_tokens_keeps_the_states(backend):
    operands = [randn(i, 2, 5, 3) for i in range(5)]
    _, state = flashgau.mixed_chunk_attention(*operands, chunk_size=3, causal=True, return_state=True)
    nothing = [randn(i, 1, 0, 3) for i in range(5)]
    out, after = flashgau.mixed_chunk_attention(
        *nothing,
        chunk_size=3,
        causal=True,
        return_state=True,
        initial_state=state,
        cu_seqlens=torch.tensor([0, 0, 0]),
    )
    assert out.shape == (1, 0, 3)
    for a, x in zip(concatenated_state(after), concatenated_state(state), strict=True):
        assert torch.equal(a, x)


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
