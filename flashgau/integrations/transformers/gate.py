"""The sigmoid gate on the output of a model's attention, fused into the attention, in place."""

from __future__ import annotations

import copy
import functools
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import flashgau

from .attention import _attention_forward, _transformers

_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}


def patch_attention_gate(model: nn.Module) -> list[str]:
    """Let the gated attention layers of a model of transformers run as one `flashgau.attention(..., gate=)`, in place.

    Such layers are those of Qwen3-Next and Qwen3.5: one projection makes queries and gate, head by head, and the output
    of attention is multiplied by the gate's sigmoid. A layer keeps its class, parameters, state dict, hooks and dtypes;
    its `forward` alone is replaced. The new one calls the layer's own projections, norms and rotary function, and reads
    the gate where its projection left it. `del module.forward` undoes it, and while a layer is set to another
    attention than flashgau's (`model.set_attn_implementation("sdpa")`), its class's own forward runs.

    What a layer computes is not inferred from its class's name. Its class's own forward is run with PyTorch's
    attention, in fp64, on a copy whose projections and norms are random, with a cache and without, and must equal the
    new one to 1e-10. Neither the model's weights nor its hooks take part, and weights may be on the meta device.

    Source: Qiu et al. 2025, "Gated Attention for Large Language Models" (arXiv 2505.06708).

    Args:
        model: any module; the layers are found among its submodules. Their attention must be flashgau's: see
            `register_attention`.

    Returns:
        The names of all patched layers, in the order of `model.named_modules()`; the same when called again.

    Raises:
        ImportError: without transformers 5.5 or later.
        TypeError: if `model` is not a module.
        ValueError: if there is nothing to patch, or a layer is not set to flashgau's attention.

    Warns:
        UserWarning: names layers that look alike and are left alone: they compute something else, or their forward has
            been replaced by somebody else.

    Example:
        >>> from flashgau.integrations.transformers import patch_attention_gate, register_attention
        >>> model = AutoModelForCausalLM.from_pretrained(..., attn_implementation=register_attention()) # doctest: +SKIP
        >>> patch_attention_gate(model) # doctest: +SKIP
        ['model.layers.3.self_attn', 'model.layers.7.self_attn', ...]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch_attention_gate: `model` is a {type(model).__name__}; expected a torch.nn.Module")
    _transformers("patch_attention_gate")
    patched, new, other, replaced = [], [], [], []
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, functools.partial) and forward.func is _gated_forward:
            patched.append(name)
        elif _resembles(module):
            if not _agrees(module):
                other.append(f"{name} ({type(module).__name__})")
            elif forward is not None:
                replaced.append(name)
            else:
                patched.append(name)
                new.append((name, module))
    if not patched:
        unlike = f", for {', '.join(other + replaced)} cannot be" if other or replaced else ""
        raise ValueError(
            f"patch_attention_gate: nothing to patch in {type(model).__name__}{unlike}; expected attention layers "
            "whose q_proj makes queries and a gate, as in Qwen3-Next and Qwen3.5, and that compute "
            "o_proj(attention * sigmoid(gate))"
        )
    for name, module in new:
        if not _on_flashgau(module):
            raise ValueError(
                f"patch_attention_gate: the attention of {name} is {module.config._attn_implementation!r}; expected "
                "flashgau's, as by model.set_attn_implementation(register_attention())"
            )
    for _, module in new:
        # Not a bound method: a partial of a module-level function can be pickled and deep-copied with its module.
        module.forward = functools.partial(_gated_forward, module, _rotary_of(type(module)))
    if other:
        _warn(f"left alone, since they compute something else: {', '.join(other)}")
    if replaced:
        _warn(f"left alone, since their forward has been replaced by other code: {', '.join(replaced)}")
    return patched


def _warn(message: str) -> None:
    warnings.warn(f"patch_attention_gate: {message}", UserWarning, stacklevel=3)


def _resembles(module: nn.Module) -> bool:
    """Whether the module has the parts of gated attention: its query projection is twice as wide as the heads."""
    if not {name for name, _ in module.named_children()} >= _PARTS:
        return False
    queries, heads = getattr(module.q_proj, "out_features", None), getattr(module.o_proj, "in_features", None)
    return queries is not None and heads is not None and queries == 2 * heads


def _gated_forward(
    module: Any,
    rotary: Callable[..., tuple[Tensor, Tensor]],
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **options: Any,
) -> Any:
    """What a patched layer's `forward` is: one gated attention where the layer's attention is flashgau's."""
    if _on_flashgau(module):
        return _fused(module, rotary, hidden_states, position_embeddings, attention_mask, past_key_values, **options)
    theirs = type(module).forward
    return theirs(module, hidden_states, position_embeddings, attention_mask, past_key_values, **options)


