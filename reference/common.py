"""What the naive operations share: widening, cutting sequences out, the Toeplitz bias, masks and softmax."""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class Widened(Protocol[P, R]):
    """A function under `upcast`; `__wrapped__` is the formula without it, in the dtype of its input."""

    __wrapped__: Callable[P, R]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Compute with half-precision tensors widened to fp32."""
        ...


def upcast(formula: Callable[P, R]) -> Widened[P, R]:
    """Let a formula accumulate in fp32 when its tensors are fp16 or bf16; fp32 and fp64 stay as they are.

    The result returns in the dtype of the first argument, except what is a running sum by nature: the LSE
    of attention and the KV sum of a mixed chunk state stay wide.
    """
    signature = inspect.signature(formula)

    @functools.wraps(formula)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Any:
        call = signature.bind(*args, **kwargs)
        first = next(iter(call.arguments.values()))
        for name, value in call.arguments.items():
            call.arguments[name] = _widen(value)
        with torch.autocast(first.device.type, enabled=False):
            result = formula(*call.args, **call.kwargs)
        return _narrow(result, first.dtype)

    return cast(Widened[P, R], wrapper)


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _widen(getattr(value, f.name)) for f in fields(value)})
    return value


def _narrow(result: Any, dtype: torch.dtype) -> Any:
    if isinstance(result, Tensor):
        return result.to(dtype)
    out, extra = result
    if is_dataclass(extra) and not isinstance(extra, type):
        open_chunk = {name: getattr(extra, name).to(dtype) for name in ("quad_k", "lin_k", "v")}
        extra = replace(extra, **open_chunk)
    return out.to(dtype), extra


@dataclass(frozen=True)
class Sequence:
    """Where one sequence lies: its batch row, its own number, and its valid queries and keys."""

    row: int
    number: int
    queries: slice
    keys: slice


def sequences(
    batch: int,
    n_queries: int,
    n_keys: int,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> list[Sequence]:
    """List the sequences of a batch, so that each can be cut out and computed alone.

    Computing each sequence alone is what "padding and packing are exact" means; it also keeps the content of
    the padding, NaN included, out of every result and every gradient.
    """
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        ends_k = ends if cu_seqlens_k is None else cu_seqlens_k.tolist()
        return [
            Sequence(0, g, slice(ends[g], ends[g + 1]), slice(ends_k[g], ends_k[g + 1])) for g in range(len(ends) - 1)
        ]
    if lengths is None:
        return [Sequence(b, b, slice(0, n_queries), slice(0, n_keys)) for b in range(batch)]
    # With as many queries as keys they are the same tokens, so the queries are padded too.
    return [
        Sequence(b, b, slice(0, n if n_queries == n_keys else n_queries), slice(0, n))
        for b, n in enumerate(lengths.tolist())
    ]


def blank(shape: tuple[int, ...], value: float, *inputs: Tensor | None) -> Tensor:
    """Make a constant tensor that still depends on `inputs` (with zero gradient, whatever they hold)."""
    given = [x for x in inputs if x is not None]
    nothing = sum((x.flatten()[:0].sum() for x in given), given[0].new_zeros(()))
    return given[0].new_full(shape, value) + nothing


def assemble(empty: Tensor, places: list[Sequence], pieces: list[Tensor], dim: int) -> Tensor:
    """Put the sequences' results end to end in their batch rows; `empty` fills the rows of padding."""
    if empty.shape[0] == 0:
        return empty
    rows = []
    for b in range(empty.shape[0]):
        mine = [piece for place, piece in zip(places, pieces, strict=True) if place.row == b]
        first = min((place.queries.start for place in places if place.row == b), default=0)
        end = first + sum(piece.shape[dim] for piece in mine)
        before, behind = empty[b].narrow(dim, 0, first), empty[b].narrow(dim, end, empty[b].shape[dim] - end)
        rows.append(torch.cat([before, *mine, behind], dim=dim))
    return torch.stack(rows)


def toeplitz(bias: Tensor, n_queries: int, n_keys: int) -> Tensor:
    """Spread a relative bias (..., 2P-1) into the matrix (..., M, N) of bias[P-1 + (j - p)]; p as below."""
    reach = (bias.shape[-1] + 1) // 2
    if reach < max(n_queries, n_keys):
        raise ValueError(
            f"`rel_bias` has {bias.shape[-1]} entries, for distances up to {reach - 1}; "
            f"a sequence of {max(n_queries, n_keys)} tokens needs {2 * max(n_queries, n_keys) - 1}"
        )
    return bias[..., reach - 1 + distance(n_queries, n_keys, bias.device)]


def distance(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Give the matrix (M, N) of j - p, from the position p = i + N - M of query i to key j."""
    p = torch.arange(n_queries, device=device) + n_keys - n_queries
    j = torch.arange(n_keys, device=device)
    return j[None, :] - p[:, None]


def visible_keys(
    n_queries: int,
    n_keys: int,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    device: torch.device,
) -> Tensor:
    """Give the matrix (M, N) that is true where the query may see the key."""
    left, right = window if window is not None else (None, None)
    t = distance(n_queries, n_keys, device)
    visible = torch.ones_like(t, dtype=torch.bool)
    if causal:
        visible = visible & (t <= 0)
    if left is not None:
        visible = visible & (t >= -left)
    if right is not None:
        visible = visible & (t <= right)
    return visible


def masked_softmax(scores: Tensor, visible: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Take the softmax over the visible keys, and its log of the sum of exponentials (LSE).

    A sink is a logit without a value: one more column that only the denominator sees. Where no sink is given
    the column is -inf, so that every row has a maximum. A row that sees nothing has weights 0, LSE -inf.

    Args:
        scores: (..., M, N).
        visible: (M, N), true where the query sees the key.
        sinks: broadcastable to (..., M, 1), or None.

    Returns:
        The weights (..., M, N) and the LSE (..., M).
    """
    masked = scores.masked_fill(~visible, -math.inf)
    column = masked.new_full((), -math.inf) if sinks is None else sinks.to(masked.dtype)
    logits = torch.cat([masked, column.expand(*masked.shape[:-1], 1)], dim=-1)
    # The pivot cancels exactly, so it needs no gradient; it must be finite, or -inf - (-inf) would be NaN.
    top = logits.detach().amax(dim=-1, keepdim=True)
    pivot = torch.where(top == -math.inf, 0.0, top)
    weights = torch.exp(logits - pivot)
    total = weights.sum(dim=-1, keepdim=True)
    nothing = total == 0
    safe = torch.where(nothing, 1.0, total)
    lse = torch.where(nothing, -math.inf, pivot + torch.log(safe))
    return weights[..., :-1] / safe, lse.squeeze(-1)


# [MEGA] section 3.5: the Laplace function, which meets relu(x)^2 in value and slope at x = mu = sqrt(1/2).
LAPLACE_MEAN = math.sqrt(1 / 2)
LAPLACE_STD = math.sqrt(1 / (4 * math.pi))


def elementwise_score(x: Tensor, score: str) -> Tensor:
    """Apply the score of gated attention, "relu2" or "laplace", to scaled and biased products."""
    if score == "relu2":
        return torch.relu(x).square()
    if score == "laplace":
        z = (x - LAPLACE_MEAN) / (LAPLACE_STD * math.sqrt(2))
        # The same number; 1 + erf cancels for small scores, and fp64 is what every other type is measured by.
        return torch.special.erfc(-z) / 2 if z.dtype == torch.float64 else (1 + torch.erf(z)) / 2
    raise ValueError(f'`score` is {score!r}; expected "relu2" or "laplace"')
