"""`spec=` pins a whole combination: small models of each, token by token in NumPy, and their numbers."""

import dataclasses
import inspect
import math

import numpy as np
import pytest
import torch

from flashgau.models import CausalLM, MaskedLM, ModelConfig
from flashgau.nn import FLASH, GAU
from flashgau.nn.flash import FlashPreset, flash_presets
from flashgau.nn.gau import GauPreset, gau_presets

# Vocabulary, width, hidden, key and chunk width, layers, tokens: over 32 channels, so that lucidrains' rotary embedding
# turns a part; over 16 tokens, so that the T5 bias meets logarithmic buckets; chunks that the length is no multiple of.
V, D, E, S, C, DEPTH, N = 7, 6, 5, 34, 20, 2, 47


# --- the presets: what the layers' docstrings say of them ------------------------------------------------------------


def table_of(layer):
    """The table in a layer's docstring: for each preset, its rows by name."""
    lines = [line.strip() for line in layer.__doc__.splitlines() if line.strip().startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    presets = [cell.split('"')[1] for cell in head[1:]]
    return {preset: {row[0]: row[place] for row in rows} for place, preset in enumerate(presets, 1)}


def said(preset, *roots):
    """Cells that GAU and FLASH have in common; `roots` are the names of widths whose root scales a bias."""
    scaled = {math.sqrt(width): f", times sqrt({name})" for name, width in roots}
    turned = {0: "0", S: "S", 32: "min(32, S)"}[preset.rotary_dim]
    pairs = f", {'yes' if preset.rotary_interleaved else 'no'}" if preset.rotary_dim else ""
    bias = preset.bias + (scaled[preset.bias_scale] if preset.bias_scale != 1 else "")
    return {"bias": bias, "rotary_dim, rotary_interleaved": turned + pairs}


def test_the_table_of_gau_is_its_presets():
    cells = {}
    for name, preset in gau_presets(dim=D, key_dim=S).items():
        cell = said(preset, ("d", D)) | {"norm, post_norm": f"{preset.norm}, {preset.post_norm}"}
        cell["bias"] += ", divided by n" if preset.bias_over_n else ""
        cells[name] = cell | {"score": preset.score, "linear_bias": "yes" if preset.linear_bias else "no"}
        assert (preset.normalizer, preset.token_shift) == ("keys", False)
    assert cells == table_of(GAU)


def test_the_table_of_flash_is_its_presets():
    cells = {}
    both = flash_presets(S, C, causal=False), flash_presets(S, C, causal=True)
    for (name, preset), causal in zip(both[0].items(), both[1].values(), strict=True):
        cell = said(preset, ("S", S)) | {"norm": preset.norm, "head_order": ", ".join(preset.head_order)}
        cell["bias (of a chunk)"] = cell.pop("bias")
        same = causal == preset
        cell["lin_normalizer"] = preset.lin_normalizer if same else f"causal: C; else {preset.lin_normalizer}"
        assert same or causal == dataclasses.replace(preset, lin_normalizer=float(C))
        cells[name] = cell
        assert (preset.score, preset.linear_bias, preset.post_norm, preset.token_shift) == (
            "relu2",
            True,
            "none",
            False,
        )
    assert cells == table_of(FLASH)


@pytest.mark.parametrize(("layer", "preset"), [(GAU, GauPreset), (FLASH, FlashPreset)])
def test_every_field_of_a_preset_is_an_argument(layer, preset):
    arguments = inspect.signature(layer).parameters
    for field in dataclasses.fields(preset):
        assert arguments[field.name].default is None, field.name
    undecided = {name for name, argument in arguments.items() if argument.default is None}
    others = {"hidden", "max_length", "attention_fn", "device", "dtype"}
    assert undecided - others == {field.name for field in dataclasses.fields(preset)}


# --- parameters: every name and shape, and numbers that need no generator ------------------------------------------


def shapes(kind, spec):
    heads = 4 if kind == "flash" else 2
    alpha = spec == "gau-alpha"
    layer = {"to_hidden.weight": (2 * E + S, D), "to_out.weight": (D, E), "offset_scale.gamma": (heads, S)}
    if not alpha:
        layer |= {"to_hidden.bias": (2 * E + S,), "to_out.bias": (D,), "offset_scale.beta": (heads, S)}
    if spec == "paper":
        layer |= {"norm.g": (1,)}
        layer |= {"rel_bias.weight": (2 * C - 1,)} if kind == "flash" else {"rel_bias.a": (S,), "rel_bias.b": (S,)}
    if spec == "lucidrains":
        layer |= {"norm.weight": (D,), "norm.bias": (D,), "rel_bias.weight": (32,)}
    names = {"stack.embedding.weight": (V, D)}
    for i in range(DEPTH):
        names |= {f"stack.layers.{i}.{name}": shape for name, shape in layer.items()}
    return names | ({"head_weight": (V, D)} if alpha else {"stack.norm.weight": (D,), "stack.norm.bias": (D,)})


def parameters(kind, spec):
    values = {}
    for place, (name, shape) in enumerate(sorted(shapes(kind, spec).items())):
        count = np.arange(math.prod(shape)) + 1
        between = 2 * ((count * 0.618033988749895 + count**2 * 0.12247448713916 + 0.37 * place) % 1) - 1
        scale = 1.5 if "norm" in name or "gamma" in name else 0.8
        above = 0.3 if "rel_bias" in name else float("norm" in name and "bias" not in name)
        values[name] = scale * between.reshape(shape) + above
    return values


# --- the same in NumPy, one token at a time -------------------------------------------------------------------------


def layernorm(x, w, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[name + ".weight"] + w[name + ".bias"]


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)


def silu(x):
    return x / (1 + np.exp(-x))


def turned(x, position, dim, neighbours, dtype=torch.float32):
    """RoPE of one vector: its first `dim` channels in pairs of neighbours, or of halves.

    The frequencies are fp32 numbers, whatever the model's dtype; those of the rank form of the bias are fp64.
    """
    frequency = (1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=dtype) / dim)).double().numpy()
    a, b = (x[0:dim:2], x[1:dim:2]) if neighbours else (x[: dim // 2], x[dim // 2 : dim])
    pairs = (a + 1j * b) * np.exp(1j * position * frequency)
    y = x.copy()
    if neighbours:
        y[0:dim:2], y[1:dim:2] = pairs.real, pairs.imag
    else:
        y[: dim // 2], y[dim // 2 : dim] = pairs.real, pairs.imag
    return y


def t5_bucket(back, causal):
    """Bucket of a key `back` tokens before the query: 32 buckets, half of them exact, up to a distance of 128."""
    if causal:
        buckets, first, distance = 32, 0, max(back, 0)
    else:
        buckets, first, distance = 16, 16 if back < 0 else 0, abs(back)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    far = exact + int(math.log(distance / exact) / math.log(128 / exact) * (buckets - exact))
    return first + min(far, buckets - 1)


def projected(x, w, spec):
    """Gate, value and the shared z, with the norm before them."""
    if spec == "paper":
        x = w["norm.g"] * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    if spec == "lucidrains":
        x = layernorm(x, w, "norm")
    p = silu(x @ w["to_hidden.weight"].T + w.get("to_hidden.bias", 0))
    return p[:, :E], p[:, E : 2 * E], p[:, 2 * E :]


def head(z, w, row):
    return z * w["offset_scale.gamma"][row] + (w["offset_scale.beta"][row] if "offset_scale.beta" in w else 0)


def finished(x, out, w):
    return x + out @ w["to_out.weight"].T + w.get("to_out.bias", 0)


def gau(x, w, spec, causal):
    u, v, z = projected(x, w, spec)
    q, k = head(z, w, 0), head(z, w, 1)
    if spec != "lucidrains":
        q, k = (np.stack([turned(row, i, S, spec == "gau-alpha") for i, row in enumerate(h)]) for h in (q, k))
    out = np.zeros_like(v)
    for i in range(N):
        keys = range(i + 1) if causal else range(N)
        products = np.array([q[i] @ k[j] for j in keys])
        if spec == "paper":
            a = turned(w["rel_bias.a"], i, S, False, torch.float64)
            bias = np.array([a @ turned(w["rel_bias.b"], j, S, False, torch.float64) for j in keys])
            weights = np.maximum(products / len(keys) + bias, 0) ** 2  # not causal, len(keys) is N
        elif spec == "lucidrains":
            bias = np.array([w["rel_bias.weight"][t5_bucket(i - j, causal)] for j in keys])
            weights = np.maximum((products + math.sqrt(D) * bias) / N, 0) ** 2
        else:
            scores = math.log(max(len(keys), 16)) / math.log(512) * products / math.sqrt(S)
            weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        out[i] = u[i] * sum(weight * v[j] for weight, j in zip(weights, keys, strict=True))
    y = finished(x, out, w)
    return rms(y) if spec == "gau-alpha" else y


def flash(x, w, spec, causal):
    u, v, z = projected(x, w, spec)
    paper = spec == "paper"
    names = ("quad_q", "quad_k", "lin_q", "lin_k") if paper else ("quad_q", "lin_q", "quad_k", "lin_k")
    turn = (lambda x, i: turned(x, i, S, False)) if paper else (lambda x, i: turned(x, i, 32, True))
    h = {name: np.stack([turn(row, i) for i, row in enumerate(head(z, w, at))]) for at, name in enumerate(names)}
    out = np.zeros_like(v)
    for i in range(N):
        chunk = i // C
        for j in range(N):
            if j // C == chunk and (j <= i or not causal):
                bias = w["rel_bias.weight"]
                bias = bias[C - 1 + j - i] if paper else math.sqrt(S) * bias[t5_bucket(i - j, causal)]
                out[i] += max(h["quad_q"][i] @ h["quad_k"][j] / C + bias, 0) ** 2 * v[j]
            if j // C < chunk or not causal:
                tokens = chunk * C if causal else N
                divisor = C if causal and not paper else tokens
                out[i] += h["lin_q"][i] @ h["lin_k"][j] / divisor * v[j]
    return finished(x, u * out, w)


def logits_of(kind, spec, causal, w, tokens):
    x = w["stack.embedding.weight"][tokens]
    alpha = spec == "gau-alpha"
    x = rms(x) if alpha else x
    for i in range(DEPTH):
        prefix = f"stack.layers.{i}."
        layer = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
        x = (flash if kind == "flash" else gau)(x, layer, spec, causal)
    x = x if alpha else layernorm(x, w, "stack.norm")
    return x @ w["head_weight" if alpha else "stack.embedding.weight"].T


# --- the numbers ----------------------------------------------------------------------------------------------------

# By kind, preset and whether causal: logits of the 18th and the last token, three of each, as `logits_of`
# gives them. fp32 frequencies may differ in their last bit from machine to machine, hence not all digits.
GOLDEN = {
    ("flash-quad", "paper", False): [1.5690053, 0.2392339, 2.3382698, 1.0523691, 0.7877322, 0.7262026],
    ("flash-quad", "paper", True): [2.2810706, 0.3809122, 2.1148954, 1.0549952, 0.7314469, 0.5132138],
    ("flash-quad", "lucidrains", False): [3.0305503, 1.0531546, 2.3073356, 3.3514260, 1.6646102, -2.0917484],
    ("flash-quad", "lucidrains", True): [3.8637870, 1.3522805, 1.7822449, 3.3858060, 1.5303273, -2.2608848],
    ("flash-quad", "gau-alpha", False): [-1.2263345, 0.1162507, -2.2218670, 0.4600840, -0.0580963, 1.2872644],
    ("flash-quad", "gau-alpha", True): [-1.2740964, 0.1213804, -2.2153734, 0.4619588, -0.0529563, 1.2855530],
    ("flash", "paper", False): [-3.4430864, 0.1002344, 0.2880055, -3.5113420, 0.9179280, 0.0349071],
    ("flash", "paper", True): [-3.4131913, 0.0748637, 0.1770113, -3.4882182, 1.0217585, 0.0206714],
    ("flash", "lucidrains", False): [2.0035548, 0.7593635, 2.2730411, 2.8316689, 1.6135510, 1.4901456],
    ("flash", "lucidrains", True): [1.6264898, 0.4060559, 2.2218430, 2.8478958, 1.6555600, 1.3973411],
}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: "-".join(map(str, case)))
def test_a_preset_is_its_numbers(case):
    kind, spec, causal = case
    tokens, w = np.arange(N) ** 2 * 3 % 11 % V, parameters(kind, spec)
    naive = logits_of(kind, spec, causal, w, tokens)
    np.testing.assert_allclose(naive[[17, N - 1], :3].ravel(), GOLDEN[case], rtol=0, atol=2e-6)

    whole = {"norm": "none", "embedding_norm": "rms", "tied": False} if spec == "gau-alpha" else {}
    sizes = {"vocab_size": V, "dim": D, "hidden": E, "key_dim": S, "chunk_size": C, "depth": DEPTH}
    config = ModelConfig(kind=kind, spec=spec, **sizes, **whole)
    model = (CausalLM if causal else MaskedLM)(config, dtype=torch.float64)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes(kind, spec)
    model.load_state_dict({name: torch.tensor(value) for name, value in w.items()})
    with torch.no_grad():
        logits = model(torch.tensor(tokens)[None])[0]
    np.testing.assert_allclose(logits.numpy(), naive, rtol=1e-9, atol=1e-9)
