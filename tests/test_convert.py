"""FLASH-pytorch's modules, there and back: equal outputs and gradients in fp64."""

import itertools

import pytest
import torch

from flashgau import nn
from flashgau.convert import from_flash_pytorch, to_flash_pytorch
from flashgau.convert.flash_pytorch import _their_state
from flashgau.models import CausalLM, MaskedLM, ModelConfig

theirs = pytest.importorskip("flash_pytorch.flash_pytorch")
rotary = pytest.importorskip("rotary_embedding_torch")

TIGHT = {"rtol": 1e-8, "atol": 1e-8}
DIM = 24


def stirred(module, seed=0):
    """In fp64, with parameters large enough that every part shows, and small enough that values stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return module


def outputs_and_gradients(module, x):
    """The output, the gradient of x, and parameter gradients by FLASH-pytorch's names."""
    if x.is_floating_point():
        x = x.clone().requires_grad_()
    y = module(x)
    y.backward(torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1)))
    return y.detach(), x.grad


def gradients_as_theirs(ours, keys):
    """The gradients of ours in their layout: the same mapping, which is linear, applied to the gradients."""
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    return _their_state(ours, rotary_like=keys)


def check_equal(module, x):
    module.zero_grad()
    ours = from_flash_pytorch(module)
    back = to_flash_pytorch(ours)
    assert {k: tuple(v.shape) for k, v in back.state_dict().items()} == {
        k: tuple(v.shape) for k, v in module.state_dict().items()
    }
    (y, dx), (y_ours, dx_ours), (y_back, dx_back) = (outputs_and_gradients(m, x) for m in (module, ours, back))
    torch.testing.assert_close(y_ours, y, **TIGHT)
    torch.testing.assert_close(y_back, y, **TIGHT)
    torch.testing.assert_close(dx_ours, dx, **TIGHT)
    torch.testing.assert_close(dx_back, dx, **TIGHT)
    mapped = gradients_as_theirs(ours, module.state_dict())
    for name, p in module.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(mapped[name], p.grad, **TIGHT, msg=lambda m, name=name: f"{name}: {m}")
    return ours


@pytest.mark.parametrize(
    ("causal", "laplace", "norm", "residual"),
    list(itertools.product([False, True], [False, True], range(2), [True, False])),
)
def test_gau(causal, laplace, norm, residual):
    module = theirs.GAU(
        dim=DIM,
        query_key_dim=12,
        expansion_factor=1.5,
        causal=causal,
        laplace_attn_fn=laplace,
        norm_klass=(torch.nn.LayerNorm, theirs.ScaleNorm)[norm],
        add_residual=residual,
    )
    for n in (1, 17, 150):
        check_equal(stirred(module), torch.randn(2, n, DIM, dtype=torch.float64))


@pytest.mark.parametrize(
    ("causal", "laplace", "norm", "shift", "rotated"),
    list(itertools.product([False, True], [False, True], range(2), [False, True], [0, 6, 12])),
)
def test_flash(causal, laplace, norm, shift, rotated):
    module = theirs.FLASH(
        dim=DIM,
        query_key_dim=12,
        group_size=40,
        causal=causal,
        laplace_attn_fn=laplace,
        norm_klass=(torch.nn.LayerNorm, theirs.ScaleNorm)[norm],
        shift_tokens=shift,
        rotary_pos_emb=rotary.RotaryEmbedding(dim=rotated) if rotated else None,
    )
    for n in (1, 40, 97):
        check_equal(stirred(module), torch.randn(2, n, DIM, dtype=torch.float64))


