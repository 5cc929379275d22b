"""`flashgau.mixed_chunk_attention` on every optimised backend: padded and packed rows."""

import math

import pytest
import torch
from backends import PANELS, TINY, backend_fixture, backends_of, blocks, dtypes_of
from checks import REST, check_rest_is_padding, close, outputs
from hypothesis import given
from hypothesis import strategies as st
from strategies import Call, randn, seeds, step_calls
from torch import Tensor

import flashgau

backend = backend_fixture("mixed_chunk_attention")
data = st.data()


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
