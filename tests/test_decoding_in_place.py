"""Tokens that write their state: equal to those that leave it, at fixed addresses; operation, layers and models."""

import copy
import os
import pickle
import re
import shutil
from dataclasses import replace

import pytest
import torch
from backends import backend_fixture, needs
from checks import close
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_chunk_inputs import draw_dense
from safetensors.torch import save_file
from small_models import TIGHT, VARIANTS, VOCAB, causal, tokens
from strategies import randn
from torch import Tensor

import flashgau
from flashgau import nn
from flashgau.models import KINDS, load_state, save_state
from flashgau.ops import dispatch

backend = backend_fixture("mixed_chunk_attention")
CONSTANT = ("flash", "mc-tfm++")


def step(operands: list[Tensor], state: flashgau.MixedChunkState, **options):
    with torch.no_grad():
        return flashgau.mixed_chunk_step(*operands, state=state, **options)


def some_state(rows: int = 2, chunk: int = 3) -> flashgau.MixedChunkState:
    state = flashgau.MixedChunkState.empty(rows, 4, 6, chunk)
    return replace(state, kv=randn(9, rows, 4, 6))


def operands(rows: int = 2) -> list[Tensor]:
    return [randn(i, rows, 1, w) for i, w in enumerate((4, 4, 4, 4, 6, 6))]


# ---------------------------------------------------------------- the operation


@given(st.data())
@settings(max_examples=12)
def test_a_step_in_place_is_a_step(backend, data):
    """Token by token over more than a chunk, from rows that are at different places or together."""
    chunk = data.draw(st.integers(1, 2)) if backend == "triton" else None
    call = draw_dense(data, backend, chunk=chunk, causal=True, dtype=torch.float32)
    n, (b, _, width) = call.args[0].shape[1], call.args[0].shape
    options = {key: x for key, x in call.kwargs.items() if key not in ("causal", "chunk_size")}
    state = flashgau.MixedChunkState.empty(b, width, call.args[4].shape[-1], call.kwargs["chunk_size"])
    if data.draw(st.booleans()):  # apart
        done = torch.tensor(data.draw(st.lists(st.integers(0, n), min_size=b, max_size=b)))
        before = {**call.kwargs, "lengths": done, "return_state": True, "backend": "reference"}
        _, state = flashgau.mixed_chunk_attention(*call.args, **before)
        state = flashgau.MixedChunkState(*(x.contiguous() for x in state.tensors()))
    written, addresses = state.clone(), None
    for i in range(n):
        token = [x[:, i : i + 1] for x in call.args]
        expected, state = step(token, state, **options)
        out, after = step(token, written, inplace=True, **options)
        assert after is written
        addresses = addresses or [x.data_ptr() for x in written.tensors()]
        assert addresses == [x.data_ptr() for x in written.tensors()]
        for a, e in zip((out, *written.tensors()), (expected, *state.tensors()), strict=True):
            assert torch.equal(a, e)


def test_a_functional_step_leaves_its_state(backend):
    state = some_state(chunk=1)  # every token closes a chunk
    before = state.clone()
    _, after = step(operands(), state)
    assert all(map(torch.equal, state.tensors(), before.tensors()))
    assert not torch.equal(after.kv, state.kv)


def test_used_twice_a_state_that_is_written_has_seen_two_tokens(backend):
    """It is the later state, whatever it was called: a second continuation needs a clone."""
    first, second, state = operands(), [2 * x for x in operands()], some_state()
    apart = state.clone()
    alone, _ = step(second, state.clone())
    step(first, state, inplace=True)
    after, _ = step(second, state, inplace=True)
    assert state.position.tolist() == [2, 2]
    assert not torch.allclose(after, alone)
    close(step(second, apart, inplace=True)[0], alone)


