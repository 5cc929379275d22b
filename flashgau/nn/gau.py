"""The Gated Attention Unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract.operands import gau_options
from ..contract.validate import Arguments
from ..ops import gau_attention
from ..ops.projection import projection, reads_raw_gate
from .biases import bias_vector
from .cache import KeyValueCache, check_memory
from .gated_unit import GatedUnit, UnitOptions, UnitState, chosen, last_shifted
from .initialise import is_plain
from .spread import Spread, check_spread, first_position


@dataclass(frozen=True, kw_only=True)
class GauPreset(UnitOptions):
    """What a preset of `GAU` decides. The defaults are what the paper has.

    Attributes:
        bias_over_n: divide the bias by n too, like q k^T.
        normalizer: n of the scores "relu2" and "laplace".
    """

    bias_over_n: bool = False
    normalizer: str | float = "keys"


def gau_presets(dim: int, key_dim: int) -> dict[str, GauPreset]:
    """The presets of a GAU with d = `dim` and S = `key_dim`."""
    return {
        "paper": GauPreset(bias="rotary", rotary_dim=key_dim),
        "lucidrains": GauPreset(norm="layernorm", bias="t5", bias_scale=dim**0.5, bias_over_n=True, rotary_dim=0),
        "gau-alpha": GauPreset(
            norm="none",
            post_norm="rms",
            bias="none",
            rotary_dim=key_dim,
            rotary_interleaved=True,
            score="softmax_plus",
            linear_bias=False,
        ),
    }


class ContextState(UnitState[KeyValueCache]):
    """The keys and values of a context, made once: what a `GAU` that attends to one keeps while it decodes.

    The layer's own tokens leave nothing behind in it.
    """

    def truncate(self, tokens: int) -> UnitState[KeyValueCache]:
        """The state itself: the context is what it is, however many tokens have looked at it."""
        return self


SPECS = tuple(gau_presets(1, 1))


class GAU(GatedUnit):
    """Gated Attention Unit: attention and feed-forward layer in one, with a single head and a wide gated value.

        [u, v, z] = silu(norm(x) W + b)          widths e, e, S
        q, k      = RoPE(OffsetScale(z))
        y         = x + gau_attention(q, k, v, gate=u) W_o + b_o

    Two GAUs replace one attention and one feed-forward layer. Parameters: about 3 d e + d S.
    Source: [GAU] Hua et al. 2022 (arXiv 2202.10447), section 2.2 and code 1.

    Every argument from `norm` to `token_shift` that is None takes its value from the preset `spec`:

    | | "paper" | "lucidrains" (FLASH-pytorch's GAU) | "gau-alpha" (Su's encoder) |
    |---|---|---|---|
    | norm, post_norm | scalenorm, none | layernorm, none | none, rms |
    | bias | rotary | t5, times sqrt(d), divided by n | none |
    | rotary_dim, rotary_interleaved | S, no | 0 | S, yes |
    | score | relu2 | relu2 | softmax_plus |
    | linear_bias | yes | yes | no |

    with normalizer "keys" and no token shift in all three.

    Args:
        dim: d, width of input and output.
        spec: the preset.
        hidden: e, width of gate and value; None for 2 d.
        key_dim: S, width of query and key.
        causal: each token sees only itself and what came before.
        max_length: longest sequence; needed by `bias="toeplitz"` only.
        norm: "layernorm", "scalenorm", "scalenorm_clamped", "rmsnorm", "rms" (no parameters) or "none".
        post_norm: the same names, after the residual sum.
        bias: relative bias: "none", "toeplitz" (table), "rotary" (rank form) or "t5".
        bias_scale: factor of the T5 bias.
        bias_over_n: divide the bias by n too, like q k^T.
        rotary_dim: how many channels of q and k RoPE turns; 0 for none.
        rotary_interleaved: RoPE pairs neighbours rather than halves.
        score: "relu2", "laplace", "softmax" or "softmax_plus"; see `flashgau.gau_attention`.
        normalizer: n of the first two: "keys", "row" or a number. Decoding needs "row" or a number.
        linear_bias: whether the projections and OffsetScale have biases.
        token_shift: half of the normalised channels come from the token before.
        residual: add x to the output.
        qk_dropout: dropout of q and k while training.
        attention_fn: called in place of `flashgau.gau_attention`, as that is: q, k, v, gate, and score, normalizer,
            causal, rel_bias, lengths and cu_seqlens by name.
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> import torch
        >>> layer = GAU(64, key_dim=16, causal=True, normalizer="row")
        >>> x = torch.randn(2, 10, 64)
        >>> y, state = layer(x[:, :9], return_state=True)
        >>> step, state = layer.step(x[:, 9:], state)
        >>> bool(torch.allclose(step, layer(x)[:, 9:], atol=1e-5))
        True
    """

    normalizer: str | float
    bias_over_n: bool

    def __init__(
        self,
        dim: int,
        *,
        spec: str = "paper",
        hidden: int | None = None,
        key_dim: int = 128,
        causal: bool = False,
        max_length: int | None = None,
        norm: str | None = None,
        post_norm: str | None = None,
        bias: str | None = None,
        bias_scale: float | None = None,
        bias_over_n: bool | None = None,
        rotary_dim: int | None = None,
        rotary_interleaved: bool | None = None,
        score: str | None = None,
        normalizer: str | float | None = None,
        linear_bias: bool | None = None,
        token_shift: bool | None = None,
        residual: bool = True,
        qk_dropout: float = 0.0,
        attention_fn: Callable[..., Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Each field of the preset is an argument of that name here.
        options = chosen("GAU", gau_presets(dim, key_dim), spec, locals())
        args = Arguments("GAU")
        gau_options(args, options.score, options.normalizer)
        args.flag("bias_over_n", options.bias_over_n)
        args.function("attention_fn", attention_fn, "flashgau.gau_attention")
        if options.bias_over_n and options.normalizer == "row":
            raise ValueError('GAU: `bias_over_n` with normalizer "row"; expected "keys" or a number')
        super().__init__(
            dim,
            2,
            options,
            hidden=hidden,
            key_dim=key_dim,
            causal=causal,
            max_length=max_length,
            residual=residual,
            qk_dropout=qk_dropout,
            device=device,
            dtype=dtype,
        )
        self.normalizer, self.bias_over_n = options.normalizer, options.bias_over_n
        self.attention_fn: Callable[..., Tensor] = gau_attention if attention_fn is None else attention_fn

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        context_lengths: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: UnitState[KeyValueCache] | None = None,
        return_state: bool = False,
        inplace: bool = False,
        spread: Spread | None = None,
    ) -> Any:
        """Apply the layer to a batch of sequences, or to the next part of sequences already begun.

        With a context the layer is cross attention: gate and queries come from x, keys and values from the context
        through the same weights, and every token sees the whole context. Places of two sequences have no distance, so
        the layer must have been made with `causal=False, bias="none", rotary_dim=0, token_shift=False`.

        Args:
            x: (B, N, d). Padding may hold any finite number.
            context: (B, L, d), what to look at: it is normalised like x. Its padding may hold any finite number.
            context_lengths: (B,) valid tokens of each right-padded row of the context.
            lengths: (B,) valid tokens of each right-padded row. Without a state only.
            cu_seqlens: (G+1,) bounds of G sequences packed in one row (B = 1).
            state: of the tokens before (causal layers). Its cache is written in place: use it without gradients. Or
                that of a context, which then is not given again.
            return_state: also give the state after the last valid token, or that of the context.
            inplace: let `state` itself be the state after. (Its cache is written in any case.)
            spread: x is this process's slice of sequences that are spread over several processes
                (`flashgau.distributed.spread_tokens`); lengths and cu_seqlens speak of the whole.

        Returns:
            (B, N, d), or that and the state. Rows of padding hold x plus the output's bias.
        """
        operation = self.attention_fn
        if spread is not None:
            own = None if operation is gau_attention else operation
            check_spread("GAU", spread, x, context=context, state=state, return_state=return_state, attention_fn=own)
            operation = spread.gau_attention
        if context is not None or isinstance(state, ContextState):
            seen = self._context(x, context, context_lengths, cu_seqlens, state)
            y = self._look_at(x, seen.memory, lengths)
            return (y, seen) if return_state else y
        if context_lengths is not None:
            raise ValueError("GAU: `context_lengths` without a `context`")
        self._check(x, cu_seqlens, state, return_state, KeyValueCache, inplace)
        if (return_state or state is not None) and self.normalizer == "keys" and self.score in ("relu2", "laplace"):
            raise ValueError(
                'GAU: normalizer "keys" divides by the full length, so no prefix has a state; use "row" or a number'
            )
        if state is not None and lengths is not None:
            raise ValueError("GAU: `lengths` and `state` together; a state already knows the length of each row")
        start: int | Tensor = first_position(spread) if state is None else state.memory.start
        normed, moving, angles = self._prepare(x, start, cu_seqlens, None if state is None else state.previous, spread)
        raw = operation is gau_attention and reads_raw_gate("gau_attention", x, self.key_dim)
        gate, v, (q, k) = self._heads(normed, angles, raw)
        memory: Any = None
        valid = lengths
        if state is not None:
            memory = state.memory
            memory.append(k.unsqueeze(1), v.unsqueeze(1))
            k, v, valid = memory.keys[:, 0], memory.values[:, 0], memory.lengths
        elif return_state:
            memory = KeyValueCache(k.unsqueeze(1), v.unsqueeze(1), lengths)
        out = operation(
            q,
            k,
            v,
            gate,
            score=self.score,
            normalizer=self.normalizer,
            causal=self.causal,
            rel_bias=self._bias(k.shape[1] if spread is None else spread.total, valid, cu_seqlens),
            lengths=valid,
            cu_seqlens=cu_seqlens,
            **({"gate_activation": "silu"} if raw else {}),
        )
        y = self.post_norm(self._output(x, out))
        if state is None and not return_state:
            return y
        previous = last_shifted(moving, lengths)
        after = state.advanced(memory, previous) if state is not None and inplace else UnitState(memory, previous)
        return (y, after) if return_state else y

    def _context(
        self,
        x: Tensor,
        context: Tensor | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        state: UnitState[KeyValueCache] | None,
    ) -> ContextState:
        """The keys and values to look at: those of `state`, or made from `context`. Refuses what has no meaning."""
        for name in ("causal", "token_shift"):
            if getattr(self, name):
                raise ValueError(f"GAU: `context` in a layer made with `{name}=True`; expected False")
        if self.rel_bias is not None or self.rotary is not None:
            name, wanted = ("bias", '"none"') if self.rel_bias is not None else ("rotary_dim", "0")
            raise ValueError(
                f"GAU: `context` in a layer with positions, which two sequences do not share; expected {name}={wanted}"
            )
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"GAU: `x` has shape {tuple(x.shape)}; expected (B, N, {self.dim})")
        if cu_seqlens is not None:
            raise ValueError("GAU: `cu_seqlens` and a context together; give each sequence a row and `lengths`")
        if state is not None:
            if context is not None or lengths is not None:
                given = "context" if context is not None else "context_lengths"
                raise ValueError(f"GAU: `{given}` and `state` together; a state has the context's keys and values")
            check_memory("GAU", "state.memory", state.memory, KeyValueCache, x.shape[0], x)
            assert isinstance(state, ContextState)
            return state
        assert context is not None
        if not is_plain(self.to_hidden):
            kind = type(self.to_hidden).__name__
            raise ValueError(f"GAU: `context` in a layer whose `to_hidden` is a {kind}; expected a torch.nn.Linear")
        if context.ndim != 3 or context.shape[::2] != x.shape[::2]:
            raise ValueError(
                f"GAU: `context` has shape {tuple(context.shape)}; expected ({x.shape[0]}, L, {self.dim}), as `x` has "
                f"{x.shape[0]} rows"
            )
        if lengths is not None:
            args = Arguments("GAU")
            args.tensor("context", context, "B N d")
            args.counts("context_lengths", lengths)
        w, b = self.to_hidden.weight[self.hidden :], self.to_hidden.bias
        v, z = F.silu(projection(self.norm(context), w, None if b is None else b[self.hidden :])).split(
            (self.hidden, self.key_dim), -1
        )
        return ContextState(KeyValueCache(self._head(z, 1)[:, None], v[:, None], lengths))

    def _look_at(self, x: Tensor, context: KeyValueCache, lengths: Tensor | None) -> Tensor:
        """The layer's output for x (B, M, d), every token of which sees all keys of the context."""
        k, v, valid = context.keys[:, 0], context.values[:, 0], context.lengths
        if valid is not None and k.shape[1] == x.shape[1]:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))  # or they would be the queries' lengths as well
        normed, e = self.norm(x), self.hidden
        w, b = self.to_hidden.weight, self.to_hidden.bias
        gate, z = (
            projection(normed, w[part], None if b is None else b[part]) for part in (slice(e), slice(2 * e, None))
        )
        raw = self.attention_fn is gau_attention and reads_raw_gate("gau_attention", x, self.key_dim)
        gate = gate if raw else F.silu(gate)
        if lengths is not None:
            args = Arguments("GAU")
            args.tensor("x", x, "B N d")
            args.counts("lengths", lengths)
            padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
            gate = gate.masked_fill(padding[..., None], 0.0)  # as its silu
        out = self.attention_fn(
            self._head(F.silu(z), 0), k, v, gate, score=self.score, normalizer=self.normalizer, causal=False,
            rel_bias=None, lengths=valid, cu_seqlens=None, **({"gate_activation": "silu"} if raw else {}),
        )  # fmt: skip
        return self.post_norm(self._output(x, out))

    def _head(self, z: Tensor, place: int) -> Tensor:
        """Queries (0) or keys (1) of z (B, N, S)."""
        head = self.offset_scale(z)[:, place]
        return F.dropout(head, self.qk_dropout, self.training) if self.qk_dropout else head

    def _bias(self, length: int, lengths: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
        bias = bias_vector(self.rel_bias, length, cu_seqlens)
        if bias is None or not self.bias_over_n:
            return bias
        if self.normalizer != "keys":
            return bias / float(self.normalizer)
        if cu_seqlens is not None:
            raise ValueError(
                "GAU: `bias_over_n` with packed sequences, which have one bias but a length each; "
                "use `lengths`, or a number as `normalizer`"
            )
        if lengths is None:
            return bias / max(length, 1)
        return bias / lengths.clamp(min=1).unsqueeze(-1).to(bias.dtype)
