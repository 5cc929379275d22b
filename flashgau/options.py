"""What travels together below the public functions: the layout of a batch, and what an operation is computed with.

Eager functions and launchers take these tuples; a decorated one takes their fields by name too:

    attention_forward(q, k, v, options=AttentionOptions(causal=True))
    attention_forward(q, k, v, causal=True)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, Optional

from torch import Tensor

Window = tuple[Optional[int], Optional[int]]
NumberOrRule = str | float  # a divisor, or the name of what is counted


class Layout(NamedTuple):
    """How tokens are cut into sequences: by padding, by packing, or not at all."""

    lengths: Optional[Tensor] = None  # (B,) valid tokens of each right-padded row
    cu_seqlens: Optional[Tensor] = None  # (G+1,) offsets of packed sequences
    cu_seqlens_k: Optional[Tensor] = None  # those of the keys, where they differ

    @property
    def is_dense(self) -> bool:
        """Whether every row of the batch is one sequence, without padding."""
        return self.lengths is None and self.cu_seqlens is None


class Pages(NamedTuple):
    """Which pages hold a sequence's keys and values, if these are (pages, Hkv, tokens of a page, .)."""

    block_table: Optional[Tensor] = None  # (B, or G packed sequences; pages of one) integers: which pages, in order
    leftpad: Optional[Tensor] = None  # (B or G,) integers: how many tokens of its pages come before its first key


class AttentionOptions(NamedTuple):
    """Of softmax attention: how a score becomes a probability."""

    scale: Optional[float] = None  # None: 1 / sqrt(D)
    causal: bool = False
    window: Window = (None, None)  # left and right of the query's position; None is unbounded
    softcap: Optional[float] = None
    rel_bias: Optional[Tensor] = None  # (B, Hq, 2P-1)
    sinks: Optional[Tensor] = None  # (Hq,)
    dropout_p: float = 0.0
    dropout_seed: Optional[Tensor] = None  # (1,) int64

    @property
    def factor(self) -> float:
        """The scale, of resolved options."""
        assert self.scale is not None
        return self.scale

    def resolved(self, width: int) -> AttentionOptions:
        """With the scale that None stands for, and the window that a causal mask closes."""
        scale = width**-0.5 if self.scale is None else float(self.scale)
        window = (self.window[0], 0) if self.causal else self.window
        return self._replace(scale=scale, causal=False, window=window)


class Gating(NamedTuple):
    """What multiplies the result of softmax attention."""

    gate: Tensor  # (B, Hq, M, E), or (B, Hq, M, 1)
    gate_activation: str = "sigmoid"


class AttentionResults(NamedTuple):
    """What the forward gives and the backward reads."""

    out: Tensor  # (B, Hq, M, E)
    lse: Tensor  # (B, Hq, M), fp32


class AttentionTangents(NamedTuple):
    """Tangents of what softmax attention is computed from; None is zero."""

    tq: Optional[Tensor] = None
    tk: Optional[Tensor] = None
    tv: Optional[Tensor] = None
    trel_bias: Optional[Tensor] = None
    tsinks: Optional[Tensor] = None


class AttentionAlong(NamedTuple):
    """Tangents of the results."""

    tout: Tensor  # (B, Hq, M, E)
    tlse: Tensor  # (B, Hq, M), fp32


class GatedTangents(NamedTuple):
    """Tangents of what gated attention is computed from; None is zero."""

    tq: Optional[Tensor] = None
    tk: Optional[Tensor] = None
    tv: Optional[Tensor] = None
    trel_bias: Optional[Tensor] = None


class GatedOptions(NamedTuple):
    """Of quadratic gated attention."""

    score: str = "relu2"
    normalizer: NumberOrRule = "keys"
    causal: bool = False
    rel_bias: Optional[Tensor] = None  # (B, 2P-1)
    gate_activation: str = "identity"


class MixedChunkHeads(NamedTuple):
    """Queries and keys of the local and of the global part, each (B, N, S)."""

    quad_q: Tensor
    quad_k: Tensor
    lin_q: Tensor
    lin_k: Tensor


