"""FLASH-pytorch's modules, there and back: equal outputs and gradients in fp64."""

import functools
import inspect
import itertools
import textwrap

import pytest
import safetensors.torch as safetensors
import torch
import torch.nn.functional as F
from checks import check_owned
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.mark.parametrize(("dim", "factor", "key_dim"), [(7, 1.3, 5), (8, 0.3, 1), (9, 4.0, 16), (10, 1.1, 128)])
@pytest.mark.parametrize("causal", [False, True])
def test_widths_of_every_kind(dim, factor, key_dim, causal):
    options = {"dim": dim, "expansion_factor": factor, "query_key_dim": key_dim, "causal": causal}
    for module in (theirs.GAU(**options), theirs.FLASH(group_size=8, shift_tokens=True, **options)):
        check_equal(stirred(module), torch.randn(1, 19, dim, dtype=torch.float64))
    if dim % 2 == 0 and key_dim > 2:  # else its positions cannot be added, or its rotary embedding cannot be made
        module = theirs.FLASHTransformer(num_tokens=11, depth=1, group_size=8, **options)
        check_equal(stirred(module), torch.randint(11, (1, 19)))


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


def test_reduced_groups_are_an_option_of_what_is_not_causal_only():
    module = theirs.FLASH(dim=8, query_key_dim=4, group_size=8, causal=True, reduce_group_non_causal_attn=False)
    check_equal(stirred(module), torch.randn(1, 30, 8, dtype=torch.float64))


# --- padded rows ---------------------------------------------------------------------------------------------------


def padded_case(module):
    """Input for `module`, lengths of its rows, and the mask of their tokens."""
    lengths = torch.tensor([30, 13, 8, 1])
    mask = torch.arange(30) < lengths[:, None]
    tokens = isinstance(module, theirs.FLASHTransformer)
    x = torch.randint(30, (4, 30)) if tokens else torch.randn(4, 30, DIM, dtype=torch.float64)
    return x, lengths, mask


def check_padded(module, ours):
    """Valid rows, and every gradient of a function of the valid rows, are those of the module with its mask."""
    module.zero_grad()
    x, lengths, mask = padded_case(module)
    y, y_ours = module(x, mask=mask)[mask], ours(x, lengths=lengths)[mask]
    torch.testing.assert_close(y_ours, y, **TIGHT)
    weight = torch.randn(y.shape, dtype=y.dtype)
    y.backward(weight)
    y_ours.backward(weight)
    mapped = gradients_as_theirs(ours, module.state_dict())
    for name, p in module.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(mapped[name], p.grad, **TIGHT, msg=lambda m, name=name: f"{name}: {m}")


PADDED = {
    "gau": lambda causal: theirs.GAU(dim=DIM, query_key_dim=12, causal=causal),
    "flash": lambda causal: theirs.FLASH(dim=DIM, query_key_dim=12, group_size=8, causal=causal),
    "transformer": lambda causal: theirs.FLASHTransformer(
        dim=DIM, num_tokens=30, depth=2, query_key_dim=12, group_size=8, causal=causal
    ),
}


@pytest.mark.parametrize("kind", ["flash", "transformer"])
def test_padded_causal_flash_agrees_with_its_mask(kind):
    module = stirred(PADDED[kind](True))
    check_padded(module, from_flash_pytorch(module))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", PADDED)
def test_everything_padded_agrees_with_its_mask_once_it_divides_by_the_padded_length(kind, causal):
    module = stirred(PADDED[kind](causal))
    check_padded(module, from_flash_pytorch(module, padded_length=30))
    if kind == "gau" or not causal:
        x, lengths, mask = padded_case(module)
        other = from_flash_pytorch(module)(x, lengths=lengths)
        assert not torch.allclose(other[mask], module(x, mask=mask)[mask], rtol=0, atol=1e-6)


# --- going on with its training ------------------------------------------------------------------------------------


