"""The gated feed-forwards of models, run through flashgau in place."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import flashgau

from ... import pytorch


class _Form(NamedTuple):
    """Names that a gated feed-forward gives to its parts; `up` is None where one projection makes [gate | up]."""

    gate: str
    up: str | None
    down: str
    activation: tuple[str, ...]
    dropout: tuple[str, ...] = ()


_FORMS = (
    _Form("gate_proj", "up_proj", "down_proj", ("act_fn", "activation_fn", "act")),  # Llama and most others
    _Form("gate_up_proj", None, "down_proj", ("activation_fn", "act_fn", "act")),  # Phi-3, GLM
    _Form("wi_0", "wi_1", "wo", ("act",), ("dropout",)),  # T5 v1.1, mT5, UMT5
    _Form("w1", "w3", "w2", ("act_fn", "act")),  # as in the published code of Llama
    _Form("Wi", None, "Wo", ("act",), ("drop",)),  # ModernBERT
    _Form("weights_in", None, "weights_out", ("act",)),  # DINOv2
)
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "identity")


def patch_glu(model: nn.Module) -> list[str]:
    """Let the gated feed-forwards of a model of transformers run through flashgau, in place.

    A module keeps its class, parameters, state dict, hooks and dtypes; its `forward` alone is replaced: by
    `flashgau.glu_linear` where both projections are plain `torch.nn.Linear` (looked up at every call: no hooks,
    adapters, quantisation or sharding), else by its own projections and `flashgau.glu`. `del module.forward` undoes it.

    What a module computes is not inferred from its class's name. Its class's own forward is run, in fp64, on a copy
    whose projections are small and random, over inputs from 0.01 to 1000, in evaluation and in training, and must
    equal the new one to 1e-10 with one of flashgau's activations; so clipped or scaled variants are left alone.
    Neither the model's weights nor its hooks take part, and weights may be on the meta device.

    Source: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv 2002.05202).

    Args:
        model: any module; the feed-forwards are found among its submodules.

    Returns:
        The names of all patched modules, in the order of `model.named_modules()`; the same when called again.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: if there is nothing to patch.

    Warns:
        UserWarning: names gated feed-forwards that are left alone because flashgau does not have their activation, or
            because their forward has been replaced by somebody else.

    Example:
        >>> import torch
        >>> from flashgau.integrations.transformers import patch_glu
        >>> class MLP(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate_proj, self.up_proj = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)
        ...         self.down_proj, self.act_fn = torch.nn.Linear(16, 8), torch.nn.SiLU()
        ...     def forward(self, x):
        ...         return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        >>> patch_glu(torch.nn.Sequential(MLP(), torch.nn.ReLU()))
        ['0']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch_glu: `model` is a {type(model).__name__}; expected a torch.nn.Module")
    patched, foreign, replaced = [], [], []
    for name, module in model.named_modules():
        form = _form_of(module)
        if form is None:
            continue
        forward = module.__dict__.get("forward")
        if isinstance(forward, functools.partial) and forward.func is _gated_forward:
            patched.append(name)
            continue
        activation, gated = _activation_of(module, form)
        if not gated:
            continue
        if forward is not None:
            replaced.append(name)
        elif activation is None:
            foreign.append(f"{name} ({_activation_name(module, form)})")
        else:
            # Not a bound method: a partial of a module-level function can be pickled and deep-copied with its module.
            module.forward = functools.partial(_gated_forward, module, form, activation)
            patched.append(name)
    if foreign:
        _warn(f"left alone, since flashgau does not have their activation: {', '.join(foreign)}")
    if replaced:
        _warn(f"left alone, since their forward has been replaced by other code: {', '.join(replaced)}")
    if not patched:
        forms = "; ".join(", ".join(filter(None, form[:3])) for form in _FORMS)
        raise ValueError(
            f"patch_glu: nothing to patch in {type(model).__name__}; expected submodules that compute "
            f"down(activation(gate(x)) * up(x)) with projections named {forms}, and an activation among "
            f"{', '.join(_ACTIVATIONS)}"
        )
    return patched


def _warn(message: str) -> None:
    warnings.warn(f"patch_glu: {message}", UserWarning, stacklevel=3)


def _form_of(module: nn.Module) -> _Form | None:
    """The form whose parts are exactly the module's children."""
    children = {name for name, _ in module.named_children()}
    if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        return None
    for form in _FORMS:
        parts = {part for part in form[:3] if isinstance(part, str)}
        if parts <= children and children - parts <= {*form.activation, *form.dropout}:
            return form
    return None


