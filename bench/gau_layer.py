"""The whole gated attention unit beside FLASH-pytorch's with equal weights, causal."""

from __future__ import annotations

from bench import layers
from bench.cases import FORWARD, TRAINING, BenchCase, Goal, Operation, Provider, too_large


def cases(device: str, quick: bool) -> list[BenchCase]:
    if quick:
        return [_case({"B": 1, "d": 32, "e": 64, "S": 32}, n, "fp32") for n in (64, 128)]
    if device == "cuda":
        shape = {"B": 4, "d": 1024, "e": 2048, "S": 128}
        return [_case(shape, n, "bf16") for n in (1024, 2048, 4096, 8192, 16384)]
    shape = {"B": 1, "d": 512, "e": 1024, "S": 128}
    return [
        _case(shape, n, dtype, layers.compiled_goals(dtype, {1024: 1.1, 4096: 1.5}.get(n)))
        for dtype in ("fp32", "bf16")
        for n in (512, 1024, 2048, 4096, 8192)
    ]


def _case(shape: dict[str, int], n: int, dtype: str, goals: tuple[Goal, ...] = ()) -> BenchCase:
    forward = shape["B"] * n * (layers.projection_flops(shape) + n * (shape["S"] + shape["e"]))
    work = {FORWARD: forward, TRAINING: 3 * forward}
    return BenchCase("causal", n, dtype, shape, 1024, {"layer": "GAU", "causal": True}, goals, work)


def peer_too_large(case: BenchCase, device: str) -> str | None:
    # Its T5 bias alone holds several N x N matrices of int64 at once.
    return too_large(60.0 * case.length**2 + 12.0 * case.shape["B"] * case.length**2, device)


def compiled_unavailable(case: BenchCase, device: str) -> str | None:
    reason = layers.without_peer() or peer_too_large(case, device)
    return reason or ("not compiled below N=512, where no goal is set" if case.length < 512 else None)


OPERATION = Operation(
    name="gau_layer",
    title="Gated attention unit layer",
    cases=cases,
    inputs=layers.inputs,
    oracle=layers.ours("reference"),
    plain=layers.plain,
    providers=(
        *layers.providers(peer_too_large),
        Provider("flash-pytorch-compiled", layers.compiled_peer, compiled_unavailable),
        Provider("mha-sdpa", layers.attention, devices=("cuda",), other="multi-head attention of this d over SDPA"),
    ),
)