def text_batches(count, batch=4, length=65):
    """Bytes of a module of Python's standard library, in order."""
    text = torch.tensor(list(inspect.getsource(textwrap).encode()))
    starts = torch.arange(count * batch).reshape(count, batch) * 37
    return [torch.stack([text[s : s + length] for s in row]) for row in starts]


def train(model, optimizer, batches):
    losses = []
    for tokens in batches:
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def moments_as_ours(module, optimizer, ours):
    """AdamW's state for the parameters of ours: moments are converted like the weights that they belong to."""
    state = {p: {"step": None} for p in ours.parameters()}
    for name in ("exp_avg", "exp_avg_sq"):
        moments = {key: optimizer.state[p][name] for key, p in module.named_parameters() if p in optimizer.state}
        converted = from_flash_pytorch(
            module.state_dict() | moments, causal=True, group_size=ours.config.chunk_size, shift_tokens=True
        )
        for p, moment in zip(ours.parameters(), converted.parameters(), strict=True):
            state[p][name] = moment.detach()
    step = next(iter(optimizer.state.values()))["step"]
    return {p: values | {"step": step.clone()} for p, values in state.items()}


@pytest.mark.parametrize("norm", ["scalenorm", "layernorm"])
def test_a_model_trained_there_continues_here_with_the_same_loss(norm):
    torch.manual_seed(0)
    module = theirs.FLASHTransformer(
        dim=DIM, num_tokens=256, depth=2, group_size=16, query_key_dim=16, causal=True, norm_type=norm
    ).double()
    make = lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3, weight_decay=0.1)
    batches, optimizer = text_batches(60), make(module)
    first = train(module, optimizer, batches[:40])
    assert first[-1] < first[0] - 1.5  # it learns

    ours = from_flash_pytorch(module)
    continued = make(ours)
    continued.state.update(moments_as_ours(module, optimizer, ours))
    losses, losses_ours = train(module, optimizer, batches[40:]), train(ours, continued, batches[40:])
    torch.testing.assert_close(torch.tensor(losses_ours), torch.tensor(losses), **TIGHT)
    for name, value in _their_state(ours, rotary_like=module.state_dict()).items():
        torch.testing.assert_close(value, module.state_dict()[name], **TIGHT, msg=lambda m, name=name: f"{name}: {m}")


# --- state dicts and files -----------------------------------------------------------------------------------------


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


def save_safetensors(module, path):
    safetensors.save_model(module, path)  # which drops the second name of a shared tensor


def save_clones(module, path):
    safetensors.save_file({key: value.clone() for key, value in module.state_dict().items()}, path)


def save_pickle(module, path):
    torch.save(module.state_dict(), path)


@pytest.mark.parametrize(
    ("save", "name"), [(save_safetensors, "a.safetensors"), (save_clones, "a.safetensors"), (save_pickle, "a.bin")]
)
def test_a_file_is_its_state_dict(save, name, tmp_path):
    module = stirred(theirs.FLASHTransformer(dim=DIM, num_tokens=9, depth=3, group_size=4, causal=True))
    save(module, tmp_path / name)
    tokens = torch.randint(9, (1, 11))
    for path in (tmp_path / name, str(tmp_path / name)):
        ours = from_flash_pytorch(path, causal=True, group_size=4)
        torch.testing.assert_close(ours(tokens), module(tokens), **TIGHT)


@pytest.mark.parametrize(
    ("save", "name"), [(save_safetensors, "a.safetensors"), (save_clones, "a.safetensors"), (save_pickle, "a.bin")]
)
def test_a_converted_model_owns_its_memory(save, name, tmp_path):
    module = stirred(theirs.FLASHTransformer(dim=DIM, num_tokens=9, depth=2, group_size=4, causal=True))
    save(module, tmp_path / name)
    for source in (tmp_path / name, module, module.state_dict()):
        hints = {} if source is module else {"causal": True, "group_size": 4}
        ours = from_flash_pytorch(source, **hints)
        check_owned([*ours.parameters(), *ours.buffers(), *module.parameters()])
    check_owned([*to_flash_pytorch(ours).parameters(), *ours.parameters()])


