"""The whole FLASH layer beside FLASH-pytorch's with equal weights, causal."""

from __future__ import annotations

from bench import layers
from bench.cases import FORWARD, TRAINING, Case, Goal, Operation, anywhere


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [_case({"B": 1, "d": 32, "e": 64, "S": 32, "C": 16}, n, "fp32", 64, ()) for n in (64, 128)]
    mine = "flashgau-triton" if device == "cuda" else "flashgau-eager"
    goals = (
        Goal(mine, "flash-pytorch", "speed", TRAINING, 1.3),
        Goal(mine, "flash-pytorch", "memory", TRAINING, 0.6),
    )
    if device == "cuda":
        shape = {"B": 4, "d": 1024, "e": 2048, "S": 128, "C": 256}
        return [_case(shape, n, "bf16", 2048, goals) for n in (4096, 8192, 16384)]
    shape = {"B": 1, "d": 512, "e": 1024, "S": 128, "C": 256}
    lengths = {4096: (), 8192: (), 16384: goals}
    return [_case(shape, n, dtype, 2048, at) for dtype in ("fp32", "bf16") for n, at in lengths.items()]


def _case(shape: dict[str, int], n: int, dtype: str, check_length: int, goals: tuple[Goal, ...]) -> Case:
    narrow, wide, chunk = (shape[name] for name in ("S", "e", "C"))
    core = 2 * chunk * (narrow + wide) + 4 * narrow * wide
    forward = shape["B"] * n * (layers.projection_flops(shape) + core)
    work = {FORWARD: forward, TRAINING: 3 * forward}
    return Case("causal", n, dtype, shape, check_length, {"layer": "FLASH", "causal": True}, goals, work)


OPERATION = Operation(
    name="flash_layer",
    title="FLASH layer",
    cases=cases,
    inputs=layers.inputs,
    oracle=layers.ours("reference"),
    plain=layers.plain,
    providers=layers.providers(anywhere),
)