def test_the_row_of_a_token_and_nothing_else_is_written(backend):
    state, new = some_state(chunk=5), operands()
    for _ in range(3):
        step(operands(), state, inplace=True)
    before = state.clone()
    step(new, state, inplace=True)
    assert torch.equal(state.kv, before.kv)
    for held, was, token in zip(state.tensors()[1:4], before.tensors()[1:4], (new[1], new[3], new[4]), strict=True):
        assert torch.equal(held[:, 3], token[:, 0])
        others = [0, 1, 2, 4]
        assert torch.equal(held[:, others], was[:, others])


@pytest.mark.parametrize(
    ("state", "changes", "message"),
    [
        (some_state(), {"inplace": 1}, "`inplace` is 1; expected True or False"),
        (some_state().to(torch.float64), {}, "`state.kv` has dtype torch.float64 and inplace=True; expected torch"),
        (replace(some_state(), v=randn(0, 2, 6, 3).mT), {}, r"`state.v` has strides \(18, 1, 3\) and inplace=True"),
    ],
)  # fmt: skip
def test_a_state_that_cannot_be_written_is_refused(state, changes, message):
    before = state.clone()
    with pytest.raises((TypeError, ValueError), match=f"mixed_chunk_step: {message}"):
        step(operands(), state, **{"inplace": True, **changes})
    assert all(map(torch.equal, state.tensors(), before.tensors()))


def test_gradients_and_writing_exclude_each_other():
    tensors = [x.requires_grad_() for x in operands()]
    with pytest.raises(ValueError, match="mixed_chunk_step: `inplace` is True where gradients are needed"):
        flashgau.mixed_chunk_step(*tensors, state=some_state(), inplace=True)


def test_the_lengths_of_a_caller_are_not_a_states_position():
    lengths, tensors = torch.tensor([2, 1]), [x.expand(-1, 2, -1) for x in operands()]
    _, state = flashgau.mixed_chunk_attention(*tensors, chunk_size=3, causal=True, lengths=lengths, return_state=True)
    step(operands(), state, inplace=True)
    assert lengths.tolist() == [2, 1]


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize(
    "options", [{}, {"token_shift": True, "bias": "t5", "post_norm": "rms"}, {"spec": "lucidrains"}]
)
@pytest.mark.parametrize("lengths", [[5, 5], [7, 2]])
@torch.no_grad()
def test_a_flash_layer_writes_its_state(options, lengths):
    layer = nn.FLASH(12, key_dim=4, chunk_size=4, causal=True, dtype=torch.float64, **options)
    x = randn(0, 2, 20, 12, dtype=torch.float64)
    _, state = layer(x[:, :7], lengths=torch.tensor(lengths), return_state=True)
    written = state.clone()
    for i in range(7, 20):
        expected, state = layer.step(x[:, i : i + 1], state)
        y, after = layer.step(x[:, i : i + 1], written, inplace=True)
        assert after is written
        torch.testing.assert_close(y, expected, **TIGHT)
    for a, e in zip(written.memory.tensors(), state.memory.tensors(), strict=True):
        torch.testing.assert_close(a, e, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"spec": "lucidrains", "token_shift": True, "post_norm": "rms"},
        {"bias": "none", "rotary_dim": 0, "linear_bias": False, "residual": False},
        {"bias": "rotary", "rotary_dim": 6, "rotary_interleaved": True, "score": "laplace", "lin_normalizer": 3.0},
    ],
)
@torch.no_grad()
def test_a_token_of_tritons_kernel_is_a_token(options, dtype):
    """It makes heads and angles itself: at any position, of rows that are apart, through the ends of chunks."""
    needs("triton", dtype)
    layer = nn.FLASH(12, hidden=70, key_dim=10, chunk_size=4, causal=True, dtype=dtype, **options)
    for i, p in enumerate(layer.parameters()):
        p.copy_(randn(i, *p.shape, dtype=dtype) / 2)
    x = randn(0, 2, 16, 12, dtype=dtype)
    with flashgau.use_backend("triton"), dispatch.use_backend_in_layers("triton"):
        _, state = layer(x[:, :7], lengths=torch.tensor([7, 2]), return_state=True)
        state.memory.position.add_(4 * torch.tensor([30000, 1000]))
        written = state.clone()
        for i in range(7, 16):
            expected, state = layer.step(x[:, i : i + 1], state)
            y, after = layer.step(x[:, i : i + 1], written, inplace=True)
            assert after is written
            close(y, expected)
        assert torch.equal(written.memory.position, state.memory.position)
        for a, e in zip(written.memory.tensors()[:4], state.memory.tensors()[:4], strict=True):
            close(a, e)
        with (
            torch.enable_grad(),
            pytest.raises(ValueError, match="FLASH: `inplace` is True where gradients are needed"),
        ):
            layer.step(x[:, :1], written, inplace=True)
        with pytest.raises(ValueError, match=r"FLASH: `state\.memory\.kv` has strides"):
            layer.step(
                x[:, :1],
                replace(state, memory=replace(state.memory, kv=state.memory.kv.mT.contiguous().mT)),
                inplace=True,
            )


