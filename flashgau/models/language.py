"""Causal and masked language models over one stack."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract.validate import widened
from ..eager.mixed_chunk import closing_later
from ..nn import Spread
from ..nn.initialise import STD
from ..nn.spread import check_spread
from .config import CONSTANT_STATE, ModelConfig
from .files import read_model, write_model
from .sampling import sample, seeded
from .stack import ModelState, Stack, valid_lengths

IGNORE = -100  # a target that does not count


class Model(nn.Module):
    """Base of all models: a configuration and its stack.

    Args:
        config: a `ModelConfig`, or its name ("flash-small").
        causal: each token sees only itself and what came before.
        device: where the parameters live.
        dtype: their type.
    """

    config: ModelConfig
    stack: Stack

    def __init__(
        self,
        config: ModelConfig | str,
        causal: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.config = ModelConfig.named(config) if isinstance(config, str) else config
        self.stack = Stack(self.config, causal, device=device, dtype=dtype)

    def num_parameters(self) -> int:
        """How many numbers are learned; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write weights and configuration to one safetensors file, which `flashgau.models.load` reads.

        The file appears under its name when it is complete, and any reader of safetensors can open it.

        Args:
            path: the file.
            overwrite: replace an existing file; otherwise it is left alone.

        Raises:
            FileExistsError: there is a file, and `overwrite` is False.
            OSError: it cannot be written, for example on a full disk; an existing file is then intact.
        """
        write_model(path, type(self).__name__, self.config, self.state_dict(), overwrite)


class Encoder(Model):
    """A stack that sees the whole text, without a head: what a classifier or an embedding model builds on.

    Args:
        config: a `ModelConfig`, or its name.
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> import torch
        >>> encoder = Encoder(ModelConfig.named("flash-tiny", depth=1))
        >>> tuple(encoder(torch.randint(256, (2, 100))).shape)
        (2, 100, 128)
    """

    def __init__(
        self,
        config: ModelConfig | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, False, device, dtype)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        spread: Spread | None = None,
    ) -> Tensor:
        """Hidden vectors (B, N, d) after the final norm.

        Args:
            tokens: (B, N) integers below vocab_size; padding may be any of them.
            lengths: (B,) valid tokens of each right-padded row.
            cu_seqlens: (G+1,) bounds of G sequences packed in one row (B = 1).
            spread: the tokens are this process's slice of texts that are spread over several processes
                (`flashgau.distributed.spread_tokens`); lengths and cu_seqlens speak of the whole.
        """
        return self.stack(tokens, lengths=lengths, cu_seqlens=cu_seqlens, spread=spread)[0]


class LanguageModel(Model):
    """Base of `CausalLM` and `MaskedLM`: a stack and an output matrix.

    Args:
        config: a `ModelConfig`, or its name ("flash-small").
        causal: each token sees only itself and what came before.
        device: where the parameters live.
        dtype: their type.
    """

    head_weight: nn.Parameter | None
    head_bias: nn.Parameter | None

    def __init__(
        self,
        config: ModelConfig | str,
        causal: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(config, causal, device, dtype)
        config = self.config
        # A tied matrix is registered once, under its embedding, so that a state dict has no tensor twice.
        shape = (config.vocab_size, config.dim)
        self.head_weight = (
            None if config.tied else nn.Parameter(torch.empty(shape, device=device, dtype=dtype).normal_(std=STD))
        )
        self.head_bias = nn.Parameter(torch.zeros(shape[:1], device=device, dtype=dtype)) if config.head_bias else None

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden (..., d) -> logits (..., vocab_size)."""
        weight = self.stack.embedding.weight if self.head_weight is None else self.head_weight
        return F.linear(hidden, weight, self.head_bias)