class MixedChunkOptions(NamedTuple):
    """Of mixed chunk attention. `initial_kv` and `closed_tokens` continue causal sequences, whose chunks are closed."""

    chunk_size: int = 256
    score: str = "relu2"
    causal: bool = False
    quad_normalizer: Optional[float] = None  # None: C
    lin_normalizer: NumberOrRule = "tokens"
    rel_bias: Optional[Tensor] = None  # (B, 2P-1)
    initial_kv: Optional[Tensor] = None  # (G, S, E)
    closed_tokens: Optional[Tensor] = None  # (G,)
    gate_activation: str = "identity"

    @property
    def divisor(self) -> float:
        """Of the local scores."""
        return float(self.chunk_size if self.quad_normalizer is None else self.quad_normalizer)

    def kept_states(self, quad_q: Tensor, v: Tensor, layout: Layout) -> Optional[tuple[int, int, int]]:
        """The shape of the states that kernels keep for the backward; None where these would be larger than v.

        Not causal, a sequence has one, else each of its chunks; what is not kept is summed again.
        """
        (batch, n, e), s, ends = v.shape, quad_q.shape[-1], layout.cu_seqlens
        if not self.causal:
            return batch if ends is None else ends.shape[0] - 1, s, e
        if s > self.chunk_size:
            return None
        chunks = batch * -(-n // self.chunk_size) if ends is None else n // self.chunk_size + ends.shape[0] + 1
        return chunks, s, e


class MixedChunkSaved(NamedTuple):
    """What the forward of mixed chunk attention keeps for its backward."""

    product: Optional[Tensor] = None  # (B, N, E) what the gate multiplies; None without one
    chunk_states: Optional[Tensor] = None  # KV of every chunk, which the backward sums again if there is none


class OpenChunk(NamedTuple):
    """What causal sequences remember between two tokens: closed chunks as KV, keys and values of the open one."""

    kv: Tensor  # (B, S, E)
    open_quad_k: Tensor  # (B, C, S)
    open_lin_k: Tensor  # (B, C, S)
    open_v: Tensor  # (B, C, E)
    position: Tensor  # (B,) int64


class GluOptions(NamedTuple):
    """The activations of both sides of a gated linear unit."""

    activation: str = "silu"
    up_activation: str = "identity"


class GluWeights(NamedTuple):
    """The two linear layers of a gated linear unit, as in torch.nn.Linear."""

    w_gate: Tensor
    w_up: Tensor
    b_gate: Optional[Tensor] = None
    b_up: Optional[Tensor] = None


class NormOptions(NamedTuple):
    """Of a normalisation of rows."""

    kind: str = "layernorm"  # or "rms", without a mean
    eps: float = 1e-5
    clamp: bool = False  # of "rms": bounds its deviation from below by eps, instead of adding eps under the root


class ProjectionWeights(NamedTuple):
    """A gated unit's linear layer to [u, v, z], and OffsetScale."""

    weight: Tensor  # (2e + S, d)
    bias: Optional[Tensor]
    gamma: Tensor  # (H, S)
    beta: Optional[Tensor]
    raw_gate: bool = False  # u is before its silu, which is of whoever reads it


class Angles(NamedTuple):
    """Rotary embedding of the first channels, paired by halves or, if `interleaved`, with their neighbours."""

    cos: Optional[Tensor] = None  # (1 or B, N, pairs)
    sin: Optional[Tensor] = None
    interleaved: bool = False


class FlashWeights(NamedTuple):
    """The parameters of a FLASH layer, and which rows of gamma and beta make quad_q, quad_k, lin_q and lin_k."""

    w: Tensor  # (2e + S, d)
    b: Optional[Tensor]
    gamma: Tensor  # (4, S)
    beta: Optional[Tensor]
    w_out: Tensor  # (d, e)
    b_out: Optional[Tensor]
    order: list[int]


class TokenHeads(NamedTuple):
    """How z becomes the heads of a token of a FLASH layer: OffsetScale, RoPE's angles per token, of channels that are
    paired as `Angles` says, and which rows of gamma and beta make quad_q, quad_k, lin_q and lin_k."""

    gamma: Tensor  # (4, S)
    beta: Optional[Tensor]
    frequencies: Optional[Tensor]  # (pairs,) fp32
    interleaved: bool
    order: list[int]


class FlashSaved(NamedTuple):
    """What a FLASH layer keeps for its backward."""

    before: Tensor  # x W + b (B, N, 2e + S)
    products: Tensor  # what u multiplies (B, N, e)
    starts: Tensor  # states with which groups of chunks begin (count, S, e)


def takes_fields(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function that takes such tuples take their fields by name too."""
    parameters = inspect.signature(function).parameters
    kinds = {name: globals().get(str(p.annotation)) for name, p in parameters.items()}
    place = {field: name for name, kind in kinds.items() for field in getattr(kind, "_fields", ())}

    own = frozenset(parameters)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if own.issuperset(kwargs):
            return function(*args, **kwargs)
        given: dict[str, dict[str, Any]] = {}
        for field in kwargs.keys() - parameters.keys():
            if field not in place:
                names = ", ".join(dict.fromkeys([*parameters, *place]))
                raise TypeError(f"{function.__name__}: there is no argument `{field}`; expected some of {names}")
            given.setdefault(place[field], {})[field] = kwargs.pop(field)
        for name, fields in given.items():
            before = kwargs.get(name, parameters[name].default)
            kind: Any = kinds[name]
            kwargs[name] = before._replace(**fields) if isinstance(before, kind) else kind(**fields)
        return function(*args, **kwargs)

    return call