@torch.no_grad()
def test_more_than_a_token_is_written_too():
    layer = nn.FLASH(12, key_dim=4, chunk_size=4, causal=True, token_shift=True, dtype=torch.float64)
    x = randn(0, 2, 20, 12, dtype=torch.float64)
    _, state = layer(x[:, :7], return_state=True)
    addresses = [t.data_ptr() for t in (*state.memory.tensors(), state.previous)]
    y, after = layer(x[:, 7:], state=state, return_state=True, inplace=True)
    torch.testing.assert_close(y, layer(x)[:, 7:], **TIGHT)
    assert after is state
    assert addresses == [t.data_ptr() for t in (*state.memory.tensors(), state.previous)]
    assert state.memory.position.tolist() == [20, 20]


def replaced(layer: nn.FLASH, changed: dict[str, Tensor], how: str) -> None:
    if how == "written":
        for name, p in layer.named_parameters():
            p.copy_(changed[name])
    elif how == "other memory":
        for name, p in layer.named_parameters():
            p.data = changed[name]
    else:
        layer.load_state_dict(changed, assign=True)


@pytest.mark.parametrize("how", ["written", "other memory", "other parameters"])
@pytest.mark.parametrize("options", [{}, {"bias": "t5"}, {"bias": "rotary", "linear_bias": False}])
@torch.no_grad()
def test_weights_that_change_between_two_tokens_are_seen(options, how):
    """What a layer keeps between tokens is views of them, and a transpose that knows when it is old."""
    layer = nn.FLASH(12, key_dim=4, chunk_size=4, causal=True, dtype=torch.float64, **options)
    x = randn(0, 2, 9, 12, dtype=torch.float64)
    _, state = layer(x[:, :5], return_state=True)
    layer.step(x[:, 5:6], state, inplace=True)
    before = state.clone()
    changed = {name: p + randn(1, *p.shape, dtype=p.dtype) for name, p in layer.named_parameters()}
    replaced(layer, changed, how)
    y, _ = layer.step(x[:, 6:7], state, inplace=True)
    torch.testing.assert_close(y, layer.step(x[:, 6:7], before)[0], **TIGHT)


@torch.no_grad()
def test_a_tokens_output_stays_when_the_next_is_computed():
    layer = nn.FLASH(12, key_dim=4, chunk_size=4, causal=True)
    x = randn(0, 2, 9, 12)
    _, state = layer(x[:, :5], return_state=True)
    first, _ = layer.step(x[:, 5:6], state, inplace=True)
    kept = first.clone()
    layer.step(x[:, 6:7], state, inplace=True)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state)), nn.UnitState.clone])