class CausalLM(LanguageModel):
    """A language model that predicts each token from those before it.

    Args:
        config: a `ModelConfig`, or its name: "flash-tiny", "transformer++-base", ...
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> import torch
        >>> model = CausalLM(ModelConfig.named("flash-tiny", depth=1))
        >>> tokens = torch.randint(256, (2, 100))
        >>> tuple(model(tokens).shape), abs(model.loss(tokens).item() - 5.55) < 0.1
        ((2, 100, 256), True)
        >>> tuple(model.generate(tokens, 5, seed=1).shape)
        (2, 5)
    """

    def __init__(
        self,
        config: ModelConfig | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, True, device, dtype)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        state: ModelState | None = None,
        return_state: bool = False,
        last_only: bool = False,
        inplace: bool = False,
        spread: Spread | None = None,
    ) -> Any:
        """Logits of the token after each token.

        Args:
            tokens: (B, N) integers below vocab_size; padding may be any of them.
            lengths: (B,) valid tokens of each right-padded row.
            cu_seqlens: (G+1,) bounds of G sequences packed in one row (B = 1).
            state: of the tokens before, from an earlier call with `return_state=True`.
            return_state: also give the state after the last valid token of each row.
            last_only: give the logits after the last valid token of each row only, which has to have one.
            inplace: write `state`, which then is the state after, too: for decoding, without gradients. To continue
                twice from one, `state.clone()` it first.
            spread: the tokens are this process's slice of texts that are spread over several processes
                (`flashgau.distributed.spread_tokens`); lengths and cu_seqlens speak of the whole.

        Returns:
            Logits (B, N, vocab_size), (B, 1, vocab_size) with `last_only`; or those and a `ModelState`.
        """
        if cu_seqlens is not None and (state is not None or return_state or last_only):
            what = "`last_only`" if last_only else "a state"
            raise ValueError(f"CausalLM: `cu_seqlens` and {what} together; give each sequence a row and `lengths`")
        if spread is not None:
            check_spread("CausalLM", spread, tokens, last_only=last_only)
        hidden, state = self.stack(
            tokens,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            state=state,
            return_state=return_state,
            inplace=inplace,
            spread=spread,
        )
        if last_only and lengths is None:
            hidden = hidden[:, -1:]
        elif last_only and lengths is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), lengths.long() - 1].unsqueeze(1)
        logits = self.head(hidden)
        return (logits, state) if return_state else logits

    def loss(self, tokens: Tensor, lengths: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mean cross-entropy, in nats, of every valid token but the first of its sequence, given those before it.

        Args:
            tokens: (B, N) with N >= 2. All but the last are the input, all but the first the targets.
            lengths: (B,) valid tokens of each right-padded row.
            cu_seqlens: (G+1,) bounds of packed sequences (B = 1).

        Returns:
            A scalar, computed in fp32 (fp64 for an fp64 model). Divided by ln 2 it is bits per token.
        """
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise ValueError(f"CausalLM.loss: `tokens` has shape {tuple(tokens.shape)}; expected (B, N), N at least 2")
        lengths = valid_lengths("CausalLM.loss", lengths, tokens)
        targets = tokens[:, 1:].long()
        # self(...), here and below, so that hooks, `compile` and whoever shards a model see the call.
        if cu_seqlens is not None:
            logits = self(tokens, lengths, cu_seqlens=cu_seqlens)[:, :-1]
            place = torch.arange(targets.shape[1], device=tokens.device) + 1
            # The first token of a sequence has nothing before it to predict it from.
            targets = targets.masked_fill(torch.isin(place, cu_seqlens), IGNORE)
        elif lengths is not None:
            shorter = (lengths - 1).clamp(min=0)
            logits = self(tokens[:, :-1], shorter)
            valid = torch.arange(targets.shape[1], device=tokens.device) < shorter[:, None]
            targets = targets.masked_fill(~valid, IGNORE)
        else:
            logits = self(tokens[:, :-1])
        return cross_entropy(logits, targets)

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        lengths: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: int | Sequence[int] | None = None,
        stream: Callable[[Tensor], None] | None = None,
        piece: int = 8192,
        progress: Callable[[int, int], None] | None = None,
        compile: bool = False,
    ) -> Tensor:
        """Continue a batch of prompts, token by token.

        "flash" and "mc-tfm++" decode with a state of constant size, which is written in place: nothing is allocated
        that outlives a token. The other kinds have a key/value cache that grows by doubling. The logits are those of
        the parallel `forward` on the whole text.

        Of a model sharded by FSDP2 (`fully_shard`), every process must call it with the same `max_new_tokens`, and
        gets as many tokens of its own prompts as the process that goes on longest.

        Args:
            prompt: (B, N) tokens, N at least 1.
            max_new_tokens: how many to add at most.
            lengths: (B,) valid tokens of each right-padded prompt, each at least 1; None if all N are.
            temperature: logits are divided by it; 0 takes the most likely token.
            top_k: draw among the k most likely only.
            top_p: draw among the fewest tokens that together have at least this probability.
            seed: of the drawing, 0 to 2^64 - 1; None takes torch's default generator.
            stop: a row ends with the first of these tokens, and is filled with it from there on.
            stream: called with every new column of tokens (B,), as soon as it is drawn.
            piece: how many tokens of the prompts are read at a time. (Prompts of unequal length all at once, if the
                model has caches; and all prompts, if it is sharded.)
            progress: called with the tokens of the prompts that are read, and their number, after every piece.
            compile: take tokens by `compile_step`, for "flash" and "mc-tfm++": faster, after up to minutes at the
                first call with so many rows.

        Returns:
            The new tokens (B, T), T <= max_new_tokens; T is smaller if every row has stopped.
        """
        if max_new_tokens < 0:
            raise ValueError(f"generate: `max_new_tokens` is {max_new_tokens}; expected 0 or more")
        if prompt.ndim != 2 or prompt.shape[1] == 0:
            raise ValueError(f"generate: `prompt` has shape {tuple(prompt.shape)}; expected (B, N), N at least 1")
        batch, n = prompt.shape
        lengths = widened(lengths)
        if lengths is not None and (lengths.shape != (batch,) or bool((lengths < 1).any() | (lengths > n).any())):
            raise ValueError(f"generate: `lengths` is {lengths.tolist()}; expected {batch} numbers from 1 to {n}")
        if type(piece) is not int or piece < 1:
            raise ValueError(f"generate: `piece` is {piece!r}; expected a number of tokens, at least 1")
        step = self.compile_step() if compile else self
        generator = seeded(seed, prompt.device)
        stops = None if stop is None else torch.tensor([stop] if isinstance(stop, int) else list(stop))
        stops = None if stops is None else stops.to(prompt.device)
        others = _Others(self)
        if not others.agree(max_new_tokens):
            raise ValueError(
                f"generate: `max_new_tokens` is {max_new_tokens} here and another number in another process; expected "
                "one number for a sharded model"
            )
        training = [module for module in self.modules() if module.training]
        self.eval()
        self.stack.forget_copies()
        try:
            new: list[Tensor] = []
            done = torch.zeros(batch, dtype=torch.bool, device=prompt.device)
            if max_new_tokens:
                logits, state = self._read(prompt, lengths, n if others.exist else piece, progress)
                state.reserve(min(n + max_new_tokens, 2 * n + 4096))  # who asks for a million may stop early
            while len(new) < max_new_tokens:
                token = sample(logits[:, 0], temperature, top_k, top_p, generator)
                if stops is not None:
                    token = torch.where(done, new[-1], token) if new else token
                    done = done | torch.isin(token, stops)
                new.append(token)
                if stream is not None:
                    stream(token)
                if len(new) == max_new_tokens or others.all(stops is not None and bool(done.all())):
                    break
                logits, state = step(token[:, None], state=state, return_state=True, inplace=True)
        finally:
            self.stack.forget_copies()
            for module in training:
                module.training = True
        return torch.stack(new, dim=1) if new else prompt.new_zeros(batch, 0, dtype=torch.int64)

    def compile_step(self) -> Callable[..., tuple[Tensor, ModelState]]:
        """One program for the next token at any position, by `torch.compile`, to be called as the model is.

        On a CPU a token of a single sequence takes less than half of the time: no Python runs between its operations.
        The first call with so many rows compiles, which takes up to minutes; PyTorch keeps what it has made on disk.
        Where there is no C++ compiler, which it needs, a warning says so, and it is the model itself.

        Returns:
            A function of tokens (B, 1), with `state`, `return_state=True` and `inplace=True`, under `torch.no_grad()`:
            the logits (B, 1, V) and the state, which is written.

        Raises:
            ValueError: the model is of a kind whose caches grow, which would be compiled again and again.

        Example:
            >>> import torch
            >>> from flashgau.models import CausalLM
            >>> model, text = CausalLM("flash-tiny").eval(), torch.randint(256, (1, 10))
            >>> with torch.no_grad():
            ...     _, state = model(text[:, :9], return_state=True)
            ...     logits, state = model(text[:, 9:], state=state, return_state=True, inplace=True)
            >>> step = model.compile_step()  # a function to call in the place of `model` in the last line
        """
        if self.config.kind not in CONSTANT_STATE:
            kinds = " or ".join(map(repr, CONSTANT_STATE))
            raise ValueError(
                f"compile_step: the model is of kind {self.config.kind!r}, whose caches grow; expected {kinds}"
            )
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler) is None:
            warnings.warn(f"compile_step: there is no C++ compiler ({compiler}), so nothing is compiled", stacklevel=2)
            return self
        if next(self.parameters()).device.type != "cpu":
            program: Callable[..., Any] = torch.compile(self.forward, fullgraph=True, dynamic=False)
            return program
        inside = torch.compile(self.forward, fullgraph=True, dynamic=False, options={"cpp_wrapper": True})

        def token(*args: Any, **keywords: Any) -> tuple[Tensor, ModelState]:
            # A program would do the work of closing a chunk at every token. It does none, and that is left to `close`.
            with closing_later():
                logits, state = inside(*args, **keywords)
            state.close()
            return logits, state

        return token

    def _read(
        self, prompt: Tensor, lengths: Tensor | None, piece: int, progress: Callable[[int, int], None] | None
    ) -> tuple[Tensor, ModelState]:
        """The logits (B, 1, vocab_size) after each prompt, and the state there."""
        n = prompt.shape[1]
        if lengths is not None and self.config.kind not in CONSTANT_STATE:
            piece = n  # a cache continues all rows, or none
        logits, state = None, None
        for start in range(0, n, piece):
            part = prompt[:, start : start + piece]
            valid = None if lengths is None else (lengths - start).clamp(0, part.shape[1])
            new, state = self(part, valid, state=state, return_state=True, last_only=True, inplace=state is not None)
            # Prompts that ended before keep theirs.
            logits = new if logits is None or valid is None else torch.where((valid > 0)[:, None, None], new, logits)
            if progress is not None:
                progress(min(start + piece, n), n)
        assert logits is not None
        assert state is not None
        return logits, state


class _Others:
    """The processes that hold the other parts of a sharded model. Each call of the model takes all of them."""

    def __init__(self, model: nn.Module) -> None:
        # Not parameters(): between calls they may be whole, while a state dict always holds the parts.
        tensors = model.state_dict().values()
        self._meshes = list(dict.fromkeys(t.device_mesh for t in tensors if hasattr(t, "device_mesh")))

    @property
    def exist(self) -> bool:
        """Whether there are any."""
        return bool(self._meshes)

    def agree(self, number: int) -> bool:
        """Whether all have the same number."""
        high, low = self._largest(number), -self._largest(-number)  # both, in every process
        return high == low

    def all(self, done: bool) -> bool:
        """Whether all are done."""
        return self._largest(int(not done)) == 0

    def _largest(self, number: int) -> int:
        for mesh in self._meshes:
            found = torch.tensor(number, device=mesh.device_type)
            for group in mesh.get_all_groups():
                torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group)
            number = int(found)
        return number


class MaskedLM(LanguageModel):
    """A language model that sees the whole text, and fills in tokens that were masked out.

    Args:
        config: a `ModelConfig`, or its name. Its vocabulary must have a token to mask with.
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> import torch
        >>> model = MaskedLM(ModelConfig.named("flash-quad-tiny", depth=1, vocab_size=257))
        >>> tokens = torch.randint(256, (2, 100))
        >>> inputs, targets = mask_tokens(tokens, mask_token=256, vocab_size=256)
        >>> tuple(model(inputs).shape), bool(model.loss(inputs, targets) > 0)
        ((2, 100, 257), True)
    """

    def __init__(
        self,
        config: ModelConfig | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, False, device, dtype)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        spread: Spread | None = None,
    ) -> Tensor:
        """Logits (B, N, vocab_size) of every token in its place.

        Args:
            tokens: (B, N) integers below vocab_size; padding may be any of them.
            lengths: (B,) valid tokens of each right-padded row.
            cu_seqlens: (G+1,) bounds of G sequences packed in one row (B = 1).
            spread: the tokens are this process's slice of texts that are spread over several processes
                (`flashgau.distributed.spread_tokens`); lengths and cu_seqlens speak of the whole.
        """
        hidden, _ = self.stack(tokens, lengths=lengths, cu_seqlens=cu_seqlens, spread=spread)
        return self.head(hidden)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        lengths: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy, in nats, over the targets that are not -100.

        Args:
            tokens: (B, N) the corrupted text.
            targets: (B, N) the original token where it counts, else -100; see `mask_tokens`.
            lengths: (B,) valid tokens of each right-padded row.
            cu_seqlens: (G+1,) bounds of packed sequences (B = 1).

        Returns:
            A scalar, computed in fp32 (fp64 for an fp64 model).
        """
        if targets.shape != tokens.shape:
            raise ValueError(
                f"MaskedLM.loss: `targets` has shape {tuple(targets.shape)}; expected {tuple(tokens.shape)}, "
                "as `tokens` has"
            )
        return cross_entropy(self(tokens, lengths, cu_seqlens=cu_seqlens), targets.long())


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> CausalLM | MaskedLM | Encoder:
    """The model that its `save` wrote to `path`, in evaluation mode, every tensor in the dtype it was saved in.

    Args:
        path: the file.
        device: where the parameters go.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds no model of flashgau, or one of another version's options.

    Example:
        >>> import pathlib, tempfile
        >>> model = CausalLM(ModelConfig.named("flash-tiny", depth=1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "model.safetensors")
        ...     model.save(path)
        ...     again = load(path)
        >>> type(again).__name__, again.config == model.config
        ('CausalLM', True)
    """
    model: Any = read_model(path, device, {c.__name__: c for c in (CausalLM, MaskedLM, Encoder)})
    return model.eval()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over targets (B, N) that are not -100 of -log softmax(logits (B, N, V)), in fp32 at least."""
    logits = logits.flatten(0, 1)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORE)


def mask_tokens(
    tokens: Tensor,
    mask_token: int,
    vocab_size: int,
    probability: float = 0.15,
    lengths: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose tokens to predict: 80% of them become mask_token, 10% a random token, 10% stay.

    Source: Devlin et al. 2019 (arXiv 1810.04805), section 3.1.

    Args:
        tokens: (B, N).
        mask_token: what a masked token becomes.
        vocab_size: random tokens are below it.
        probability: share of the tokens to predict.
        lengths: (B,) valid tokens of each row; padding is never chosen.
        generator: where the random numbers come from.

    Returns:
        tuple: inputs (B, N), and targets (B, N) with -100 where nothing is to be predicted, both int64.

    Example:
        >>> import torch
        >>> inputs, targets = mask_tokens(torch.zeros(1, 8, dtype=torch.long), 9, 9, probability=1.0)
        >>> targets.tolist()
        [[0, 0, 0, 0, 0, 0, 0, 0]]
    """
    tokens, lengths = tokens.long(), valid_lengths("mask_tokens", lengths, tokens)  # mask_token may be past uint8
    shape, device = tokens.shape, tokens.device
    chosen = torch.rand(shape, generator=generator, device=device) < probability
    if lengths is not None:
        chosen &= torch.arange(shape[1], device=device) < lengths[:, None]
    fate = torch.rand(shape, generator=generator, device=device)
    random = torch.randint(vocab_size, shape, generator=generator, device=device, dtype=tokens.dtype)
    inputs = tokens.masked_fill(chosen & (fate < 0.8), mask_token)
    inputs = torch.where(chosen & (fate >= 0.9), random, inputs)
    return inputs, tokens.long().masked_fill(~chosen, IGNORE)
