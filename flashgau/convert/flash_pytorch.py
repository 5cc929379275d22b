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
from ..tensors import differences
from .state import Source, State, layer_count, read_state, shapes_of, size_of

BUCKETS, MAX_DISTANCE = 32, 128  # of its T5 bias; no option of its layers changes them
HEAD_ORDER = ("quad_q", "lin_q", "quad_k", "lin_k")  # rows of its OffsetScale
BIAS_KEY = "rel_pos_bias.relative_attention_bias.weight"
FREQUENCY_KEY = "rotary_pos_emb.freqs"
NORM_EPS = 1e-5  # of both its norms

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


def from_flash_pytorch(
    source: Source, *, padded_length: int | None = None, **hints: Any
) -> GAU | FLASH | CausalLM | MaskedLM:
    """Make the flashgau layer or model that computes what FLASH-pytorch's computes.

    Outputs and gradients are equal up to rounding for unpadded input of any length, and for right-padded input of
    causal FLASH. All else in FLASH-pytorch divides by the length of the padded tensor, where flashgau divides by a
    row's valid tokens: `padded_length` makes the two agree for one padded length. Dropout is not carried over (a
    warning says so): compare in `eval()`.

    Args:
        source: a GAU, FLASH or FLASHTransformer of FLASH-pytorch 0.1.9, its state dict, or the path of one
            (.safetensors, or a file of `torch.save`).
        padded_length: divide by this number, whatever the input's length: the result given `lengths` then equals
            FLASH-pytorch given its `mask` for rows padded to this length.
        **hints: for a state dict, the constructor's arguments that it does not show: `causal` (always needed),
            `laplace_attn_fn`, `add_residual` (GAU), `group_size`, `shift_tokens`, `reduce_group_non_causal_attn`
            (the others); unless given they have FLASH-pytorch's defaults.

    Returns:
        `nn.GAU`, `nn.FLASH`, or for a FLASHTransformer `CausalLM` or `MaskedLM`; device and dtype are source's.

    Raises:
        ValueError: keys or shapes are not those of such a module, or options have no counterpart here; all of them
            are listed.
        TypeError: source or a hint is of no known kind.
        FileNotFoundError: there is no such file.

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
        kind, options, problems = _read_module(source)
        state = read_state("from_flash_pytorch", source)
    else:
        state = read_state("from_flash_pytorch", source)
        kind = _kind_of(state)
        options, problems = _read_hints(kind, hints), []
    if not options["causal"] and not options.get("reduce_group_non_causal_attn", True):
        problems.append("`reduce_group_non_causal_attn=False`")
    if problems:
        raise ValueError(f"from_flash_pytorch: flashgau has no counterpart for {'; '.join(problems)}")
    if padded_length is not None:
        _check_positive("padded_length", padded_length)
    options["padded_length"] = padded_length

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


def _read_hints(kind: str, hints: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(hints) - set(HINTS[kind]))
    if unknown:
        raise TypeError(
            f"from_flash_pytorch: {kind} has no hint {', '.join(unknown)}; expected {', '.join(HINTS[kind])}"
        )
    options = {**HINTS[kind], **hints}
    if options["causal"] is None:
        raise ValueError("from_flash_pytorch: a state dict does not tell whether it is causal; give `causal=`")
    for name, value in options.items():
        if name == "group_size":
            _check_positive(name, value)
        elif not isinstance(value, bool):
            raise TypeError(f"from_flash_pytorch: `{name}` is {value!r}; expected True or False")
    return options


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"from_flash_pytorch: `{name}` is {value!r}; expected an int, at least 1")


def _read_module(module: Any) -> tuple[str, dict[str, Any], list[str]]:
    """Kind and options of a module, and what in it has no counterpart here."""
    kind = type(module).__name__
    if kind not in HINTS:
        raise TypeError(f"from_flash_pytorch: `source` is a {kind}; expected GAU, FLASH or FLASHTransformer")
    layers = list(module.layers) if kind == "FLASHTransformer" else [module]
    if not layers:
        raise ValueError("from_flash_pytorch: `source` is a FLASHTransformer with `depth` 0; expected at least 1 layer")
    options, problems = _read_layer(layers[0])
    for layer in layers[1:]:
        others, more = _read_layer(layer)
        problems += [f"layers that differ in `{name}`" for name in options if others[name] != options[name]] + more
    dropout = max(layer.dropout.p for layer in layers)
    if dropout:
        warnings.warn(
            f"from_flash_pytorch: dropout {dropout} is not carried over; outputs agree in eval()",
            stacklevel=3,
        )
    return kind, options, list(dict.fromkeys(problems))


def _read_layer(layer: Any) -> tuple[dict[str, Any], list[str]]:
    """Options of a GAU or FLASH of theirs, and what in it has no counterpart here."""
    options = {"causal": layer.causal, "laplace_attn_fn": type(layer.attn_fn).__name__ == "LaplacianAttnFn"}
    names = HINTS["GAU" if hasattr(layer, "add_residual") else "FLASH"]
    options |= {name: getattr(layer, name) for name in names if name not in options}
    problems = []
    norm = layer.norm
    known = type(norm) is nn.LayerNorm or type(norm).__name__ == "ScaleNorm"
    if not known or norm.eps != NORM_EPS:
        problems.append(f"`norm_klass` {norm!r} (LayerNorm and ScaleNorm with eps {NORM_EPS:g} have one)")
    rotary = getattr(layer, "rotary_pos_emb", None)
    if rotary is not None and type(rotary).__name__ != "RotaryEmbedding":
        problems.append(f"`rotary_pos_emb` of type {type(rotary).__name__} (RotaryEmbedding has one)")
    elif rotary is not None:
        flags = ("use_xpos", "learned_freq", "seq_before_head_dim")
        unusual = [name for name in flags if getattr(rotary, name, False)]
        unusual += ["interpolate_factor"] if getattr(rotary, "interpolate_factor", 1) != 1 else []
        problems += [f"`rotary_pos_emb` with `{name}`" for name in unusual]
    return options, problems


def _sizes(state: State, kind: str, depth: int | None = None) -> dict[str, Any]:
    """Dim, hidden and key_dim of a layer, or of `depth` layers of a model."""
    prefixes = [""] if depth is None else [f"layers.{i}." for i in range(depth)]
    out, offsets = ("to_out.0", "offsetscale") if kind == "GAU" else ("to_out", "qk_offset_scale")

    def axis(name: str, place: int) -> list[tuple[str, int, int]]:
        return [(prefix + name, 2, place) for prefix in prefixes]

    rows = size_of(state, axis("to_hidden.0.weight", 0))
    width = size_of(state, axis(f"{out}.weight", 1))
    sizes = {
        "dim": size_of(state, axis("to_hidden.0.weight", 1) + axis("to_qk.0.weight", 1) + axis(f"{out}.weight", 0)),
        "hidden": width if rows is None else rows // 2,
        "key_dim": size_of(state, axis("to_qk.0.weight", 0) + axis(f"{offsets}.gamma", 1)),
    }
    if not all(sizes.values()):
        raise ValueError(
            f"from_flash_pytorch: not the state dict of a {kind}: neither to_hidden.0.weight (2e, d) and "
            f"to_qk.0.weight (S, d) nor {out}.weight (d, e) and {offsets}.gamma tell its sizes; "
            f"keys: {', '.join(sorted(state))}"
        )
    return sizes


def _layer_options(state: State, options: Mapping[str, Any]) -> dict[str, Any]:
    """What GAU and FLASH have in common, as arguments of ours."""
    return {
        "norm": "scalenorm_clamped" if any(key.endswith("norm.g") for key in state) else "layernorm",
        "score": "laplace" if options["laplace_attn_fn"] else "relu2",
    }


def _flash_options(state: State, options: Mapping[str, Any]) -> dict[str, Any]:
    pairs = next((value.numel() for key, value in state.items() if key.endswith(FREQUENCY_KEY)), 0)
    found = _layer_options(state, options) | {"token_shift": options["shift_tokens"], "rotary_dim": 2 * pairs}
    divisor = None if options["causal"] else _divisor(options)
    return found if divisor is None else found | {"lin_normalizer": divisor}


def _divisor(options: Mapping[str, Any]) -> float | None:
    length = options["padded_length"]
    return None if length is None else float(length)


def _factory(state: State) -> dict[str, Any]:
    weight = next(value for value in state.values() if value.is_floating_point())
    return {"device": weight.device, "dtype": weight.dtype}


def _new_gau(state: State, options: Mapping[str, Any]) -> GAU:
    return GAU(
        **_sizes(state, "GAU"),
        spec="lucidrains",
        causal=options["causal"],
        normalizer=_divisor(options),
        residual=options["add_residual"],
        **_layer_options(state, options),
        **_factory(state),
    )


def _new_flash(state: State, options: Mapping[str, Any]) -> FLASH:
    return FLASH(
        **_sizes(state, "FLASH"),
        spec="lucidrains",
        causal=options["causal"],
        chunk_size=options["group_size"],
        **_flash_options(state, options),
        **_factory(state),
    )


def _new_model(state: State, options: Mapping[str, Any]) -> CausalLM | MaskedLM:
    depth = layer_count(state, "layers") or 1
    config = ModelConfig(
        kind="flash",
        vocab_size=state["token_emb.weight"].shape[0],
        depth=depth,
        chunk_size=options["group_size"],
        positions="scaled_sin",
        norm="layernorm",
        spec="lucidrains",
        layer=_flash_options(state, options),
        tied=False,
        head_bias=True,
        **_sizes(state, "FLASHTransformer", depth),
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
    problems = differences(shapes_of(given), shapes_of(expected))
    for key in expected:
        if key.endswith((FREQUENCY_KEY, "abs_pos_emb.inv_freq")) and key in given:
            theirs, ours = given[key].float(), expected[key].float()
            if theirs.shape == ours.shape and not torch.equal(theirs, ours):
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
    if model.config.embedding_norm != "none":
        problems.append(f"`embedding_norm` {model.config.embedding_norm!r}")
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