@torch.no_grad()
def test_a_copy_of_a_state_goes_its_own_way(copied):
    layer = nn.FLASH(12, key_dim=4, chunk_size=4, causal=True, dtype=torch.float64)
    x = randn(0, 2, 9, 12, dtype=torch.float64)
    _, state = layer(x[:, :5], return_state=True)
    layer.step(x[:, 5:6], state, inplace=True)
    other = copied(state)
    for each in (state, other):
        y, _ = layer.step(x[:, 6:7], each, inplace=True)
        torch.testing.assert_close(y, layer(x)[:, 6:7], **TIGHT)


def test_a_state_begun_in_inference_mode_goes_on_outside_it():
    layer = nn.FLASH(12, key_dim=4, chunk_size=4, causal=True, dtype=torch.float64)
    x = randn(0, 2, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        _, state = layer(x[:, :5], return_state=True)
        expected = layer(x)
    with torch.inference_mode():
        layer.step(x[:, 5:6], state, inplace=True)
    with torch.no_grad():
        y, _ = layer.step(x[:, 6:7], state, inplace=True)
    torch.testing.assert_close(y, expected[:, 6:7], **TIGHT)


@torch.no_grad()
def test_what_a_layer_keeps_of_its_weights_is_in_no_copy_of_it():
    layer = nn.FLASH(12, key_dim=4, chunk_size=4, causal=True)
    x = randn(0, 1, 9, 12)
    _, state = layer(x[:, :5], return_state=True)
    layer.step(x[:, 5:6], state, inplace=True)
    other = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    other.to_hidden.weight.data.mul_(2)
    y, _ = other.step(x[:, 6:7], state.clone(), inplace=True)
    torch.testing.assert_close(y, other.step(x[:, 6:7], state)[0])


@pytest.mark.parametrize("layer", [nn.FLASH(8, key_dim=4, causal=True), nn.MultiHeadMixedChunk(8, 2, causal=True)])
def test_without_a_state_there_is_nothing_to_write(layer):
    with pytest.raises(ValueError, match=f"{type(layer).__name__}: `inplace` is True without a `state`"):
        layer(randn(0, 1, 1, 8), inplace=True)


# ---------------------------------------------------------------- models


def addresses_of(state) -> list[int]:
    memories = [getattr(layer, "memory", layer) for layer in state.layers]
    return [state.position.data_ptr(), *(x.data_ptr() for memory in memories for x in memory.tensors())]


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
@given(prompts=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=6)
@torch.no_grad()
def test_decoding_in_place_is_the_parallel_forward(kind, changes, prompts, seed):
    model, new = causal(kind, **changes), 9
    lengths, rows = torch.tensor(prompts), torch.arange(len(prompts))
    text = tokens(len(prompts), max(prompts) + new, seed=seed)
    parallel = model(text)
    _, state = model(text[:, : max(prompts)], lengths, return_state=True)
    addresses = addresses_of(state) if kind in CONSTANT else None
    for i in range(new):
        logits, after = model(text[rows, lengths + i][:, None], state=state, return_state=True, inplace=True)
        torch.testing.assert_close(logits[:, 0], parallel[rows, lengths + i], **TIGHT)
        assert after is state
        assert addresses is None or addresses == addresses_of(state)
    assert lengths.tolist() == prompts
    assert state.position.tolist() == (lengths + new).tolist()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_continue_from_others(kind):
    model, text, index = causal(kind), tokens(3, 9), torch.tensor([2, 0, 2])
    _, state = model(text[:, :6], return_state=True)
    apart = state.clone()
    state.reorder(index)
    logits, _ = model(text[index, 6:], state=state, return_state=True, inplace=True)
    torch.testing.assert_close(logits, model(text)[index, 6:], **TIGHT)
    logits, _ = model(text[:, 6:], state=apart, return_state=True, inplace=True)  # the clone went its own way
    torch.testing.assert_close(logits, model(text)[:, 6:], **TIGHT)
    with pytest.raises(ValueError, match=r"reorder: `index` has shape \(2,\) .* expected \(3,\) integers"):
        state.reorder(index[:2])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_guesses_are_taken_back(kind):
    model, text = causal(kind), tokens(2, 9)  # chunks of 4: tokens 6 and 7 are in one that is open
    _, state = model(text[:, :5], return_state=True)
    wrong = (text[:, 5:7] + 1) % VOCAB
    for i in range(2):
        model(wrong[:, i : i + 1], state=state, return_state=True, inplace=True)
    state.truncate(2)
    assert state.position.tolist() == [5, 5]
    logits, _ = model(text[:, 5:], state=state, return_state=True, inplace=True)
    torch.testing.assert_close(logits, model(text)[:, 5:], **TIGHT)


@torch.no_grad()
def test_nothing_is_taken_back_across_a_chunks_end():
    model = causal("flash")
    size = model.config.chunk_size
    _, state = model(tokens(2, size + 1), return_state=True)
    before = addresses_of(state), state.layers[0].memory.clone()
    with pytest.raises(ValueError, match=re.escape("expected at most what the open chunks hold, [1, 1]")):
        state.truncate(2)
    assert before[0] == addresses_of(state)
    assert all(map(torch.equal, before[1].tensors(), state.layers[0].memory.tensors()))
    assert state.position.tolist() == [size + 1] * 2


@pytest.mark.parametrize("kind", CONSTANT)
@torch.no_grad()
def test_a_models_token_is_one_graph_at_any_position(kind):
    """Nothing of it depends on a value: the same graph serves every position, through the ends of chunks."""
    model, graphs = causal(kind, depth=2), []

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=counted)
    text = tokens(2, 20)
    _, state = model(text[:, :3], return_state=True)
    expected = model(text)
    for i in range(3, 20):
        logits, _ = compiled(text[:, i : i + 1], state=state, return_state=True, inplace=True)
        torch.testing.assert_close(logits[:, 0], expected[:, i], **TIGHT)
    assert len(graphs) == 1