def test_a_file_cannot_ask_for_more_than_it_holds(tmp_path):
    """A tensor that repeats one number claims any size, from which a model would be allocated."""
    state = theirs.GAU(dim=8).state_dict()
    for wrong in (torch.zeros(1).expand(10**12, 8), torch.zeros(2, 8).to_sparse()):
        torch.save(state | {"to_hidden.0.weight": wrong}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"to_hidden\.0\.weight .* is sparse or repeats its numbers") as caught:
            from_flash_pytorch(tmp_path / "a.pt", causal=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="the name 3 is a int"):
        from_flash_pytorch({3: torch.zeros(1)}, causal=True)


@given(st.data())
def test_damaged_pickles_are_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("p") / "a.pt"
    torch.save({"offsetscale.gamma": torch.zeros(2, 3)}, path, _use_new_zipfile_serialization=data.draw(st.booleans()))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255))
    path.write_bytes(data.draw(st.sampled_from([whole[:place], whole[:place] + bytes([byte]) + whole[place + 1 :]])))
    with pytest.raises((ValueError, TypeError)) as caught:
        from_flash_pytorch(path, causal=True)
    assert str(caught.value).startswith("from_flash_pytorch: ")
    assert "\n" not in str(caught.value)


def test_files_that_hold_no_state_dict(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"from_flash_pytorch: `source` is .*none.safetensors, where no file"):
        from_flash_pytorch(tmp_path / "none.safetensors", causal=True)
    with pytest.raises(FileNotFoundError, match="where no file is"):
        from_flash_pytorch(str(tmp_path), causal=True)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        from_flash_pytorch(tmp_path / "bad.safetensors", causal=True)
    for content in (b"", b"nothing of the kind"):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read by torch\.load with weights_only=True"):
            from_flash_pytorch(tmp_path / "bad.pt", causal=True)
    torch.save(theirs.GAU(dim=8), tmp_path / "module.pt")
    with pytest.raises(ValueError, match="expected the file of a state dict"):
        from_flash_pytorch(tmp_path / "module.pt", causal=True)
    torch.save({"model": {"a": torch.zeros(1)}, "step": 3}, tmp_path / "nested.pt")
    with pytest.raises(TypeError, match="'model' is a dict; 'step' is a int; expected tensors by name"):
        from_flash_pytorch(tmp_path / "nested.pt", causal=True)


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
            lambda: MaskedLM(
                ModelConfig(spec="lucidrains", norm="scalenorm", embedding_norm="rms", layer={"rotary_dim": 16})
            ),
            ["`rotary_dim` other than 32", 'positions "none"', "final norm 'scalenorm'", "`embedding_norm` 'rms'"],
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


def test_a_missing_projection_or_layer_is_one_of_the_listed():
    state = flash_state()
    del state["to_hidden.0.weight"], state["to_qk.0.weight"], state["to_qk.0.bias"]
    with pytest.raises(ValueError, match="not the state dict of a FLASH") as caught:
        from_flash_pytorch(state, causal=True)
    for words in ("missing to_hidden.0.weight (96, 24)", "missing to_qk.0.weight (8, 24)", "missing to_qk.0.bias (8,)"):
        assert words in str(caught.value)
    whole = theirs.FLASHTransformer(dim=DIM, num_tokens=9, depth=3, query_key_dim=8).state_dict()
    for i in (0, 1):
        state = {key: value for key, value in whole.items() if not key.startswith(f"layers.{i}.")}
        with pytest.raises(ValueError, match="not the state dict of a FLASHTransformer") as caught:
            from_flash_pytorch(state, causal=True)
        assert f"missing layers.{i}.norm.g (1,)" in str(caught.value)
        assert f"missing layers.{i}.to_hidden.0.weight (96, 24)" in str(caught.value)
        assert "unexpected" not in str(caught.value)


