"""Whole layers beside FLASH-pytorch's with equal weights: what `flash_layer.py` and `gau_layer.py` share.

The inputs of a case are x and the peer's parameters under the peer's names, and every provider reports its
gradients under these names.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flashgau
from bench import peers
from bench.cases import TRAINING, BenchCase, Build, Goal, Problem, Provider
from flashgau.convert import from_flash_pytorch
from flashgau.eager.common import native_halves

T5_TABLE = "rel_pos_bias.relative_attention_bias.weight"


def _names(case: BenchCase) -> tuple[str, str]:
    """What the peer calls its offset-scale and its last projection."""
    return ("qk_offset_scale", "to_out") if case.options["layer"] == "FLASH" else ("offsetscale", "to_out.0")


def inputs(case: BenchCase, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """x (B, N, d) and weights of order one, so that every part of the layer shows in output and gradients."""
    batch, dim, wide, narrow = (case.shape[name] for name in ("B", "d", "e", "S"))
    heads = 4 if case.options["layer"] == "FLASH" else 2
    scale, out = _names(case)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return mean + std * torch.randn(*shape, generator=generator)

    return {
        "x": normal(batch, length, dim),
        "norm.weight": normal(dim, std=0.1, mean=1.0),
        "norm.bias": normal(dim, std=0.1),
        T5_TABLE: normal(32, 1, std=0.02),
        "to_hidden.0.weight": normal(2 * wide, dim, std=dim**-0.5),
        "to_hidden.0.bias": normal(2 * wide, std=0.1),
        "to_qk.0.weight": normal(narrow, dim, std=dim**-0.5),
        "to_qk.0.bias": normal(narrow, std=0.1),
        f"{scale}.gamma": normal(heads, narrow),
        f"{scale}.beta": normal(heads, narrow, std=0.5),
        f"{out}.weight": normal(dim, wide, std=wide**-0.5),
        f"{out}.bias": normal(dim, std=0.1),
    }


def without_peer() -> str | None:
    return None if importlib.util.find_spec("flash_pytorch") else "FLASH-pytorch is not installed"


def _peer_module(case: BenchCase, length: int) -> nn.Module:
    import flash_pytorch
    from rotary_embedding_torch import RotaryEmbedding

    dim, wide, narrow = (case.shape[name] for name in ("d", "e", "S"))
    options: dict[str, Any] = {
        "dim": dim,
        "query_key_dim": narrow,
        "expansion_factor": wide / dim,
        "causal": True,
    }
    if case.options["layer"] == "GAU":
        return flash_pytorch.GAU(**options)
    # Its angles are filled in here, in fp32, for the whole length: by default its cache ends at 8192, and from
    # bf16 inputs it would count positions in bf16, where 257 does not exist.
    rotary = RotaryEmbedding(dim=min(32, narrow), cache_max_seq_len=length)
    rotary.rotate_queries_or_keys(torch.zeros(1, length, narrow))
    return flash_pytorch.FLASH(**options, group_size=case.shape["C"], rotary_pos_emb=rotary, shift_tokens=False)


def peer(case: BenchCase, tensors: dict[str, Tensor]) -> Problem:
    """FLASH-pytorch's layer on these very tensors."""
    module, leaves = _loaded_peer(case, tensors)
    return Problem(lambda: module(tensors["x"]), leaves)


def compiled_peer(case: BenchCase, tensors: dict[str, Tensor]) -> Problem:
    """FLASH-pytorch's layer under `torch.compile`."""
    module, leaves = _loaded_peer(case, tensors)
    compiled = peers.compile_for(case.name, module)
    return Problem(lambda: compiled(tensors["x"]), leaves)


