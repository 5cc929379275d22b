"""Weights and options of FLASH-pytorch's GAU, FLASH and FLASHTransformer, to flashgau and back."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..models import CausalLM, MaskedLM, ModelConfig
from ..nn import FLASH, GAU, RotaryEmbedding, ScaleNorm, T5Bias

State = Mapping[str, Tensor]

BUCKETS, MAX_DISTANCE = 32, 128  # of its T5 bias; no option of its layers changes them
HEAD_ORDER = ("quad_q", "lin_q", "quad_k", "lin_k")  # rows of its OffsetScale
BIAS_KEY = "rel_pos_bias.relative_attention_bias.weight"
FREQUENCY_KEY = "rotary_pos_emb.freqs"

# What a state dict cannot tell, by the names of the constructors, with their defaults. None: must be given.
HINTS: dict[str, dict[str, Any]] = {
    "GAU": {"causal": None, "laplace_attn_fn": False, "add_residual": True},
    "FLASH": {
        "causal": None,
        "laplace_attn_fn": False,
        "group_size": 256,
        "shift_tokens": False,
        "reduce_group_non_causal_attn": True,
    },
}
HINTS["FLASHTransformer"] = HINTS["FLASH"] | {"shift_tokens": True}


def from_flash_pytorch(source: nn.Module | State, **hints: Any) -> GAU | FLASH | CausalLM | MaskedLM:
    """Make the flashgau layer or model that computes what FLASH-pytorch's computes.

    Outputs and gradients are equal up to rounding for unpadded input of any length. FLASH-pytorch divides by the
    length of the padded tensor where flashgau divides by a row's valid tokens, so padded input agrees in causal
    FLASH only. Its dropout is not carried over (a warning says so): compare in `eval()`.

    Args:
        source: a GAU, FLASH or FLASHTransformer of FLASH-pytorch 0.1.9, or its state dict.
        **hints: for a state dict, the constructor's arguments that it does not show: `causal` (always needed),
            `laplace_attn_fn`, `add_residual` (GAU), `group_size`, `shift_tokens`, `reduce_group_non_causal_attn`
            (the others); unless given they have FLASH-pytorch's defaults.

    Returns:
        `nn.GAU`, `nn.FLASH`, or for a FLASHTransformer `CausalLM` or `MaskedLM`; device and dtype are source's.

    Raises:
        ValueError: keys or shapes are not those of such a module (all of them are listed), or an option has no
            counterpart here.
        TypeError: source or a hint is of no known kind.

    Example:
        >>> import torch
        >>> shapes = {
        ...     "norm.g": (1,), "rel_pos_bias.relative_attention_bias.weight": (32, 1),
        ...     "to_hidden.0.weight": (64, 16), "to_hidden.0.bias": (64,),
        ...     "to_qk.0.weight": (8, 16), "to_qk.0.bias": (8,),
        ...     "offsetscale.gamma": (2, 8), "offsetscale.beta": (2, 8),
        ...     "to_out.0.weight": (16, 32), "to_out.0.bias": (16,),
        ... }
        >>> layer = from_flash_pytorch({key: torch.randn(shape) for key, shape in shapes.items()}, causal=True)
        >>> type(layer).__name__, layer.dim, layer.hidden, layer.key_dim
        ('GAU', 16, 32, 8)
    """
    if isinstance(source, nn.Module):
        if hints:
            raise TypeError(f"from_flash_pytorch: a module needs no hints, but got {', '.join(hints)}")
        kind, state, options = _read_module(source)
    elif isinstance(source, Mapping):
        kind, state = _kind_of(source), source
        unknown = sorted(set(hints) - set(HINTS[kind]))
        if unknown:
            raise TypeError(
                f"from_flash_pytorch: {kind} has no hint {', '.join(unknown)}; expected {', '.join(HINTS[kind])}"
            )
        options = HINTS[kind] | hints
        if options["causal"] is None:
            raise ValueError("from_flash_pytorch: a state dict does not tell whether it is causal; give `causal=`")
    else:
        raise TypeError(f"from_flash_pytorch: `source` is a {type(source).__name__}; expected a module or a state dict")
    if not options["causal"] and not options.get("reduce_group_non_causal_attn", True):
        raise ValueError("from_flash_pytorch: `reduce_group_non_causal_attn=False` has no counterpart in flashgau")

    ours: Any = {"GAU": _new_gau, "FLASH": _new_flash, "FLASHTransformer": _new_model}[kind](state, options)
    _check_keys(kind, state, _their_state(ours, rotary_like=state))
    ours.load_state_dict(_our_state(ours, state))
    return ours


def to_flash_pytorch(layer: GAU | FLASH | CausalLM | MaskedLM) -> nn.Module:
    """Make the FLASH-pytorch module that computes what `layer` computes; FLASH-pytorch must be installed.

    Args:
        layer: a GAU or FLASH layer, or a model of kind "flash", made with `spec="lucidrains"` or with options that
            FLASH-pytorch has too. A missing bias becomes a bias of zeros.

    Returns:
        Its GAU, FLASH or FLASHTransformer, on the device and in the dtype of `layer`.

    Raises:
        ValueError: options of `layer` have no counterpart there; all of them are listed.
        ImportError: FLASH-pytorch is not installed.
    """
    if isinstance(layer, GAU):
        problems = _gau_problems(layer)
    elif isinstance(layer, FLASH):
        problems = _flash_problems(layer)
    elif isinstance(layer, CausalLM | MaskedLM):
        problems = _model_problems(layer)
    else:
        raise TypeError(
            f"to_flash_pytorch: `layer` is a {type(layer).__name__}; expected GAU, FLASH, CausalLM or MaskedLM"
        )
    if problems:
        raise ValueError(f"to_flash_pytorch: FLASH-pytorch has no counterpart for {'; '.join(problems)}")
    package = importlib.import_module("flash_pytorch.flash_pytorch")
    theirs = _their_module(package, layer)
    parameter = next(layer.parameters())
    theirs.to(device=parameter.device, dtype=parameter.dtype)
    state = _their_state(layer, rotary_like=theirs.state_dict())
    theirs.load_state_dict(state)
    return theirs


# --- what is there: options and sizes ------------------------------------------------------------------------------


def _kind_of(state: State) -> str:
    if "token_emb.weight" in state:
        return "FLASHTransformer"
    if "qk_offset_scale.gamma" in state:
        return "FLASH"
    if "offsetscale.gamma" in state:
        return "GAU"
    raise ValueError(
        "from_flash_pytorch: no FLASH-pytorch state dict: none of token_emb.weight (FLASHTransformer), "
        f"qk_offset_scale.gamma (FLASH), offsetscale.gamma (GAU) among {', '.join(sorted(state)) or 'no keys'}"
    )


def _read_module(module: Any) -> tuple[str, State, dict[str, Any]]:
    kind = type(module).__name__
    if kind not in HINTS:
        raise TypeError(f"from_flash_pytorch: `source` is a {kind}; expected GAU, FLASH or FLASHTransformer")
    if kind == "FLASHTransformer":
        layer = module.layers[0]
    else:
        layer = module
    options = {"causal": layer.causal, "laplace_attn_fn": type(layer.attn_fn).__name__ == "LaplacianAttnFn"}
    if kind == "GAU":
        options["add_residual"] = module.add_residual
    else:
        options |= {name: getattr(layer, name) for name in ("group_size", "shift_tokens")}
        options["reduce_group_non_causal_attn"] = layer.reduce_group_non_causal_attn
        rotary = layer.rotary_pos_emb
        if rotary is not None and (rotary.use_xpos or rotary.interpolate_factor != 1):
            raise ValueError("from_flash_pytorch: xpos and interpolated rotary embeddings have no counterpart here")
    if layer.dropout.p:
        warnings.warn(
            f"from_flash_pytorch: dropout {layer.dropout.p} is not carried over; outputs agree in eval()",
            stacklevel=3,
        )
    return kind, module.state_dict(), options


def _sizes(state: State, prefix: str = "") -> dict[str, Any]:
    """Dim, hidden and key_dim of a layer, from its two projections."""
    try:
        (rows, dim), (key_dim, _) = (state[f"{prefix}{name}.0.weight"].shape for name in ("to_hidden", "to_qk"))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"from_flash_pytorch: {prefix}to_hidden.0.weight (2e, d) or {prefix}to_qk.0.weight (S, d) is missing or "
            f"not a matrix; keys: {', '.join(sorted(state))}"
        ) from error
    return {"dim": dim, "hidden": rows // 2, "key_dim": key_dim}


def _layer_options(state: State, options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What GAU and FLASH have in common, as arguments of ours."""
    scale_norm = f"{prefix}norm.g" in state
    return {
        "norm": "scalenorm_clamped" if scale_norm else "layernorm",
        "score": "laplace" if options["laplace_attn_fn"] else "relu2",
    }