def _activation_name(module: nn.Module, form: _Form) -> str:
    return type(_named(module, form.activation)).__name__


def _named(module: nn.Module, names: tuple[str, ...]) -> Any:
    """The first of the attributes that the module has, or None."""
    return next((getattr(module, name) for name in names if getattr(module, name, None) is not None), None)


def _activation_of(module: nn.Module, form: _Form) -> tuple[str | None, bool]:
    """The activation with which the new forward equals the old one, and whether the module is such a gated unit at
    all, if only with an activation that flashgau does not have."""
    try:
        with torch.device("cpu"):  # also where the caller makes everything on another
            small = _small(module, form)
            for activation in _ACTIVATIONS:
                if _agree(small, form, activation):
                    return activation, True
            for name in form.activation:  # would it agree if its activation were another?
                if callable(getattr(small, name, None)):
                    if isinstance(getattr(small, name), nn.Module):
                        delattr(small, name)
                    object.__setattr__(small, name, nn.functional.silu)
                    return None, _agree(small, form, "silu")
    except Exception:  # whatever a forward of unknown kind raises on such a copy, it is not the one looked for
        return None, False
    return None, False


def _small(module: nn.Module, form: _Form) -> nn.Module:
    """A module of the same class and settings on the CPU, with random projections 6 -> 10 -> 6 in fp64."""
    small = module.__class__.__new__(module.__class__)
    nn.Module.__init__(small)
    internal = set(small.__dict__)
    small.__dict__.update({k: v for k, v in module.__dict__.items() if k not in internal and k != "forward"})
    width = 10 if form.up else 20
    sizes = {form.gate: (6, width), form.up or form.gate: (6, width), form.down: (10, 6)}
    generator = torch.Generator().manual_seed(0)
    for name, child in module.named_children():
        if name not in sizes:
            small.add_module(name, copy.deepcopy(child))
            continue
        bias = getattr(child, "bias", None) is not None
        linear = nn.Linear(*sizes[name], bias=bias, device="meta", dtype=torch.float64).to_empty(device="cpu")
        for parameter in linear.parameters():
            parameter.data.normal_(generator=generator)
        small.add_module(name, linear)
    return small


def _agree(small: nn.Module, form: _Form, activation: str) -> bool:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 12, 6, dtype=torch.float64, generator=generator) * torch.logspace(-2, 3, 12)[:, None].double()
    for training in (False, True):
        small.train(training)
        results = []
        for forward in (type(small).forward, lambda m, x: _gated_forward(m, form, activation, x)):
            with torch.no_grad(), torch.random.fork_rng(devices=[]), flashgau.use_backend("eager"):
                torch.manual_seed(2)  # the same dropout
                results.append(forward(small, x))
        theirs, ours = results
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            return False
        scale = theirs.abs().amax(-1, keepdim=True)
        if not bool(((theirs - ours).abs() <= 1e-10 * scale).all()):
            return False
    return True


def _gated_forward(module: nn.Module, form: _Form, activation: str, *args: Any, **options: Any) -> Any:
    """down(dropout(activation(gate(x)) * up(x))), in the module's own parts."""
    named = _named(module, form.activation)
    if len(args) != 1 or options or (isinstance(named, nn.Module) and _watched(named)):
        return type(module).forward(module, *args, **options)
    hidden_states = args[0]
    gate, down = getattr(module, form.gate), getattr(module, form.down)
    up = getattr(module, form.up) if form.up else None
    if up is None:
        hidden = flashgau.glu(gate(hidden_states), activation=activation)
    elif _plain(gate) and _plain(up):
        hidden = flashgau.glu_linear(hidden_states, gate.weight, up.weight, gate.bias, up.bias, activation=activation)
    else:
        hidden = flashgau.glu(gate(hidden_states), up(hidden_states), activation=activation)
    dropout = _named(module, form.dropout)
    if dropout is not None:
        hidden = dropout(hidden)
    weight = getattr(down, "weight", None)
    if form.gate == "wi_0" and isinstance(weight, Tensor) and weight.dtype not in (hidden.dtype, torch.int8):
        hidden = hidden.to(weight.dtype)  # T5 keeps `wo` in fp32 beside half precision
    return down(hidden)


def _watched(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward."""
    return pytorch.has_hooks(module) or "forward" in module.__dict__


def _plain(linear: nn.Module) -> bool:
    """Whether the module is torch.nn.Linear and nothing else, so that its weight may be used without calling it."""
    if type(linear) is not nn.Linear or _watched(linear):
        return False
    weights = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    return all(type(w) in (nn.Parameter, Tensor) and w.dtype.is_floating_point for w in weights)
