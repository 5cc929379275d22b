"""The whole FLASH layer beside FLASH-pytorch's with equal weights, and a layer of Transformer++, causal."""

from __future__ import annotations

from torch import Tensor

from bench import layers, peers, transformer
from bench.cases import DTYPES, FORWARD, TRAINING, BenchCase, Goal, Operation, Problem, Provider, too_large

LONG = 2**14  # from here on a GPU is full
LENGTHS = (2**10, 2**11, 2**12, LONG, 2**16, 2**18, 2**20)
PATIENCE = 1e15  # FLOP of one training step of attention: a second or two on a GPU


def cases(device: str, quick: bool) -> list[BenchCase]:
    if quick:
        return [_case({"B": 1, "d": 32, "e": 64, "S": 32, "C": 16}, n, "fp32", 64, ()) for n in (64, 128)]
    if device == "cuda":
        shapes = [{"d": d, "e": 2 * d, "S": 128, "C": 256} for d in (1024, 512)]
        return [
            _case(shape | {"B": max(1, LONG // n)}, n, "bf16", 2048, _gpu_goals(shape["d"], n))
            for shape in shapes
            for n in LENGTHS
        ]
    shape = {"B": 1, "d": 512, "e": 1024, "S": 128, "C": 256}
    lengths = {4096: (), 8192: (), LONG: _goals("flashgau-eager")}
    return [
        _case(shape, n, dtype, 2048, at + layers.compiled_goals(dtype, {4096: 1.0, LONG: 1.2}.get(n)))
        for dtype in ("fp32", "bf16")
        for n, at in lengths.items()
    ]


def _goals(mine: str) -> tuple[Goal, ...]:
    return (
        Goal(mine, "flash-pytorch", "speed", TRAINING, 1.3),
        Goal(mine, "flash-pytorch", "memory", TRAINING, 0.6),
    )


def _gpu_goals(dim: int, n: int) -> tuple[Goal, ...]:
    mine = "flashgau-triton"
    if dim < 1024 or n < LONG:
        return ()
    goals = (*_goals(mine), Goal(mine, "flash-pytorch-compiled", "speed", TRAINING, 3.0))
    if n < LENGTHS[-1]:
        return goals
    return (*goals, *(Goal(mine, None, "flat", run, 1.1, since=LONG) for run in (FORWARD, TRAINING)))


def _case(shape: dict[str, int], n: int, dtype: str, check_length: int, goals: tuple[Goal, ...]) -> BenchCase:
    narrow, wide, chunk = (shape[name] for name in ("S", "e", "C"))
    core = 2 * chunk * (narrow + wide) + 4 * narrow * wide
    forward = shape["B"] * n * (layers.projection_flops(shape) + core)
    work = {FORWARD: forward, TRAINING: 3 * forward}
    options = {"layer": "FLASH", "causal": True}
    return BenchCase(f"causal d={shape['d']}", n, dtype, shape, check_length, options, goals, work)


def peer_too_large(case: BenchCase, device: str) -> str | None:
    """A training step of the peer keeps and makes some twenty tensors as wide as v."""
    dim, wide, narrow, chunk = (case.shape[name] for name in ("d", "e", "S", "C"))
    per_token = 20 * wide + 6 * dim + 24 * narrow + 6 * chunk + 3 * narrow * wide / chunk
    return too_large(case.shape["B"] * case.length * per_token * DTYPES[case.dtype].itemsize, device)


def compiled_unavailable(case: BenchCase, device: str) -> str | None:
    shortest = LONG if device == "cuda" else 1024
    reason = layers.without_peer() or peer_too_large(case, device)
    return reason or (f"not compiled below N={shortest}, where no goal is set" if case.length < shortest else None)


def transformer_layer(case: BenchCase, tensors: dict[str, Tensor]) -> Problem:
    """A Transformer++ layer; on a GPU under `torch.compile`, which fuses its norms, RoPE and gate."""
    x = tensors["x"]
    dim, wide, narrow = (case.shape[name] for name in ("d", "e", "S"))
    layer = transformer.Layer(dim, wide, narrow, min(dim, 128), device=x.device, dtype=x.dtype)
    function = peers.compile_for(case.name, layer) if x.is_cuda else layer
    return Problem(lambda: function(x), {"x": x} | dict(layer.named_parameters()))


def too_slow(case: BenchCase, device: str) -> str | None:
    steps = 7.0 * case.shape["B"] * case.length**2 * case.shape["d"]
    return None if steps <= PATIENCE else f"its attention needs {steps:.1g} FLOP a training step"


OPERATION = Operation(
    name="flash_layer",
    title="FLASH layer",
    cases=cases,
    inputs=layers.inputs,
    oracle=layers.ours("reference"),
    plain=layers.plain,
    providers=(
        *layers.providers(peer_too_large),
        Provider(
            "flash-pytorch-compiled",
            layers.compiled_peer,
            compiled_unavailable,
            other="the same under torch.compile, whose fp32 sums over tokens are less exact than the check allows",
        ),
        Provider(
            "transformer++",
            transformer_layer,
            too_slow,
            other="attention and feed-forward, of two FLASH layers' parameters, on SDPA",
            stands_for=2,
        ),
    ),
)
