"""The body of every language model: embedding, layers, final norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..contract.validate import Arguments, widened
from ..eager.mixed_chunk import close_
from ..nn import (
    FLASH,
    GAU,
    FeedForward,
    GatedFeedForward,
    KeyValueCache,
    MultiHeadAttention,
    MultiHeadMixedChunk,
    ScaledSinusoidal,
    Spread,
)
from ..nn.initialise import embedding
from ..nn.norms import make_norm
from ..nn.rotary import packed_positions
from ..nn.spread import check_spread, checked, first_position
from ..ops import MixedChunkState
from ..ops.state import destination, moved
from ..options import OpenChunk
from .config import ModelConfig


@dataclass
class ModelState:
    """What a causal model remembers of a prefix.

    Attributes:
        layers: the state of each layer. "flash" and "mc-tfm++": of constant size, and not changed by use, but with
            `inplace`. The other kinds: key/value caches, which grow with the prefix and are written in place.
        position: (B,) int64, tokens so far.
    """

    layers: list[Any]
    position: Tensor

    def to(
        self, device: torch.device | str | int | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> ModelState:
        """The state on another device or in another floating type, which may come first as with tensors.

        Caches are copied, so that the two can be continued apart.
        """
        device, dtype = destination("ModelState.to", device, dtype)
        return ModelState([layer.to(device, dtype) for layer in self.layers], moved(self.position, device, None))

    def clone(self) -> ModelState:
        """A state of its own with the same values: to continue twice from one prefix, in place."""
        return ModelState([layer.clone() for layer in self.layers], self.position.clone())

    def reserve(self, tokens: int) -> None:
        """Room in the caches for so many tokens of a row in all: until then nothing is copied."""
        for layer in self.layers:
            memory = getattr(layer, "memory", layer)
            if isinstance(memory, KeyValueCache):
                memory.reserve(tokens)

    def reorder(self, index: Tensor) -> None:
        """Let each row continue from row index[b] (B,) instead, in place: for beam search."""
        index = widened(index)
        if index.shape != self.position.shape or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(
                f"reorder: `index` has shape {tuple(index.shape)} and dtype {index.dtype}; "
                f"expected {tuple(self.position.shape)} integers, a row for each"
            )
        for layer in self.layers:
            heads = layer.rows // max(1, len(index))  # that have rows of their own
            layer.reorder((index[:, None] * heads + torch.arange(heads, device=index.device)).flatten())
        self.position.copy_(self.position[index])

    def truncate(self, tokens: int) -> None:
        """Take back the last `tokens` tokens of every row, in place: guesses that were wrong, say.

        Raises:
            ValueError: where a layer cannot: of constant state as many as are in the open chunk are kept, and of a
                layer with token shift none. Nothing is written then.
        """
        cut = [layer.truncate(tokens) for layer in self.layers]
        for layer, shorter in zip(self.layers, cut, strict=True):
            layer.copy_(shorter)
        self.position -= tokens

    def close(self) -> None:
        """Close in place the chunks that a token inside `flashgau.eager.mixed_chunk.closing_later` has filled."""
        for layer in self.layers:
            memory = getattr(layer, "memory", layer)
            if isinstance(memory, MixedChunkState):
                close_(OpenChunk(*memory.tensors()))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)).

    Args:
        config: the model, of kind "transformer", "transformer++" or "mc-tfm++".
        causal: each token sees only itself and what came before.
        factory: device and dtype.
    """

    attention_norm: nn.Module
    feedforward_norm: nn.Module

    def __init__(self, config: ModelConfig, causal: bool, **factory: Any) -> None:
        super().__init__()
        plain = config.kind == "transformer"
        options: dict[str, Any] = {"kv_heads": config.kv_heads}
        if plain:
            options |= {"rotary_dim": 0}
        if config.kind == "mc-tfm++":
            options |= {"chunk_size": config.chunk_size}
        mixer = MultiHeadMixedChunk if config.kind == "mc-tfm++" else MultiHeadAttention
        self.attention_norm = make_norm(config.norm, config.dim, **factory)
        # Apart, so that `layer` cannot decide them: a model out of a file is put where its caller says.
        own = {"causal": causal, **factory}
        self.attention: Any = mixer(config.dim, config.heads, **(options | config.layer), **own)
        self.feedforward_norm = make_norm(config.norm, config.dim, **factory)
        self.feedforward: nn.Module
        if plain:
            activation = config.feedforward or "gelu"
            self.feedforward = FeedForward(config.dim, config.hidden, activation, **factory)
        else:
            variant = config.feedforward or "swiglu"
            self.feedforward = GatedFeedForward(config.dim, config.hidden, variant, **factory)

    def forward(self, x: Tensor, **options: Any) -> Any:
        """x (B, N, d) -> (B, N, d); options, and a state with `return_state=True`, as of the attention layer."""
        result = self.attention(self.attention_norm(x), **options)
        out, state = result if options.get("return_state") else (result, None)
        x = x + out
        x = x + self.feedforward(self.feedforward_norm(x))
        return (x, state) if options.get("return_state") else x

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next token: x (B, 1, d) -> (B, 1, d), and the state."""
        y, after = self(x, state=state, return_state=True)
        return y, after


def make_layer(config: ModelConfig, causal: bool, **factory: Any) -> nn.Module:
    """One layer of the stack: a FLASH or GAU layer, or a transformer block."""
    if config.kind == "flash":
        return FLASH(
            config.dim,
            spec=config.spec,
            hidden=config.hidden,
            key_dim=config.key_dim,
            chunk_size=config.chunk_size,
            causal=causal,
            **config.layer,
            **factory,
        )
    if config.kind == "flash-quad":
        # Dividing by the keys of the row makes a prefix independent of what follows, so that it can be decoded.
        decodable = {"normalizer": "row"} if causal and config.spec == "paper" else {}
        return GAU(
            config.dim,
            spec=config.spec,
            hidden=config.hidden,
            key_dim=config.key_dim,
            causal=causal,
            **(decodable | config.layer),
            **factory,
        )
    return TransformerBlock(config, causal, **factory)


class Stack(nn.Module):
    """Embedding (+ absolute positions, norm), layers, final norm: tokens (B, N) -> (B, N, d).

    Args:
        config: the model.
        causal: each token sees only itself and what came before.
        factory: device and dtype.
    """

    embedding: nn.Embedding
    embedding_norm: nn.Module
    layers: nn.ModuleList
    norm: nn.Module

    def __init__(self, config: ModelConfig, causal: bool, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding(config.vocab_size, config.dim, **factory)
        default = "scaled_sin" if config.kind == "transformer" else "none"
        absolute = (config.positions or default) == "scaled_sin"
        self.positions: nn.Module | None = ScaledSinusoidal(config.dim, **factory) if absolute else None
        self.embedding_norm = make_norm(config.embedding_norm, config.dim, **factory)
        self.layers = nn.ModuleList(make_layer(config, causal, **factory) for _ in range(config.depth))
        self.norm = make_norm(config.norm, config.dim, **factory)

    def forward(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: ModelState | None = None,
        return_state: bool = False,
        inplace: bool = False,
        spread: Spread | None = None,
    ) -> tuple[Tensor, ModelState | None]:
        """Tokens (B, N) -> hidden (B, N, d), and the state after them if asked for: `state`, if written `inplace`.

        With `spread` the tokens are this process's slice; lengths and cu_seqlens speak of the whole.
        """
        if spread is not None:
            check_spread("model", spread, tokens, state=state, return_state=return_state)
        tokens, lengths = checked(spread, lambda: self._check(tokens, lengths, state, spread))
        if inplace and state is None:
            raise ValueError("model: `inplace` is True without a `state`, which it would write")
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(self._positions(tokens, cu_seqlens, state, first_position(spread)))
        x = self.embedding_norm(x)
        states: list[Any] = []
        given: dict[str, Any] = {"lengths": lengths, "cu_seqlens": cu_seqlens}
        given |= {} if spread is None else {"spread": spread}
        recompute = self.config.checkpointing and self.training and torch.is_grad_enabled()
        layers: list[Any] = list(self.layers)
        for i, layer in enumerate(layers):
            if return_state or state is not None:
                before = None if state is None else state.layers[i]
                # A call for one token, too: what has hooked itself to a layer (FSDP2, say) sees calls, not `step`.
                x, after = layer(x, lengths=lengths, state=before, return_state=True, inplace=inplace)
                states.append(after)
            elif recompute:
                x = checkpoint(layer, x, **given, use_reentrant=False)
            else:
                x = layer(x, **given)
        if state is not None and inplace:
            state.position += tokens.shape[1] if lengths is None else lengths
            return self.norm(x), state
        return self.norm(x), self._state(states, tokens, lengths, state) if return_state else None

    def forget_copies(self) -> None:
        """Free what layers keep of their weights, and see what was written to these unnoticed."""
        for module in self.modules():
            if isinstance(module, FLASH):
                module.turned.forget()

    @staticmethod
    def _positions(tokens: Tensor, cu_seqlens: Tensor | None, state: ModelState | None, start: int) -> Tensor:
        if cu_seqlens is not None:
            return packed_positions(tokens.shape[1], cu_seqlens, start)
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        return positions if state is None else positions + state.position[:, None]

    @staticmethod
    def _state(states: list[Any], tokens: Tensor, lengths: Tensor | None, before: ModelState | None) -> ModelState:
        batch, n = tokens.shape
        if lengths is None:
            position = torch.full((batch,), n, device=tokens.device)
        else:
            position = lengths.to(torch.int64, copy=True)  # a state may be written
        return ModelState(states, position if before is None else before.position + position)

    def _check(
        self, tokens: Tensor, lengths: Tensor | None, state: ModelState | None, spread: Spread | None
    ) -> tuple[Tensor, Tensor | None]:
        """Refuse what is no text, and return tokens and lengths in types that can be computed with."""
        if tokens.ndim != 2:
            raise ValueError(f"model: `tokens` has shape {tuple(tokens.shape)}; expected (B, N)")
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TypeError(f"model: `tokens` has dtype {tokens.dtype}; expected an integer type")
        tokens = widened(tokens)
        # Looking at the values would make a GPU wait, and there the embedding reports them itself.
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"model: `tokens` has values from {low} to {high}; expected 0 to {self.config.vocab_size - 1}"
                )
        if state is not None:
            self._check_state(tokens, state)
        whole = tokens if spread is None else tokens.new_zeros(()).expand(len(tokens), spread.total)
        return tokens, valid_lengths("model", lengths, whole)

    def _check_state(self, tokens: Tensor, state: ModelState) -> None:
        if not isinstance(state, ModelState):
            raise TypeError(f"model: `state` is a {type(state).__name__}; expected a ModelState")
        if len(state.layers) != len(self.layers):
            raise ValueError(f"model: `state` has {len(state.layers)} layers; expected {len(self.layers)}")
        position, rows = state.position, tokens.shape[:1]
        if position.shape != rows or position.dtype != torch.int64 or position.device != tokens.device:
            raise ValueError(
                f"model: `state.position` has shape {tuple(position.shape)}, {position.dtype}, on {position.device}; "
                f"expected {tuple(rows)}, torch.int64, on {tokens.device}"
            )


def valid_lengths(caller: str, lengths: Tensor | None, tokens: Tensor, low: int = 0) -> Tensor | None:
    """`lengths` (B,), integers of any type from `low` to N for tokens (B, N), in one that can be computed with."""
    if lengths is None:
        return None
    args = Arguments(caller)
    args.shaped("tokens", tokens, "B N")
    args.counts("lengths", lengths, low)
    return widened(lengths)
