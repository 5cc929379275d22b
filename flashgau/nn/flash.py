"""The FLASH layer: a gated attention unit over chunks, linear in the length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contract.operands import mixed_chunk_options
from ..contract.validate import Arguments
from ..ops import MixedChunkState, mixed_chunk_attention, mixed_chunk_step
from ..ops.flash_unit import flash_unit, flash_unit_step, flash_unit_token, runs_whole, takes_tokens
from ..ops.projection import reads_raw_gate
from ..options import FlashWeights, Layout, MixedChunkOptions
from .gated_unit import GatedUnit, UnitOptions, UnitState, chosen, last_shifted, start_of
from .initialise import is_plain
from .kept import Turned
from .spread import Spread, check_spread, first_position

HEADS = ("quad_q", "quad_k", "lin_q", "lin_k")


@dataclass(frozen=True, kw_only=True)
class FlashPreset(UnitOptions):
    """What a preset of `FLASH` decides. The defaults are what the paper has.

    Attributes:
        lin_normalizer: what divides the linear part.
        head_order: which row of OffsetScale makes which head.
    """

    lin_normalizer: str | float = "tokens"
    head_order: Sequence[str] = HEADS


def flash_presets(key_dim: int, chunk_size: int, causal: bool) -> dict[str, FlashPreset]:
    """The presets of a FLASH layer with S = `key_dim` and C = `chunk_size`."""
    return {
        "paper": FlashPreset(bias="toeplitz", rotary_dim=key_dim),
        "lucidrains": FlashPreset(
            norm="layernorm",
            bias="t5",
            bias_scale=key_dim**0.5,
            rotary_dim=min(32, key_dim),
            rotary_interleaved=True,
            lin_normalizer=float(chunk_size) if causal else "tokens",
            head_order=("quad_q", "lin_q", "quad_k", "lin_k"),
        ),
    }


SPECS = tuple(flash_presets(1, 1, False))


class FLASH(GatedUnit):
    """FLASH: like `GAU`, with attention inside chunks and linear attention between them.

        [u, v, z]                    = silu(norm(x) W + b)          widths e, e, S
        quad_q, quad_k, lin_q, lin_k = RoPE(OffsetScale(z))
        y                            = x + mixed_chunk_attention(..., v, gate=u) W_o + b_o

    Time and memory are linear in the length, and a causal layer decodes with a state of constant size.
    Source: [GAU] Hua et al. 2022 (arXiv 2202.10447), section 3.

    Every argument from `norm` to `token_shift` that is None takes its value from the preset `spec`:

    | | "paper" | "lucidrains" (FLASH-pytorch's FLASH in its FLASHTransformer) |
    |---|---|---|
    | norm | scalenorm | layernorm |
    | bias (of a chunk) | toeplitz | t5, times sqrt(S) |
    | rotary_dim, rotary_interleaved | S, no | min(32, S), yes |
    | lin_normalizer | tokens | causal: C; else tokens |
    | head_order | quad_q, quad_k, lin_q, lin_k | quad_q, lin_q, quad_k, lin_k |

    with score relu2, biases, no post-norm and no token shift in both.

    Args:
        dim: d, width of input and output.
        spec: the preset.
        hidden: e, width of gate and value; None for 2 d.
        key_dim: S, width of queries and keys.
        chunk_size: C.
        causal: each token sees only itself and what came before.
        norm: "layernorm", "scalenorm", "scalenorm_clamped", "rmsnorm", "rms" (no parameters) or "none".
        post_norm: the same names, after the residual sum.
        bias: relative bias inside a chunk: "none", "toeplitz" (table), "rotary" (rank form) or "t5".
        bias_scale: factor of the T5 bias.
        rotary_dim: how many channels of the four heads RoPE turns; 0 for none.
        rotary_interleaved: RoPE pairs neighbours rather than halves.
        score: "relu2" or "laplace"; see `flashgau.mixed_chunk_attention`.
        lin_normalizer: what divides the linear part: "tokens" or a number.
        head_order: which row of OffsetScale makes which head.
        linear_bias: whether the projections and OffsetScale have biases.
        token_shift: half of the normalised channels come from the token before.
        residual: add x to the output.
        qk_dropout: dropout of the four heads while training.
        attention_fn: called in place of `flashgau.mixed_chunk_attention`, as that is, everything by name. Decoding
            asks it for a state (`return_state=True`).
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> import torch
        >>> layer = FLASH(64, key_dim=16, chunk_size=8, causal=True)
        >>> x = torch.randn(2, 20, 64)
        >>> y, state = layer(x[:, :19], return_state=True)
        >>> step, state = layer.step(x[:, 19:], state)
        >>> bool(torch.allclose(step, layer(x)[:, 19:], atol=1e-5))
        True
    """

    chunk_size: int
    lin_normalizer: str | float
    head_order: tuple[str, ...]
    turned: Turned

    def __init__(
        self,
        dim: int,
        *,
        spec: str = "paper",
        hidden: int | None = None,
        key_dim: int = 128,
        chunk_size: int = 256,
        causal: bool = False,
        norm: str | None = None,
        post_norm: str | None = None,
        bias: str | None = None,
        bias_scale: float | None = None,
        rotary_dim: int | None = None,
        rotary_interleaved: bool | None = None,
        score: str | None = None,
        lin_normalizer: str | float | None = None,
        head_order: Sequence[str] | None = None,
        linear_bias: bool | None = None,
        token_shift: bool | None = None,
        residual: bool = True,
        qk_dropout: float = 0.0,
        attention_fn: Callable[..., Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Each field of the preset is an argument of that name here.
        options = chosen("FLASH", flash_presets(key_dim, chunk_size, causal), spec, locals())
        order = options.head_order
        if sorted(order) != sorted(HEADS):
            raise ValueError(f"FLASH: `head_order` is {order}; expected an order of {', '.join(HEADS)}")
        args = Arguments("FLASH")
        mixed_chunk_options(args, chunk_size, options.score, options.lin_normalizer)
        args.function("attention_fn", attention_fn, "flashgau.mixed_chunk_attention")
        super().__init__(
            dim,
            4,
            options,
            hidden=hidden,
            key_dim=key_dim,
            causal=causal,
            max_length=chunk_size,
            residual=residual,
            qk_dropout=qk_dropout,
            device=device,
            dtype=dtype,
        )
        self.chunk_size, self.lin_normalizer, self.head_order = chunk_size, options.lin_normalizer, tuple(order)
        self.attention_fn = attention_fn
        self.turned = Turned()
        self._order = [self.head_order.index(name) for name in HEADS]

    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: UnitState[MixedChunkState] | None = None,
        return_state: bool = False,
        inplace: bool = False,
        spread: Spread | None = None,
    ) -> Any:
        """Apply the layer to a batch of sequences, or to the next part of sequences already begun.

        Args:
            x: (B, N, d). Padding may hold any finite number.
            lengths: (B,) valid tokens of each right-padded row.
            cu_seqlens: (G+1,) bounds of G sequences packed in one row (B = 1); chunks and positions restart in each.
            state: of the tokens before (causal layers); it is not changed, unless `inplace`.
            return_state: also give the state after the last valid token of each row.
            inplace: write `state`, which then is the state after, too. A token costs a fraction of the time; there are
                no gradients.
            spread: x is this process's slice of sequences that are spread over several processes
                (`flashgau.distributed.spread_tokens`); lengths and cu_seqlens speak of the whole.

        Returns:
            (B, N, d), or that and the state. Rows of padding hold x plus the output's bias.
        """
        self._check(x, cu_seqlens, state, return_state, MixedChunkState, inplace)
        recurrent = return_state or state is not None
        operation = self.attention_fn
        if spread is not None:
            check_spread("FLASH", spread, x, state=state, return_state=return_state, attention_fn=operation)
            operation = spread.mixed_chunk_attention
        dropped, own = self.qk_dropout and self.training, operation is not None
        plain = is_plain(self.to_hidden, self.to_out)
        whole = plain and not dropped and not own and runs_whole(x)
        one = lengths is None and x.shape[1] == 1 and not own
        if (
            state is not None
            and one
            and inplace
            and (whole or (plain and not dropped and takes_tokens(x, self.key_dim)))
        ):
            y = self._token(x, state, whole)
            return (y, state) if return_state else y
        start = first_position(spread) if state is None else start_of(state.memory.position)
        normed, moving, angles = self._prepare(x, start, cu_seqlens, None if state is None else state.previous, spread)
        options: dict[str, Any] = {
            "score": self.score,
            "lin_normalizer": self.lin_normalizer,
            "rel_bias": None if self.rel_bias is None else self.rel_bias(self.chunk_size),
        }
        memory: Any = None
        if whole and not recurrent:
            # All of it as one operator, which keeps nothing wide but x W + b and what u multiplies.
            y = flash_unit(
                normed,
                self._weights,
                residual=x if self.residual else None,
                angles=angles,
                layout=Layout(lengths, cu_seqlens),
                options=MixedChunkOptions(chunk_size=self.chunk_size, causal=self.causal, **options),
            )
        else:
            raw = not own and reads_raw_gate("mixed_chunk_attention", x, self.key_dim)
            gate, v, heads = self._heads(normed, angles, raw)
            options |= {**dict(zip(self.head_order, heads, strict=True)), "v": v, "gate": gate}
            options |= {"gate_activation": "silu"} if raw else {}
            before = None if state is None else state.memory
            result: Any
            if before is not None and one:  # in constant time
                result = mixed_chunk_step(state=before, inplace=inplace, **options)
            else:
                options |= {"initial_state": before, "return_state": True} if recurrent else {}
                result = (operation or mixed_chunk_attention)(
                    chunk_size=self.chunk_size,
                    causal=self.causal,
                    lengths=lengths,
                    cu_seqlens=cu_seqlens,
                    **options,
                )
            attended, memory = result if recurrent else (result, None)
            y = self._output(x, attended)
        y = self.post_norm(y)
        if not recurrent:
            return y
        previous = last_shifted(moving, lengths)
        after = state.advanced(memory, previous) if state is not None and inplace else UnitState(memory, previous)
        return (y, after) if return_state else y

    def _token(self, x: Tensor, state: UnitState[MixedChunkState], eager: bool) -> Tensor:
        """One more token (B, 1, d) of every row, by which the state is advanced in place.

        If not `eager`, in six launches of Triton's at most, but for a token shift and a norm at the end.
        """
        memory, rotary = state.memory, self.rotary
        normed, moving = self._normed(x, None, state.previous)
        residual = x if self.residual else None
        if eager:
            y, steps = flash_unit_step(
                normed,
                self._weights,
                residual=residual,
                angles=self._angles(x, start_of(memory.position), None),
                state=memory,
                options=self._options,
                held=state.steps,
                turned=self.turned.get(self.to_hidden.weight),
            )
            if steps is not None:
                state.steps = steps
        else:
            y = flash_unit_token(
                normed,
                self._weights,
                residual=residual,
                frequencies=None if rotary is None else rotary.rates(x, self.key_dim),
                interleaved=rotary is not None and rotary.interleaved,
                state=memory,
                options=self._options,
            )
        if moving is not None:
            state.advanced(memory, last_shifted(moving, None))
        return self.post_norm(y)

    @property
    def _options(self) -> MixedChunkOptions:
        """Those of a token."""
        bias = None if self.rel_bias is None else self.rel_bias(self.chunk_size)
        return MixedChunkOptions(self.chunk_size, self.score, True, None, self.lin_normalizer, bias)

    @property
    def _weights(self) -> FlashWeights:
        hidden, scale, out = self.to_hidden, self.offset_scale, self.to_out
        return FlashWeights(hidden.weight, hidden.bias, scale.gamma, scale.beta, out.weight, out.bias, self._order)
