"""`flashgau.mixed_chunk_attention` and its step on every optimised backend: against the reference, cost and sizes."""

import pytest
import torch
from backends import DTYPES, LEAST, backend_fixture, backends_of, blocks, largest_storages, needs
from checks import (
    check_agrees,
    check_backward_repeats,
    check_leaves_inputs_alone,
    check_repeats_bitwise,
    check_second_derivative,
    check_some_gradients,
    gradients,
    outputs,
)
from hypothesis import given
from hypothesis import strategies as st
from mixed_chunk_inputs import concatenated_state
from strategies import ACTIVATIONS, Call, mixed_chunk_calls, randn, step_calls
from torch import Tensor

import flashgau

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


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_of_the_gate(backend, activation):
    """Of a sequence, with gradients, and of one more token without, which has a kernel of its own."""
    tokens = [randn(i, 2, 20, 11 if i > 3 else 8) for i in range(6)]
    options = {"chunk_size": 8, "causal": True, "gate_activation": activation}
    check_agrees(Call("mixed_chunk_attention", tuple(tokens), options), backend)
    before, token = ([x[:, s] for x in tokens] for s in (slice(0, 19), slice(19, 20)))
    _, state = flashgau.mixed_chunk_attention(*before, **options, return_state=True)
    step = Call("mixed_chunk_step", tuple(token), {"state": state, "gate_activation": activation})
    report = flashgau.compare(flashgau.mixed_chunk_step, *step.args, backend=backend, grad=False, **step.kwargs)
    assert report.ok, f"\n{report}"


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
def test_second_derivatives(backend, causal, score):
    operands = [randn(i, 1, 7, 3) for i in range(6)]
    options = {"chunk_size": 3, "causal": causal, "score": score}
    check_second_derivative(Call("mixed_chunk_attention", tuple(operands), options))


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


@pytest.mark.parametrize("name", backends_of("mixed_chunk_attention"))
@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear(name, causal):
    """No tensor is longer than the input: there is neither a matrix of scores nor a state for every chunk."""
    n, width = 512 if name == "triton" else 4096, 4
    operands = [randn(i, 1, n, width) for i in range(6)]
    options = {"chunk_size": 16, "causal": causal, "rel_bias": randn(6, 31), "return_state": causal}
    # Triton keeps A of all chunks if that is no larger than the values, and dS of as many as a cache holds, here one.
    with flashgau.use_backend(name), blocks(LEAST if name == "triton" else {}), largest_storages() as found:
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