@torch.no_grad()
def test_a_token_of_tritons_kernel_is_one_graph():
    needs("triton", torch.float32)
    layer, x = nn.FLASH(12, key_dim=4, chunk_size=4, causal=True, bias="t5"), randn(0, 2, 16, 12)
    with flashgau.use_backend("triton"), dispatch.use_backend_in_layers("triton"):
        compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=False)
        _, state = layer(x[:, :3], return_state=True)
        apart = state.clone()
        for i in range(3, 9):
            y, _ = compiled(x[:, i : i + 1], state=state, return_state=True, inplace=True)
            close(y, layer.step(x[:, i : i + 1], apart, inplace=True)[0])
    assert state.memory.position.tolist() == [9, 9]


@pytest.mark.parametrize("kind", CONSTANT)
def test_generate_asks_for_one_program_of_a_token(kind, monkeypatch):
    """Compiled by Dynamo, once for a number of rows; what PyTorch's compiler makes of its graph is PyTorch's matter."""
    model, graphs, compile = causal(kind, depth=1), [], torch.compile

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward

    def traced(call, options=None, **others):
        return compile(call, backend=counted, **others)

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    text, lengths = tokens(3, 6), torch.tensor([6, 4, 1])
    expected = model.generate(text, 9, lengths=lengths, seed=1)
    for _ in range(2):
        assert torch.equal(model.generate(text, 9, lengths=lengths, seed=1, compile=True), expected)
    assert len(graphs) == 1


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_a_compiled_token_is_the_token():
    model, text = causal("flash", depth=1), tokens(1, 5)
    assert torch.equal(model.generate(text, 6, temperature=0, compile=True), model.generate(text, 6, temperature=0))


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    model, text = causal("flash", depth=1), tokens(1, 5)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match=r"compile_step: there is no C\+\+ compiler"):
        compiled = model.generate(text, 6, seed=1, compile=True)
    assert torch.equal(compiled, model.generate(text, 6, seed=1))
    with pytest.raises(ValueError, match="the model is of kind 'transformer', whose caches grow; expected 'fl"):
        causal("transformer").generate(text, 6, compile=True)