def _fused(
    module: Any,
    rotary: Callable[..., tuple[Tensor, Tensor]],
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """o_proj(sigmoid(gate) * attention), in the layer's own parts.

    Args:
        module: the layer.
        rotary: turns queries and keys.
        hidden_states: (B, M, d).
        position_embeddings: cosines and sines, for `rotary`.
        attention_mask: for the attention function.
        past_key_values: the cache, or None.
        options: for the attention function.

    Returns:
        (B, M, d), and None for the attention matrix.
    """
    shape, width = hidden_states.shape[:-1], module.head_dim
    query, gate = module.q_proj(hidden_states).view(*shape, -1, 2 * width).chunk(2, dim=-1)
    key, value = (projection(hidden_states).view(*shape, -1, width) for projection in (module.k_proj, module.v_proj))
    query, key = module.q_norm(query).transpose(1, 2), module.k_norm(key).transpose(1, 2)
    query, key = rotary(query, key, *position_embeddings)
    value = value.transpose(1, 2)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    dropout = module.attention_dropout if module.training else 0.0
    out, _ = _attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout,
        module.scaling,
        flashgau_gate=gate.transpose(1, 2),
        **options,
    )
    return module.o_proj(out.flatten(-2)), None


def _on_flashgau(module: Any) -> bool:
    """Whether the layer is set to the attention that `register_attention` registers."""
    functions = sys.modules["transformers"].AttentionInterface()
    return functions.get(module.config._attn_implementation) is _attention_forward


def _rotary_of(kind: type[nn.Module]) -> Any:
    """The rotary function that the forward of this class uses: the one of its file."""
    owner = next(parent for parent in kind.__mro__ if "forward" in vars(parent))
    return sys.modules[owner.__module__].apply_rotary_pos_emb


class _Doubling:
    """Stands for a cache: it shows in the result whether it was asked."""

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return 2 * key + layer, 3 * value


def _agrees(module: nn.Module) -> bool:
    """Whether the new forward equals that of the module's class."""
    try:
        with torch.device("cpu"), torch.no_grad(), flashgau.use_backend("eager"):
            small, rotary = _small(module), _rotary_of(type(module))
            generator = torch.Generator().manual_seed(1)
            x = torch.randn(2, 7, 6, dtype=torch.float64, generator=generator)
            angle = torch.randn(2, 7, small.head_dim // 4, dtype=torch.float64, generator=generator).repeat(1, 1, 2)
            for training in (False, True):
                small.train(training)
                for cache in (None, _Doubling()):
                    given = x, (angle.cos(), angle.sin()), None, cache
                    theirs, ours = type(small).forward(small, *given)[0], _fused(small, rotary, *given)[0]
                    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
                        return False
                    if not bool(((theirs - ours).abs() <= 1e-10 * theirs.abs().amax()).all()):
                        return False
    except Exception:  # whatever a forward of unknown kind raises on such a copy, it is not the one looked for
        return False
    return True


def _small(module: Any) -> Any:
    """A layer of the same class and settings on the CPU in fp64, with PyTorch's attention: 6 wide, two key heads."""
    small = module.__class__.__new__(module.__class__)
    nn.Module.__init__(small)
    internal = set(small.__dict__)
    small.__dict__.update({k: v for k, v in module.__dict__.items() if k not in internal and k != "forward"})
    small.config, small.attention_dropout = types.SimpleNamespace(_attn_implementation="sdpa"), 0.0
    width, heads = module.head_dim, 2 * module.num_key_value_groups
    sizes = {"q_proj": (6, 2 * heads * width), "o_proj": (heads * width, 6)}
    generator = torch.Generator().manual_seed(0)
    for name, child in module.named_children():
        if name.endswith("_proj"):
            bias = getattr(child, "bias", None) is not None
            rows, columns = sizes.get(name, (6, 2 * width))
            part: nn.Module = nn.Linear(rows, columns, bias=bias, device="meta")
        else:
            part = copy.deepcopy(child)
        part = part.to_empty(device="cpu").double()
        for parameter in part.parameters():
            parameter.data.normal_(generator=generator)
        small.add_module(name, part)
    return small
