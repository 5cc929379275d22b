"""Decoding token by token after contexts of growing length: FLASH's constant state beside a key/value cache."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashgau
from bench import transformer
from bench.cases import FORWARD, BenchCase, Build, Goal, Operation, Problem, Provider
from flashgau.models import CausalLM, ModelConfig


def cases(device: str, quick: bool) -> list[BenchCase]:
    if quick:
        return [_case("flash-tiny", 1, n, "fp32", 8, 48, 128) for n in (128, 256)]
    lengths = (2**10, 2**11, 2**12, 2**14, 2**16, 2**17)
    mine = "flashgau-triton" if device == "cuda" else "flashgau-eager"
    flat = {lengths[-1]: (Goal(mine, None, "flat", FORWARD, 1.1, since=lengths[0]),)}
    faster = {n: (Goal(mine, "transformer++", "speed", FORWARD, 1.0),) for n in lengths[1:]}
    model, dtype = ("flash-base", "bf16") if device == "cuda" else ("flash-small", "fp32")
    one = [_case(model, 1, n, dtype, 64, 8192, 1024, faster.get(n, ()) + flat.get(n, ())) for n in lengths]
    return [*one, _case(model, 16, 2**12, dtype, 64, 1024, 1024)]


def _case(
    model: str, batch: int, n: int, dtype: str, steps: int, piece: int, check_length: int, goals: tuple[Goal, ...] = ()
) -> BenchCase:
    # `steps` tokens, half of them before position n and half after: n ends a chunk, whose closing is timed with them.
    shape, options, name = {"B": batch, "steps": steps}, {"model": model, "piece": piece}, f"{model}, B={batch}"
    return BenchCase(name, n, dtype, shape, check_length, options, goals, {FORWARD: float(batch * steps)}, "token")


def inputs(case: BenchCase, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Tokens, and weights of order one, so that every part of the model shows in the logits."""
    config = ModelConfig.named(case.options["model"])
    spread, centre = {"gamma": 1.0, "beta": 0.5, "bias": 0.1, "g": 0.1}, {"g": 1.0}

    def draw(name: str, shape: torch.Size) -> Tensor:
        kind = name.rpartition(".")[-1]
        std = spread.get(kind, shape[-1] ** -0.5)
        return centre.get(kind, 0.0) + std * torch.randn(shape, generator=generator)

    parameters = CausalLM(config, device="meta").named_parameters()
    size = (case.shape["B"], length + case.shape["steps"] // 2)
    tokens = torch.randint(config.vocab_size, size, generator=generator)
    return {"tokens": tokens} | {name: draw(name, p.shape) for name, p in parameters}


def _model(case: BenchCase, tensors: dict[str, Tensor]) -> CausalLM:
    model = CausalLM(ModelConfig.named(case.options["model"]), device="meta")
    model.load_state_dict({name: t for name, t in tensors.items() if name != "tokens"}, assign=True)
    return model


def stepping(backend: str, *, inplace: bool) -> Build:
    """The context is read once, in pieces, each with the state after the one before; then token follows token.

    In place every call writes a copy of that state; making it is timed with it, and takes less than a hundredth.
    """

    def build(case: BenchCase, tensors: dict[str, Tensor]) -> Problem:
        model = _model(case, tensors)
        context, new = _split(case, tensors["tokens"])
        prefix = None
        with torch.no_grad(), flashgau.use_backend(backend):
            for piece in context.split(case.options["piece"], dim=1):
                _, prefix = model.stack(piece, state=prefix, return_state=True)

        def call() -> Tensor:
            state, logits = prefix.clone() if inplace else prefix, []
            with torch.no_grad(), flashgau.use_backend(backend):
                for token in new.split(1, dim=1):
                    out, state = model(token, state=state, return_state=True, inplace=inplace)
                    logits.append(out)
            return torch.cat(logits, dim=1)

        return Problem(call, {})

    return build


def parallel(case: BenchCase, tensors: dict[str, Tensor]) -> Problem:
    """All tokens at once, by the naive reference."""
    model, tokens = _model(case, tensors), tensors["tokens"]

    def call() -> Tensor:
        with torch.no_grad(), flashgau.use_backend("reference"):
            logits: Tensor = model(tokens)[:, -case.shape["steps"] :]
        return logits

    return Problem(call, {})


def cached(case: BenchCase, tensors: dict[str, Tensor]) -> Problem:
    """Transformer++ of that size over a full cache, whose contents do not matter to the time."""
    config, embedding = ModelConfig.named(case.options["model"]), tensors["stack.embedding.weight"]
    factory: dict[str, Any] = {"device": embedding.device, "dtype": embedding.dtype}
    dim, narrow, head_dim = config.dim, config.key_dim, config.dim // config.heads
    layers = [transformer.Layer(dim, 2 * dim, narrow, head_dim, **factory) for _ in range(config.depth // 2)]
    tokens = tensors["tokens"]
    context, new = _split(case, tokens)
    caches = [torch.randn(2, len(tokens), config.heads, tokens.shape[1], head_dim, **factory) for _ in layers]

    def call() -> Tensor:
        logits = []
        # On a GPU the cuDNN kernel would make a new plan for every length.
        with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION) if embedding.is_cuda else nullcontext():
            for position, token in enumerate(new.split(1, dim=1), context.shape[1]):
                x = embedding[token]
                at = transformer.angles(torch.arange(position, position + 1, device=x.device), head_dim)
                for layer, cache in zip(layers, caches, strict=True):
                    x = layer.step(x, cache, position, at)
                logits.append(x @ embedding.T)
        return torch.cat(logits, dim=1)

    return Problem(call, {})


def _split(case: BenchCase, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The context, and the tokens whose time is taken."""
    start = tokens.shape[1] - case.shape["steps"]
    return tokens[:, :start], tokens[:, start:]


OPERATION = Operation(
    name="decode",
    title="Decoding after a context",
    cases=cases,
    inputs=inputs,
    oracle=parallel,
    plain=parallel,
    providers=(
        Provider("flashgau-eager", stepping("eager", inplace=True)),
        Provider("flashgau-eager-functional", stepping("eager", inplace=False)),
        Provider("flashgau-triton", stepping("triton", inplace=True), devices=("cuda",)),
        Provider("transformer++", cached, other="Transformer++ of as many parameters, its key/value cache on SDPA"),
    ),
    x_label="context (tokens)",
    together=True,
)