def shifted(layer):
    layer.shift_tokens = not layer.shift_tokens


def test_every_option_without_counterpart_is_named():
    xpos = rotary.RotaryEmbedding(dim=8, use_xpos=True, learned_freq=True, interpolate_factor=2.0)
    module = theirs.FLASH(dim=8, norm_klass=torch.nn.RMSNorm, rotary_pos_emb=xpos, reduce_group_non_causal_attn=False)
    with pytest.raises(ValueError, match="from_flash_pytorch: flashgau has no counterpart for") as caught:
        from_flash_pytorch(module)
    words = ("`norm_klass` RMSNorm", "`use_xpos`", "`learned_freq`", "`interpolate_factor`", "`reduce_group_non_causal")
    for word in words:
        assert word in str(caught.value)


ERRORS = {
    "hint-needed": (lambda: from_flash_pytorch(flash_state()), ValueError, "give `causal=`"),
    "hint-unknown": (lambda: from_flash_pytorch(flash_state(), colour=1), TypeError, "FLASH has no hint colour"),
    "hint-module": (lambda: from_flash_pytorch(theirs.GAU(dim=8), causal=True), TypeError, "a module needs no hints"),
    "module": (lambda: from_flash_pytorch(torch.nn.Linear(2, 2)), TypeError, "`source` is a Linear"),
    "hint-kind": (lambda: from_flash_pytorch(flash_state(), causal="no"), TypeError, "`causal` is 'no'; expected True"),
    "hint-size": (
        lambda: from_flash_pytorch(flash_state(), causal=True, group_size=0),
        ValueError,
        "`group_size` is 0; expected an int, at least 1",
    ),
    "padded-length": (
        lambda: from_flash_pytorch(theirs.GAU(dim=8), padded_length=0.5),
        ValueError,
        "`padded_length` is 0.5; expected an int, at least 1",
    ),
    "type": (lambda: from_flash_pytorch(3), TypeError, "`source` is a int; expected a module, a state dict or the"),
    "tensors": (lambda: from_flash_pytorch({"x": 3}, causal=True), TypeError, "'x' is a int; expected tensors"),
    "depth": (
        lambda: from_flash_pytorch(theirs.FLASHTransformer(dim=8, num_tokens=3, depth=0)),
        ValueError,
        "with `depth` 0",
    ),
    "nothing": (lambda: from_flash_pytorch({"x": torch.zeros(1)}), ValueError, "no FLASH-pytorch state dict"),
    "groups": (
        lambda: from_flash_pytorch(theirs.FLASH(dim=8, reduce_group_non_causal_attn=False)),
        ValueError,
        "no counterpart for `reduce_group_non_causal_attn=False`",
    ),
    "eps": (
        lambda: from_flash_pytorch(theirs.GAU(dim=8, norm_klass=functools.partial(torch.nn.LayerNorm, eps=1e-3))),
        ValueError,
        "`norm_klass` LayerNorm.*eps=0.001",
    ),
    "rotary": (
        lambda: from_flash_pytorch(theirs.FLASH(dim=8, rotary_pos_emb=torch.nn.Identity())),
        ValueError,
        "`rotary_pos_emb` of type Identity",
    ),
    "layers": (
        lambda: from_flash_pytorch(
            (m := theirs.FLASHTransformer(dim=8, num_tokens=3, depth=2), shifted(m.layers[1]))[0]
        ),
        ValueError,
        "layers that differ in `shift_tokens`",
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
        r"neither to_hidden.0.weight \(2e, d\).* tell its sizes; keys: offsetscale.gamma",
    ),
    "back": (lambda: to_flash_pytorch(torch.nn.Linear(2, 2)), TypeError, "`layer` is a Linear"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()
