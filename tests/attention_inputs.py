"""Inputs and options of `flashgau.attention`, drawn by hypothesis."""

from backends import dtypes_of
from hypothesis import strategies as st
from strategies import Call, randn, seeds
from torch import Tensor


def draw_dense(data, backend, *, batch=(1, 2, 3), m=(1, 15, 17, 65), equal=False, dtype=None, **options) -> Call:
    """A call without padding or packing, M = N if `equal`."""
    dtype = dtype or data.draw(st.sampled_from(dtypes_of(backend)))
    few = backend == "triton"  # programs that an interpreter goes through
    b = data.draw(st.sampled_from([x for x in batch if x < 3] if few else batch))
    heads_k, group = data.draw(st.sampled_from([(1, 1), (1, 2), (2, 1)] + [(2, 2)] * (not few)))
    rows = data.draw(st.sampled_from(m))
    keys = rows if equal else data.draw(st.sampled_from([1, 16, 33, 65]))
    width, value_width = data.draw(st.sampled_from([(8, 8), (5, 7), (16, 3)]))
    seed = data.draw(seeds)
    q = randn(seed, b, heads_k * group, rows, width, dtype=dtype)
    k = randn(seed + 1, b, heads_k, keys, width, dtype=dtype)
    v = randn(seed + 2, b, heads_k, keys, value_width, dtype=dtype)
    return Call("attention", (q, k, v), options)


def bias_for(data, call: Call, length: int) -> Tensor | None:
    q = call.args[0]
    return randn(data.draw(seeds), q.shape[1], 2 * length - 1, dtype=q.dtype) if data.draw(st.booleans()) else None


def windows(data) -> dict:
    side = st.sampled_from([None, 0, 3, 20])
    return {"causal": data.draw(st.booleans()), "window": data.draw(st.tuples(side, side))}