def _flash_options(state: State, options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    frequencies = state.get(prefix + FREQUENCY_KEY)
    return _layer_options(state, options, prefix) | {
        "token_shift": options["shift_tokens"],
        "rotary_dim": 0 if frequencies is None else 2 * frequencies.shape[0],
    }


def _factory(state: State) -> dict[str, Any]:
    weight = next(value for value in state.values() if value.is_floating_point())
    return {"device": weight.device, "dtype": weight.dtype}


def _new_gau(state: State, options: Mapping[str, Any]) -> GAU:
    return GAU(
        **_sizes(state),
        spec="lucidrains",
        causal=options["causal"],
        residual=options["add_residual"],
        **_layer_options(state, options),
        **_factory(state),
    )


def _new_flash(state: State, options: Mapping[str, Any]) -> FLASH:
    return FLASH(
        **_sizes(state),
        spec="lucidrains",
        causal=options["causal"],
        chunk_size=options["group_size"],
        **_flash_options(state, options),
        **_factory(state),
    )


def _new_model(state: State, options: Mapping[str, Any]) -> CausalLM | MaskedLM:
    depth = len({key.split(".")[1] for key in state if key.startswith("layers.")})
    config = ModelConfig(
        kind="flash",
        vocab_size=state["token_emb.weight"].shape[0],
        depth=depth,
        chunk_size=options["group_size"],
        positions="scaled_sin",
        norm="layernorm",
        spec="lucidrains",
        layer=_flash_options(state, options, "layers.0."),
        tied=False,
        head_bias=True,
        **_sizes(state, "layers.0."),
    )
    return (CausalLM if options["causal"] else MaskedLM)(config, **_factory(state))


# --- the weights, there and back -----------------------------------------------------------------------------------


def _layer_to_theirs(layer: Any, rotary_like: State, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of the FLASH-pytorch layer; rotary frequencies appear if `rotary_like` has them."""
    e = layer.hidden
    offsets, out = ("offsetscale", "to_out.0") if isinstance(layer, GAU) else ("qk_offset_scale", "to_out")
    state = {f"norm.{name}": value for name, value in layer.norm.state_dict().items()}
    weight = layer.to_hidden.weight
    bias = weight.new_zeros(weight.shape[0]) if layer.to_hidden.bias is None else layer.to_hidden.bias
    for name, value in (("weight", weight), ("bias", bias)):
        gate, v, z = value.detach().split((e, e, layer.key_dim))
        state[f"to_hidden.0.{name}"] = torch.cat((v, gate))
        state[f"to_qk.0.{name}"] = z.clone()
    gamma, beta = layer.offset_scale.gamma.detach(), layer.offset_scale.beta
    beta = torch.zeros_like(gamma) if beta is None else beta.detach()
    if isinstance(layer, FLASH):
        rows = [layer.head_order.index(head) for head in HEAD_ORDER]
        gamma, beta = gamma[rows], beta[rows]
    state[f"{offsets}.gamma"], state[f"{offsets}.beta"] = gamma, beta
    state[f"{out}.weight"] = layer.to_out.weight.detach()
    out_bias = layer.to_out.bias
    state[f"{out}.bias"] = weight.new_zeros(layer.dim) if out_bias is None else out_bias.detach()
    table = weight.new_zeros(BUCKETS) if layer.rel_bias is None else layer.rel_bias.weight.detach()
    state[BIAS_KEY] = table.unsqueeze(-1)
    if layer.rotary is not None and prefix + FREQUENCY_KEY in rotary_like:
        state[FREQUENCY_KEY] = layer.rotary.frequencies(layer.rotary.dim, weight.device).to(weight.dtype)
    return {prefix + key: value for key, value in state.items()}


def _their_state(ours: Any, rotary_like: State) -> dict[str, Tensor]:
    if isinstance(ours, GAU | FLASH):
        return _layer_to_theirs(ours, rotary_like)
    stack = ours.stack
    half = torch.arange(0, stack.positions.dim, 2).float() / stack.positions.dim
    scale = stack.positions.scale.detach()
    state = {
        "token_emb.weight": stack.embedding.weight.detach(),
        "abs_pos_emb.scale": scale,
        "abs_pos_emb.inv_freq": (1.0 / (10000**half)).to(scale),
        "to_logits.0.weight": stack.norm.weight.detach(),
        "to_logits.0.bias": stack.norm.bias.detach(),
        "to_logits.1.weight": (stack.embedding.weight if ours.head_weight is None else ours.head_weight).detach(),
        "to_logits.1.bias": scale.new_zeros(ours.config.vocab_size) if ours.head_bias is None else ours.head_bias,
    }
    for i, layer in enumerate(stack.layers):
        state |= _layer_to_theirs(layer, rotary_like, f"layers.{i}.")
    return state


def _layer_to_ours(layer: Any, state: State, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of our layer from theirs, whose keys and shapes have been checked."""
    e = layer.hidden
    offsets, out = ("offsetscale", "to_out.0") if isinstance(layer, GAU) else ("qk_offset_scale", "to_out")
    mapped = {f"norm.{name}": state[f"{prefix}norm.{name}"] for name in layer.norm.state_dict()}
    for name in ("weight", "bias"):
        v, gate = state[f"{prefix}to_hidden.0.{name}"].split((e, e))
        mapped[f"to_hidden.{name}"] = torch.cat((gate, v, state[f"{prefix}to_qk.0.{name}"]))
        mapped[f"to_out.{name}"] = state[f"{prefix}{out}.{name}"]
    for name in ("gamma", "beta"):
        mapped[f"offset_scale.{name}"] = state[f"{prefix}{offsets}.{name}"]
    mapped["rel_bias.weight"] = state[prefix + BIAS_KEY].squeeze(-1)
    return mapped


def _our_state(ours: Any, state: State) -> dict[str, Tensor]:
    if isinstance(ours, GAU | FLASH):
        return _layer_to_ours(ours, state)
    mapped = {
        "stack.embedding.weight": state["token_emb.weight"],
        "stack.positions.scale": state["abs_pos_emb.scale"],
        "stack.norm.weight": state["to_logits.0.weight"],
        "stack.norm.bias": state["to_logits.0.bias"],
        "head_weight": state["to_logits.1.weight"],
        "head_bias": state["to_logits.1.bias"],
    }
    for i, layer in enumerate(ours.stack.layers):
        values = _layer_to_ours(layer, state, f"layers.{i}.")
        mapped |= {f"stack.layers.{i}.{name}": value for name, value in values.items()}
    return mapped


def _check_keys(kind: str, given: State, expected: State) -> None:
    problems = [f"missing {key} {tuple(expected[key].shape)}" for key in expected if key not in given]
    problems += [f"unexpected {key}" for key in given if key not in expected]
    for key in expected:
        if key not in given:
            continue
        if given[key].shape != expected[key].shape:
            shapes = tuple(given[key].shape), tuple(expected[key].shape)
            problems.append(f"{key} has shape {shapes[0]}, expected {shapes[1]}")
        elif key.endswith(("rotary_pos_emb.freqs", "abs_pos_emb.inv_freq")) and not torch.equal(
            given[key].float(), expected[key].float()
        ):
            problems.append(f"{key} has other frequencies than 10000^(-2i/dim)")
    if problems:
        raise ValueError(f"from_flash_pytorch: not the state dict of a {kind}: {'; '.join(problems)}")


# --- the way back: which options it has, and its module ------------------------------------------------------------


def _shared_problems(layer: Any, bias_scale: float) -> list[str]:
    problems = []
    norm = layer.norm
    if not (isinstance(norm, nn.LayerNorm) or (isinstance(norm, ScaleNorm) and norm.clamp)):
        problems.append("its `norm` (layernorm and scalenorm_clamped have one)")
    if not isinstance(layer.post_norm, nn.Identity):
        problems.append("`post_norm`")
    if layer.score not in ("relu2", "laplace"):
        problems.append(f"score {layer.score!r}")
    if layer.qk_dropout:
        problems.append("`qk_dropout`")
    bias = layer.rel_bias
    if bias is not None and not (
        isinstance(bias, T5Bias)
        and bias.weight.shape == (BUCKETS,)
        and bias.max_distance == MAX_DISTANCE
        and bias.causal == layer.causal
        and abs(bias.scale - bias_scale) < 1e-9
    ):
        problems.append(f'its `bias` ("none" and "t5" with bias_scale {bias_scale:g} have one)')
    return problems


def _gau_problems(layer: GAU) -> list[str]:
    problems = _shared_problems(layer, layer.dim**0.5)
    if layer.rotary is not None:
        problems.append("`rotary_dim` other than 0")
    if layer.token_shift:
        problems.append("`token_shift`")
    if layer.normalizer != "keys":
        problems.append(f"normalizer {layer.normalizer!r}")
    if layer.rel_bias is not None and not layer.bias_over_n:
        problems.append("`bias_over_n=False`")
    return problems


def _flash_problems(layer: FLASH) -> list[str]:
    problems = _shared_problems(layer, layer.key_dim**0.5)
    rotary = layer.rotary
    if rotary is not None and not (rotary.interleaved and rotary.base == 10000):
        problems.append("`rotary_interleaved=False`")
    if layer.lin_normalizer != (float(layer.chunk_size) if layer.causal else "tokens"):
        problems.append(f"lin_normalizer {layer.lin_normalizer!r} (causal: `chunk_size`; else tokens)")
    if not layer.residual:
        problems.append("`residual=False`")
    return problems


def _model_problems(model: Any) -> list[str]:
    layers = list(model.stack.layers)
    if model.config.kind != "flash":
        return [f"kind {model.config.kind!r}"]
    problems = _flash_problems(layers[0])
    if layers[0].rotary is None or layers[0].rotary.dim != min(32, layers[0].key_dim):
        problems.append(f"`rotary_dim` other than {min(32, layers[0].key_dim)}")
    if model.stack.positions is None:
        problems.append('positions "none"')
    if not isinstance(model.stack.norm, nn.LayerNorm):
        problems.append(f"final norm {model.config.norm!r}")
    return problems


def _their_module(package: Any, ours: Any) -> nn.Module:
    layer = ours if isinstance(ours, GAU | FLASH) else ours.stack.layers[0]
    scale_norm = isinstance(layer.norm, ScaleNorm)
    options = {
        "dim": layer.dim,
        "query_key_dim": layer.key_dim,
        # It takes int(dim * factor); half a unit more keeps rounding from losing one.
        "expansion_factor": (layer.hidden + 0.5) / layer.dim,
        "causal": layer.causal,
        "laplace_attn_fn": layer.score == "laplace",
    }
    norm = {"norm_klass": package.ScaleNorm if scale_norm else nn.LayerNorm}
    if isinstance(ours, GAU):
        return package.GAU(add_residual=ours.residual, **norm, **options)
    options |= {"group_size": layer.chunk_size, "shift_tokens": layer.token_shift}
    if isinstance(ours, FLASH):
        rotary = None if ours.rotary is None else _their_rotary(package, ours.rotary)
        return package.FLASH(rotary_pos_emb=rotary, **norm, **options)
    config = ours.config
    norm_type = "scalenorm" if scale_norm else "layernorm"
    return package.FLASHTransformer(num_tokens=config.vocab_size, depth=config.depth, norm_type=norm_type, **options)


def _their_rotary(package: Any, rotary: RotaryEmbedding) -> nn.Module:
    return package.RotaryEmbedding(dim=rotary.dim)