@pytest.mark.parametrize("n", [256, 300])
def test_flash_of_a_full_chunk_meets_every_bucket_of_the_bias(n):
    for causal in (False, True):
        module = theirs.FLASH(dim=8, query_key_dim=4, causal=causal)
        check_equal(stirred(module), torch.randn(1, n, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("causal", "laplace", "norm", "shift"),
    list(itertools.product([False, True], [False, True], ["scalenorm", "layernorm"], [False, True])),
)
def test_transformer(causal, laplace, norm, shift):
    module = theirs.FLASHTransformer(
        dim=DIM,
        num_tokens=30,
        depth=2,
        group_size=16,
        query_key_dim=40,
        causal=causal,
        norm_type=norm,
        shift_tokens=shift,
        laplace_attn_fn=laplace,
    )
    ours = check_equal(stirred(module), torch.randint(30, (2, 50)))
    assert type(ours) is (CausalLM if causal else MaskedLM)
    assert ModelConfig.from_json(ours.config.to_json()) == ours.config


def test_converted_transformer_generates_what_the_original_would():
    module = stirred(theirs.FLASHTransformer(dim=DIM, num_tokens=30, depth=2, group_size=8, causal=True)).eval()
    ours, text = from_flash_pytorch(module), torch.randint(30, (1, 5))
    new = ours.generate(text, 20, temperature=0)
    with torch.no_grad():
        for token in new[0].tolist():
            assert module(text)[0, -1].argmax() == token
            text = torch.cat((text, torch.tensor([[token]])), 1)


def test_padded_causal_flash_agrees_with_its_mask():
    module = stirred(theirs.FLASH(dim=DIM, query_key_dim=12, group_size=8, causal=True))
    x, lengths = torch.randn(2, 30, DIM, dtype=torch.float64), torch.tensor([30, 13])
    mask = torch.arange(30) < lengths[:, None]
    ours = from_flash_pytorch(module)
    torch.testing.assert_close(ours(x, lengths=lengths)[mask], module(x, mask=mask)[mask], **TIGHT)


@pytest.mark.parametrize(
    ("module", "hints"),
    [
        (lambda: theirs.GAU(dim=DIM, causal=True, add_residual=False), {"causal": True, "add_residual": False}),
        (lambda: theirs.FLASH(dim=DIM, laplace_attn_fn=True), {"causal": False, "laplace_attn_fn": True}),
        (
            lambda: theirs.FLASHTransformer(dim=DIM, num_tokens=9, depth=1, group_size=4, causal=True),
            {"causal": True, "group_size": 4},
        ),
    ],
)
def test_a_state_dict_with_hints_is_the_module(module, hints):
    module = stirred(module())
    x = torch.randint(9, (1, 11)) if "token_emb.weight" in module.state_dict() else None
    x = torch.randn(1, 11, DIM, dtype=torch.float64) if x is None else x
    ours = from_flash_pytorch(module.state_dict(), **hints)
    torch.testing.assert_close(ours(x), module(x), **TIGHT)


def test_dtype_is_kept_and_dropout_warned_about():
    with pytest.warns(UserWarning, match=r"dropout 0.1 is not carried over"):
        ours = from_flash_pytorch(theirs.GAU(dim=DIM, dropout=0.1).to(torch.bfloat16))
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.GAU(DIM, key_dim=8, rotary_dim=0, bias="none", norm="layernorm", linear_bias=False),
        lambda: nn.FLASH(DIM, key_dim=8, rotary_interleaved=True, bias="none", norm="scalenorm_clamped", chunk_size=8),
        lambda: nn.FLASH(DIM, key_dim=8, spec="lucidrains", causal=True, hidden=29, chunk_size=8, linear_bias=False),
        lambda: CausalLM(
            ModelConfig(dim=DIM, depth=2, key_dim=8, chunk_size=8, spec="lucidrains", positions="scaled_sin")
        ),
    ],
)
def test_our_layers_with_their_options_become_theirs(layer):
    ours = stirred(layer())
    x = torch.randn(2, 21, DIM, dtype=torch.float64)
    x = torch.randint(256, (2, 21)) if isinstance(ours, CausalLM) else x
    torch.testing.assert_close(to_flash_pytorch(ours)(x), ours(x), **TIGHT)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: nn.GAU(DIM), ["`norm`", "`bias`", "`rotary_dim` other than 0"]),
        (
            lambda: nn.GAU(DIM, spec="gau-alpha", token_shift=True, qk_dropout=0.1),
            ["`norm`", "`post_norm`", "'softmax_plus'", "`token_shift`", "`qk_dropout`"],
        ),
        (lambda: nn.GAU(DIM, spec="lucidrains", normalizer=5.0, bias_over_n=False), ["5.0", "`bias_over_n=False`"]),
        (
            lambda: nn.FLASH(DIM, causal=True, residual=False),
            ["`norm`", "`bias`", "`rotary_interleaved=False`", "'tokens'", "`residual=False`"],
        ),
        (lambda: CausalLM("transformer-tiny"), ["kind 'transformer'"]),
        (
            lambda: MaskedLM(ModelConfig(spec="lucidrains", norm="scalenorm", layer={"rotary_dim": 16})),
            ["`rotary_dim` other than 32", 'positions "none"', "final norm 'scalenorm'"],
        ),
    ],
)
def test_options_without_counterpart_are_listed(layer, words):
    with pytest.raises(ValueError, match="to_flash_pytorch: FLASH-pytorch has no counterpart for") as caught:
        to_flash_pytorch(layer())
    for word in words:
        assert word in str(caught.value)