@torch.no_grad()
def test_generating_sees_weights_that_were_written_unnoticed():
    """By `.data`, of which PyTorch keeps no count. A copy of weights lives as long as a call of `generate`."""
    model, text = causal("flash"), tokens(1, 6)
    _, state = model(text, return_state=True)
    model(text[:, :1], state=state, return_state=True, inplace=True)  # which makes the copies
    for p in model.parameters():
        p.data.add_(randn(1, *p.shape, dtype=p.dtype))
    copied = copy.deepcopy(model)
    expected = copied.generate(text, 12, seed=1)
    assert torch.equal(model.generate(text, 12, seed=1), expected)


@pytest.mark.parametrize("kind", ["transformer++", "flash-quad"])
@torch.no_grad()
def test_reserved_room_is_not_left(kind):
    model, text = causal(kind), tokens(2, 20)
    _, state = model(text[:, :3], return_state=True)
    state.reserve(20)
    memories = [getattr(layer, "memory", layer) for layer in state.layers]
    places = [(m.keys.data_ptr(), m.values.data_ptr()) for m in memories]
    for i in range(3, 20):
        logits, _ = model(text[:, i : i + 1], state=state, return_state=True, inplace=True)
    assert places == [(m.keys.data_ptr(), m.values.data_ptr()) for m in memories]
    torch.testing.assert_close(logits[:, 0], model(text)[:, -1], **TIGHT)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
@pytest.mark.parametrize("lengths", [None, [5, 2]])
@torch.no_grad()
def test_a_state_out_of_a_file_continues_as_it_would_have(kind, changes, lengths, tmp_path):
    model, text = causal(kind, **changes), tokens(2, 9)
    lengths = None if lengths is None else torch.tensor(lengths)
    _, state = model(text[:, :5], lengths, return_state=True)
    save_state(state, tmp_path / "prefix")
    with pytest.raises(FileExistsError, match=r"save_state: `path` is .*prefix, which exists"):
        save_state(state, tmp_path / "prefix")
    save_state(state, tmp_path / "prefix", overwrite=True)
    expected, _ = model(text[:, 5:6], state=state, return_state=True)
    logits, _ = model(text[:, 5:6], state=load_state(tmp_path / "prefix"), return_state=True)
    assert torch.equal(logits, expected)


@torch.no_grad()
def test_what_is_no_state_is_refused(tmp_path):
    model = causal("flash", depth=1)
    with pytest.raises(FileNotFoundError, match=r"load_state: `path` is .*none, where no file is"):
        load_state(tmp_path / "none")
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"load_state: .*model holds no state of a model"):
        load_state(tmp_path / "model")
    (tmp_path / "noise").write_bytes(b"x" * 99)
    with pytest.raises(ValueError, match=r"load_state: .*noise is damaged"):
        load_state(tmp_path / "noise")
    with pytest.raises(TypeError, match="save_state: `state` is a int; expected a ModelState"):
        save_state(3, tmp_path / "new")
    position, described = torch.zeros(1, dtype=torch.int64), '{"layers": [{"unit": false, "memory": "KeyValueCache"}]}'
    for text, tensors, message in (
        ("{", {}, "load_state: .*"),
        ('{"layers": [1]}', {}, "describes no state of this version"),
        (described, {}, r"lacks 0\.keys, 0\.values"),
        (described, {"0.keys": position, "0.values": position, "1.keys": position}, r"holds 1\.keys, which no state"),
        (described, {"0.keys": position, "0.values": position}, "KeyValueCache: `k`"),
    ):
        save_file(
            {"position": position, **{n: x.clone() for n, x in tensors.items()}},
            tmp_path / "made",
            {"flashgau_state": text},
        )
        with pytest.raises((ValueError, TypeError), match=message):
            load_state(tmp_path / "made")