def _loaded_peer(case: BenchCase, tensors: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    module = _peer_module(case, tensors["x"].shape[1]).to(tensors["x"].device)
    weights = {name: t for name, t in tensors.items() if name != "x"}
    module.load_state_dict(weights, strict=False, assign=True)  # it has the fixed angles' frequencies besides
    return module, {"x": tensors["x"]} | {name: module.get_parameter(name) for name in weights}


def ours(backend: str) -> Build:
    """Our layer, converted from the peer's weights."""

    def build(case: BenchCase, tensors: dict[str, Tensor]) -> Problem:
        x = tensors["x"]
        wide, narrow = case.shape["e"], case.shape["S"]
        weights = {name: t.detach() for name, t in tensors.items() if name != "x"}
        hints: dict[str, Any] = {"causal": True}
        if case.options["layer"] == "FLASH":
            turned = min(32, narrow)
            frequencies = 1.0 / 10000 ** (torch.arange(0, turned, 2).float() / turned)
            weights["rotary_pos_emb.freqs"] = frequencies.to(x)
            hints["group_size"] = case.shape["C"]
        layer = from_flash_pytorch(weights, **hints)

        def call() -> Tensor:
            with flashgau.use_backend(backend):
                out = layer(x)
            assert isinstance(out, Tensor)
            return out

        def under_the_peers_names(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
            # Ours joins both projections, gate first; theirs has the value first. The rest is only named otherwise.
            offsets, out = _names(case)
            shared = {"x": gradients["x"], T5_TABLE: gradients["rel_bias.weight"].unsqueeze(-1)}
            for name in ("weight", "bias"):
                gate, v, z = gradients[f"to_hidden.{name}"].split((wide, wide, narrow))
                shared |= {f"to_hidden.0.{name}": torch.cat((v, gate)), f"to_qk.0.{name}": z}
                shared |= {f"norm.{name}": gradients[f"norm.{name}"], f"{out}.{name}": gradients[f"to_out.{name}"]}
            return shared | {f"{offsets}.{name}": gradients[f"offset_scale.{name}"] for name in ("gamma", "beta")}

        return Problem(call, {"x": x} | dict(layer.named_parameters()), under_the_peers_names)

    return build


def plain(case: BenchCase, tensors: dict[str, Tensor]) -> Problem:
    """The peer is plain PyTorch; without it, our layer over the naive reference."""
    return ours("reference")(case, tensors) if without_peer() else peer(case, tensors)


def compiled_goals(dtype: str, bound: float | None) -> tuple[Goal, ...]:
    """Against the peer under `torch.compile`, what a user would take instead; in bf16 if the CPU multiplies that."""
    if bound is None or (dtype == "bf16" and torch.bfloat16 not in native_halves("cpu")):
        return ()
    return (Goal("flashgau-eager", "flash-pytorch-compiled", "speed", TRAINING, bound),)


def providers(peer_too_large: Callable[[BenchCase, str], str | None]) -> tuple[Provider, ...]:
    """Ours and the peer."""
    return (
        Provider("flashgau-eager", ours("eager")),
        Provider("flashgau-triton", ours("triton"), devices=("cuda",)),
        Provider("flash-pytorch", peer, lambda case, device: without_peer() or peer_too_large(case, device)),
    )


def attention(case: BenchCase, tensors: dict[str, Tensor]) -> Problem:
    """What the layer replaces, for scale: causal attention in heads of 128, its projections without biases."""
    x = tensors["x"]
    dim, heads = x.shape[-1], max(1, x.shape[-1] // 128)
    to_qkv, to_out = (torch.randn(n, dim).div_(dim**0.5).to(x).requires_grad_() for n in (3 * dim, dim))

    def call() -> Tensor:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in F.linear(x, to_qkv).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(out.transpose(1, 2).flatten(2), to_out)

    return Problem(call, {"x": x, "to_qkv": to_qkv, "to_out": to_out})


def projection_flops(shape: Mapping[str, int]) -> float:
    """Operations per token of the two projections: d to 2 e + S, and e to d."""
    dim, wide, narrow = (shape[name] for name in ("d", "e", "S"))
    return float(2 * dim * (2 * wide + narrow) + 2 * wide * dim)