def flash_state(**changes):
    return dict(theirs.FLASH(dim=DIM, query_key_dim=8).state_dict()) | changes


def test_wrong_keys_and_shapes_are_all_listed():
    state = flash_state(surplus=torch.zeros(1))
    state["to_out.weight"] = torch.zeros(3, 3)
    del state["norm.bias"], state["to_out.bias"]
    with pytest.raises(ValueError, match="not the state dict of a FLASH") as caught:
        from_flash_pytorch(state, causal=True)
    for words in (
        "missing norm.bias (24,)",
        "missing to_out.bias (24,)",
        "unexpected surplus",
        "to_out.weight has shape (3, 3), expected (24, 48)",
    ):
        assert words in str(caught.value)


ERRORS = {
    "hint-needed": (lambda: from_flash_pytorch(flash_state()), ValueError, "give `causal=`"),
    "hint-unknown": (lambda: from_flash_pytorch(flash_state(), colour=1), TypeError, "FLASH has no hint colour"),
    "hint-module": (lambda: from_flash_pytorch(theirs.GAU(dim=8), causal=True), TypeError, "a module needs no hints"),
    "module": (lambda: from_flash_pytorch(torch.nn.Linear(2, 2)), TypeError, "`source` is a Linear"),
    "type": (lambda: from_flash_pytorch("file"), TypeError, "`source` is a str"),
    "nothing": (lambda: from_flash_pytorch({"x": torch.zeros(1)}), ValueError, "no FLASH-pytorch state dict"),
    "groups": (
        lambda: from_flash_pytorch(theirs.FLASH(dim=8, reduce_group_non_causal_attn=False)),
        ValueError,
        "`reduce_group_non_causal_attn=False` has no counterpart",
    ),
    "frequencies": (
        lambda: from_flash_pytorch(theirs.FLASH(dim=8, rotary_pos_emb=rotary.RotaryEmbedding(dim=8, theta=500))),
        ValueError,
        "other frequencies",
    ),
    "xpos": (
        lambda: from_flash_pytorch(theirs.FLASH(dim=8, rotary_pos_emb=rotary.RotaryEmbedding(dim=8, use_xpos=True))),
        ValueError,
        "xpos",
    ),
    "projection": (
        lambda: from_flash_pytorch({"offsetscale.gamma": torch.zeros(2, 8)}, causal=True),
        ValueError,
        "is missing or not a matrix",
    ),
    "back": (lambda: to_flash_pytorch(torch.nn.Linear(2, 2)), TypeError, "`layer` is a Linear"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()
