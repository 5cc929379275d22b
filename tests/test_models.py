"""Language models: loss, decoding, configurations."""

import copy
import errno
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch as safetensors
import torch
import torch.nn.functional as F
from checks import check_owned
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgau.models import KINDS, SIZES, CausalLM, Encoder, MaskedLM, ModelConfig, load, mask_tokens, sample

VOCAB = 23
TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def config(kind, **changes):
    options = {"dim": 24, "depth": 2, "heads": 4, "kv_heads": 2, "key_dim": 8, "chunk_size": 4, "vocab_size": VOCAB}
    return ModelConfig(kind=kind, **(options | changes))


def causal(kind, **changes):
    return stirred(CausalLM(config(kind, **changes), dtype=torch.float64))


def stirred(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model.eval()


def tokens(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


VARIANTS = [(kind, {}) for kind in KINDS] + [
    ("flash", {"spec": "lucidrains", "layer": {"token_shift": True}, "positions": "scaled_sin", "tied": False}),
    ("flash-quad", {"spec": "gau-alpha", "norm": "none", "embedding_norm": "rms", "head_bias": True}),
    ("transformer++", {"layer": {"bias": "alibi", "rotary_dim": 0}, "norm": "rmsnorm", "feedforward": "geglu"}),
]


# --- decoding is the parallel forward ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
@given(prompts=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=8)
@torch.no_grad()
def test_streamed_logits_are_the_parallel_ones(kind, changes, prompts, seed):
    model, new = causal(kind, **changes), 6
    lengths, rows = torch.tensor(prompts), torch.arange(len(prompts))
    text = tokens(len(prompts), max(prompts) + new, seed=seed)
    parallel = model(text)
    logits, state = model(text[:, : max(prompts)], lengths, return_state=True)
    for b, n in enumerate(prompts):
        torch.testing.assert_close(logits[b, :n], parallel[b, :n], **TIGHT)
    for i in range(new):
        logits, state = model(text[rows, lengths + i][:, None], state=state, return_state=True)
        torch.testing.assert_close(logits[:, 0], parallel[rows, lengths + i], **TIGHT)
    assert state.position.tolist() == (lengths + new).tolist()


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
@torch.no_grad()
def test_a_text_in_parts_is_the_text(kind, changes):
    model, text, state, pieces = causal(kind, **changes), tokens(2, 21), None, []
    for part in text.split([3, 1, 7, 10], dim=1):
        logits, state = model(part, state=state, return_state=True)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), model(text), **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_is_argmax_of_the_whole_text_again_and_again(kind):
    model, lengths = causal(kind), torch.tensor([5, 1, 7])
    prompt = tokens(3, 7)
    new = model.generate(prompt, 8, lengths=lengths, temperature=0)
    for b, n in enumerate(lengths.tolist()):
        text = prompt[b : b + 1, :n]
        for _ in range(8):
            text = torch.cat((text, model(text)[:, -1:].argmax(-1)), 1)
        assert new[b].tolist() == text[0, n:].tolist()


def test_generation_repeats_with_its_seed_and_streams():
    model, prompt, seen = causal("flash"), tokens(2, 5), []
    model.train()
    first = model.generate(prompt, 12, seed=3, top_k=5, stream=lambda column: seen.append(column))
    assert model.training
    assert torch.equal(torch.stack(seen, 1), first)
    assert torch.equal(model.generate(prompt, 12, seed=3, top_k=5), first)
    assert not torch.equal(model.generate(prompt, 12, seed=4, top_k=5), first)
    assert model.generate(prompt, 0).shape == (2, 0)


@pytest.mark.parametrize("stop", [7, [7, 2]])
def test_generation_stops(stop):
    model, prompt = causal("transformer++"), tokens(4, 3)
    free = model.generate(prompt, 60, seed=1)
    new = model.generate(prompt, 60, seed=1, stop=stop)
    stops = [stop] if isinstance(stop, int) else stop
    ends = []
    for free_row, row in zip(free.tolist(), new.tolist(), strict=True):
        end = next((i for i, t in enumerate(row) if t in stops), len(row))
        assert row[end + 1 :] == [row[end]] * (len(row) - end - 1) if end < len(row) else True
        # Every row draws each column, stopped or not, so the others are not disturbed.
        if len(row) == len(free_row):
            assert row[:end] == free_row[:end]
        ends.append(end)
    assert new.shape[1] == min(60, max(ends) + 1)


def test_generation_of_a_row_ignores_its_padding():
    model = causal("flash")
    prompt, lengths = tokens(2, 6), torch.tensor([4, 6])
    other = prompt.clone()
    other[0, 4:] = 0
    draw = lambda text: model.generate(text, 9, lengths=lengths, seed=1)
    assert torch.equal(draw(prompt), draw(other))


# --- sampling ------------------------------------------------------------------------------------------------------


def test_sample_draws_from_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    n = 40_000
    drawn = sample(logits.expand(n, 4), 0.7, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=4) / n
    expected = (logits / 0.7).softmax(-1)
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt()).all()


def test_sample_limits():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, 4)
    kept = lambda **options: sorted(set(sample(logits, **options).tolist()))
    assert kept(temperature=0) == [0]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_k=99) == [0, 1, 2, 3]
    assert kept(top_p=0.4) == [0]
    assert kept(top_p=0.6) == [0, 1]
    assert kept(top_p=0.81) == [0, 1, 2]
    assert kept(top_p=1.0) == [0, 1, 2, 3]


# --- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_state_of_another_type_continues_to_its_rounding(kind):
    model, text = causal(kind), tokens(2, 8)
    expected = model(text)[:, 6:]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4), (torch.float16, 0.05)):
        for parts in (1, 2):  # tokens at once
            _, state = model(text[:, :6], return_state=True)
            moved = state.to(dtype)
            pieces = []
            for part in text[:, 6:].split(parts, dim=1):
                logits, moved = model(part, state=moved, return_state=True)
                pieces.append(logits)
            assert (torch.cat(pieces, 1) - expected).abs().max() < tolerance
            assert moved.position.tolist() == [8, 8]
            # The first state is not used up by what was done with its copy.
            again, _ = model(text[:, 6:], state=state, return_state=True)
            torch.testing.assert_close(again, expected, **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_state_that_does_not_fit_is_refused_and_left_alone(kind):
    model, text = causal(kind), tokens(2, 5)
    expected, _ = model(text, return_state=True)
    _, state = model(text[:, :4], return_state=True)
    _, other = causal(kind, depth=1)(text, return_state=True)
    for part, wrong, error, message in (
        (text[:, 4:], state.to("meta"), ValueError, "meta; expected .*cpu"),
        (text[:, 4:], replace(state, layers=state.to(device="meta").layers), ValueError, "on meta; expected .*cpu"),
        (text[:1, 4:], state, ValueError, r"`state.position` has shape \(2,\)"),
        (text[:1, 4:], replace(state, position=state.position[:1]), ValueError, r"cache has 2|shape \((2|8),\)"),
        (text[:, 4:], other, ValueError, "`state` has 1 layers; expected 2"),
        (text[:, 4:], [state], TypeError, "`state` is a list; expected a ModelState"),
        (text[:, 4:], replace(state, layers=[3, 3]), TypeError, "is a int; expected a"),
        (text[:, 4:].expand(-1, 2), state.to("meta"), ValueError, "meta"),
    ):
        with pytest.raises(error, match=message):
            model(part, state=wrong, return_state=True)
    logits, _ = model(text[:, 4:], state=state, return_state=True)
    torch.testing.assert_close(logits, expected[:, 4:], **TIGHT)
    for dtype in (torch.int64, torch.bool):
        with pytest.raises(TypeError, match=r"ModelState\.to: `dtype` is .*; expected float16"):
            state.to(dtype)


# --- loss ----------------------------------------------------------------------------------------------------------


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_lengths_and_tokens_of_every_integer_type(kind):
    """An empty row among long ones: in uint8 its length less one is 255."""
    model, text, lengths = causal(kind, depth=1), tokens(2, 280), torch.tensor([100, 0])
    expected = model.loss(text[:1, :100])
    for dtype in INTEGERS:
        torch.testing.assert_close(model.loss(text.to(dtype), lengths.to(dtype)), expected, **TIGHT)
    greedy = model.generate(text[:1, :9], 2, temperature=0)
    for dtype in INTEGERS:
        new = model.generate(text[:, :9].to(dtype), 2, lengths=torch.tensor([9, 1]).to(dtype), temperature=0)
        assert torch.equal(new[:1], greedy)
        _, state = model(text[:, :9].to(dtype), torch.tensor([9, 0]).to(dtype), return_state=True)
        assert state.position.tolist() == [9, 0]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_masking_tokens_of_every_integer_type(dtype):
    drawn = [
        mask_tokens(
            text, 256, 257, lengths=torch.tensor([300, 0, 7]).to(kind), generator=torch.Generator().manual_seed(1)
        )
        for text, kind in ((tokens(3, 300).to(dtype), torch.int64), (tokens(3, 300), torch.int16))
    ]
    for found, expected in zip(*drawn, strict=True):
        assert found.tolist() == expected.tolist()


def test_lengths_are_refused_by_name():
    model, text = causal("flash"), tokens(2, 9)
    for call in (
        lambda x: model.loss(text, x),
        lambda x: model(text, x),
        lambda x: mask_tokens(text, 22, 22, lengths=x),
    ):
        for lengths, error, message in (
            (torch.tensor([9, 10]), ValueError, "`lengths` holds 10; expected values from 0 to N = 9"),
            (torch.tensor([9, -1]), ValueError, "`lengths` holds -1"),
            (torch.tensor([9.0, 1.0]), TypeError, "`lengths` has dtype torch.float32; expected an integer"),
            (torch.tensor([9]), ValueError, r"`lengths` has shape \(1,\)"),
            ([9, 1], TypeError, "`lengths` is a list"),
        ):
            with pytest.raises(error, match=message):
                call(lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_generate_are_calls_of_the_model_and_its_layers(kind):
    """So hooks, `compile` and FSDP2 see them, the layers' single steps included."""
    model, text, seen = causal(kind), tokens(1, 5), []
    for name, module in (("model", model), *((f"layer {i}", layer) for i, layer in enumerate(model.stack.layers))):
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    once = ["layer 0", "layer 1", "model"]
    model.loss(text)
    model.loss(text, torch.tensor([3]))
    model.loss(text, cu_seqlens=torch.tensor([0, 5]))
    assert seen == 3 * once
    model.generate(text, 3)
    assert seen == 6 * once
    masked, calls = MaskedLM(config(kind)), []
    masked.register_forward_hook(lambda *_: calls.append(1))
    masked.loss(text, text)
    assert calls == [1]


def test_loss_runs_what_was_compiled():
    model, graphs = CausalLM(config("transformer++", depth=1)), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    expected = model.loss(tokens(1, 9))
    model.compile(backend=backend)
    torch.testing.assert_close(model.loss(tokens(1, 9)), expected)
    assert len(graphs) == 1


def shard_and_compare(rank, folder):
    """What each of two processes does: every method of a model sharded by FSDP2 beside the whole one."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    prompt, lengths = tokens(2, 4, seed=rank), torch.tensor([4, 2])
    for kind in ("flash", "transformer++"):
        torch.manual_seed(0)  # the same weights in both
        whole = causal(kind)
        expected = whole.loss(prompt, lengths), whole.generate(prompt, 6, lengths=lengths, seed=1)
        # A token of the first process's own text, so that it would stop before the other.
        stop = [int(expected[1][0, 1]), int(expected[1][1, 1])] if rank == 0 else None
        stopped = whole.generate(prompt, 6, lengths=lengths, seed=1, stop=stop)
        for per_layer in (True, False):
            model = copy.deepcopy(whole)
            for layer in model.stack.layers if per_layer else ():
                fully_shard(layer)
            fully_shard(model)
            assert torch.equal(model.generate(prompt, 6, lengths=lengths, seed=1), expected[1])
            loss = model.loss(prompt, lengths)
            torch.testing.assert_close(loss, expected[0], **TIGHT)
            found = model.generate(prompt, 6, lengths=lengths, seed=1, stop=stop)
            assert found.shape == (2, 6)
            assert torch.equal(found[:, : stopped.shape[1]], stopped)
            assert (found[:, stopped.shape[1] :] == stopped[:, -1:]).all()
            with pytest.raises(ValueError, match=r"`max_new_tokens` is .* another number in another process"):
                model.generate(prompt, 3 + rank)
            with pytest.raises(ValueError, match=r"save: `stack.\S+` is sharded, .*expected whole tensors"):
                model.save(f"{folder}/model")
    torch.distributed.destroy_process_group()


def test_methods_of_a_sharded_model_are_those_of_the_whole(tmp_path):
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]; import test_models; "
        "test_models.shard_and_compare(int(sys.argv[2]), sys.argv[3])"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    assert not (tmp_path / "model").exists()


def test_generating_leaves_each_module_in_its_mode():
    model = causal("flash").train()
    model.stack.layers[1].eval()
    before = [module.training for module in model.modules()]
    model.generate(tokens(1, 3), 2)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_last_logits_alone_are_those_of_all(kind):
    model, text, lengths = causal(kind), tokens(3, 9), torch.tensor([9, 1, 4])
    whole = model(text, lengths)
    last = model(text, lengths, last_only=True)
    torch.testing.assert_close(last[:, 0], whole[torch.arange(3), lengths - 1], **TIGHT)
    torch.testing.assert_close(model(text, last_only=True), model(text)[:, -1:], **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_cross_entropy_of_the_next_token(kind):
    model, text = causal(kind), tokens(3, 10)
    log_p = model(text[:, :-1]).log_softmax(-1)
    expected = -log_p.gather(-1, text[:, 1:, None]).mean()
    torch.testing.assert_close(model.loss(text), expected, **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_padded_and_packed_texts_is_that_of_the_texts(kind):
    model, lengths = causal(kind), [4, 1, 9]
    text = tokens(3, 9)
    total = sum(model.loss(text[b : b + 1, :n]) * (n - 1) for b, n in enumerate(lengths) if n > 1)
    expected = total / sum(n - 1 for n in lengths)
    torch.testing.assert_close(model.loss(text, torch.tensor(lengths)), expected, **TIGHT)
    packed = torch.cat([text[b, :n] for b, n in enumerate(lengths)])[None]
    bounds = torch.tensor([0, 4, 5, 14], dtype=torch.int32)
    torch.testing.assert_close(model.loss(packed, cu_seqlens=bounds), expected, **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(kind):
    text = tokens(2, 11)
    plain, again = causal(kind), causal(kind, checkpointing=True)
    again.load_state_dict(plain.state_dict())
    for model in (plain.train(), again.train()):
        model.loss(text).backward()
    for p, q in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_causal_models_see_no_future_and_masked_ones_do(kind):
    text = tokens(1, 12)
    other = text.clone()
    other[0, 8] = (other[0, 8] + 1) % VOCAB
    model = causal(kind)
    torch.testing.assert_close(model(other)[:, :8], model(text)[:, :8], **TIGHT)
    masked = stirred(MaskedLM(config(kind), dtype=torch.float64))
    assert not torch.allclose(masked(other)[:, 0], masked(text)[:, 0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(kind):
    torch.manual_seed(0)
    text = torch.arange(24).remainder(5).expand(4, 24)  # a pattern of five tokens
    for model, loss in (
        (CausalLM(config(kind)), lambda m: m.loss(text)),
        (MaskedLM(config(kind)), lambda m: m.loss(*mask_tokens(text, VOCAB - 1, VOCAB))),
    ):
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        start = loss(model).item()
        for _ in range(60):
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            optimizer.step()
        assert value < 0.6 * start


@pytest.mark.parametrize("kind", KINDS)
def test_masked_padded_and_packed_are_alone(kind):
    model, lengths = stirred(MaskedLM(config(kind), dtype=torch.float64)), [4, 7]
    text = tokens(2, 7)
    padded = model(text, torch.tensor(lengths))
    packed = model(torch.cat([text[0, :4], text[1]])[None], cu_seqlens=torch.tensor([0, 4, 11]))
    for b, (n, start) in enumerate(zip(lengths, (0, 4), strict=True)):
        alone = model(text[b : b + 1, :n])
        torch.testing.assert_close(padded[b : b + 1, :n], alone, **TIGHT)
        torch.testing.assert_close(packed[:, start : start + n], alone, **TIGHT)


def test_mask_tokens():
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(100, (50, 200), generator=generator)
    lengths = torch.full((50,), 150)
    inputs, targets = mask_tokens(text, 100, 100, lengths=lengths, generator=generator)
    chosen = targets != -100
    assert not chosen[:, 150:].any()
    assert torch.equal(targets[chosen], text[chosen])
    assert torch.equal(inputs[~chosen], text[~chosen])
    share = lambda mask: mask.float().mean().item()
    assert abs(share(chosen[:, :150]) - 0.15) < 0.02
    assert abs(share(inputs[chosen] == 100) - 0.8) < 0.05
    assert abs(share(inputs[chosen] == text[chosen]) - 0.1) < 0.04


# --- configurations, parameters, files -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_named_configurations(kind, size):
    named = ModelConfig.named(f"{kind}-{size}", checkpointing=True)
    assert named.kind == kind
    assert named.checkpointing
    assert ModelConfig.from_json(named.to_json()) == named
    assert json.loads(named.to_json()) == named.to_dict()
    model = CausalLM(named, device="meta")
    if size == "base":
        assert 100e6 < model.num_parameters() < 125e6
    if size == "tiny":
        assert model.num_parameters() < 1e6


def test_configuration_survives_tuples():
    order = ("quad_q", "lin_q", "quad_k", "lin_k")
    named = ModelConfig(layer={"head_order": order})
    assert ModelConfig.from_dict(named.to_dict()) == named
    assert CausalLM(named, device="meta").stack.layers[0].head_order == order


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_start_small_and_the_loss_at_log_vocab(kind):
    torch.manual_seed(1)
    model = CausalLM(config(kind, dim=64))
    for name, p in model.named_parameters():
        if name.endswith("weight") and p.ndim == 2:
            assert abs(p.std() - 0.02) < 0.002, name
    assert abs(model.loss(tokens(8, 64)) - math.log(VOCAB)) < 0.1


def test_tied_matrices_count_once_and_are_stored_once():
    tied, untied = CausalLM(config("flash")), CausalLM(config("flash", tied=False, head_bias=True))
    assert untied.num_parameters() - tied.num_parameters() == VOCAB * 24 + VOCAB
    storages = [t.data_ptr() for t in tied.state_dict().values()]
    assert len(storages) == len(set(storages))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind):
    model, text, file = causal(kind), tokens(1, 9), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = CausalLM(config(kind), dtype=torch.float64).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(text), model(text))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("model_class", [CausalLM, MaskedLM, Encoder])
@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_a_saved_model_is_the_model(kind, changes, model_class, dtype, tmp_path):
    model, text = stirred(model_class(config(kind, **changes)).to(dtype)), tokens(2, 9)
    path = tmp_path / "model.safetensors"
    model.save(path)
    again = load(str(path))
    assert type(again) is model_class
    assert again.config == model.config
    assert not again.training
    assert torch.equal(again(text), model(text))
    assert all(p.requires_grad for p in again.parameters())
    # Any reader of safetensors sees the weights under their names.
    weights = safetensors.load_file(path)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert {value.dtype for value in again.state_dict().values()} == {dtype}
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_a_loaded_model_owns_its_memory(kind, changes, tmp_path):
    model = stirred(CausalLM(config(kind, **changes), dtype=torch.float64))
    path = tmp_path / "model.safetensors"
    model.save(path)
    again = load(path)
    check_owned([*again.parameters(), *again.buffers()])
    path.write_bytes(bytes(path.stat().st_size))  # what becomes of the file is nothing to it
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_a_model_keeps_a_dtype_per_tensor(tmp_path):
    model = causal("flash").to(torch.bfloat16)
    model.stack.layers[1].float()
    model.save(tmp_path / "x")
    for name, value in load(tmp_path / "x").state_dict().items():
        assert value.dtype == (torch.float32 if "layers.1." in name else torch.bfloat16)


def test_saving_leaves_existing_files_alone(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"mine")
    model = causal("flash")
    with pytest.raises(FileExistsError, match=r"model\.safetensors, which exists; expected a new name, or `overwrite"):
        model.save(path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(OSError, match="No space left on device; the previous one"):
                model.save(path, overwrite=True)
        assert path.read_bytes() == b"mine"
    with pytest.raises(OSError, match=r"cannot write .*none"):
        model.save(tmp_path / "none" / "model.safetensors")
    assert os.listdir(tmp_path) == [path.name]
    model.save(path, overwrite=True)
    assert torch.equal(load(path)(tokens(1, 5)), model(tokens(1, 5)))


def test_files_that_hold_no_model(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="where no file is; expected one that a model's `save` wrote"):
        load(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load(path)
    safetensors.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no model's configuration"):
        load(path)

    model = causal("flash")
    model.save(path, overwrite=True)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load(path)


def test_a_header_of_another_kind_is_one_line_before_anything_is_made_of_it(tmp_path):
    """A number in a header costs nothing: neither the memory nor the time of as many layers or channels."""
    path, model = tmp_path / "x.safetensors", causal("flash")
    values, weights = model.config.to_dict(), model.state_dict()
    described = {"class": "CausalLM", "config": values}

    def changed(**changes):
        return described | {"config": values | changes}

    integers = {name: value.to(torch.int64) for name, value in weights.items()}
    deep = 0
    for _ in range(900):
        deep = [deep]
    cases = [
        ("[" * 100_000, "recursion"),
        ("{", "describes no model of this version"),
        ("[]", "expected a `class` and its `config`"),
        ({"config": values}, "expected a `class` and its `config`"),
        ({"class": "CausalLM"}, "expected a `class` and its `config`"),
        ({"class": ["CausalLM"], "config": values}, "describes no model of this version"),
        ({"class": "CausalLM", "config": 3}, "expected values by names of fields"),
        (changed(dim="a"), "`dim` is 'a'; expected an int"),
        (changed(dim=True), "`dim` is True; expected an int"),
        (changed(dim=24.0), "`dim` is 24.0; expected an int"),
        (changed(hidden=-1), "`hidden` is -1; expected at least 1"),
        (changed(tied=1), "`tied` is 1; expected True or False"),
        (changed(spec=None), "`spec` is None; expected a str"),
        (changed(layer=[1]), "expected a dict of keyword arguments"),
        (changed(kind="lion"), "`kind` is 'lion'"),
        (changed(layer={"option_of_2027": 1}), "option_of_2027"),
        (changed(layer={"score": "relu3"}), "`score` is 'relu3'"),
        (changed(layer={"lin_normalizer": "words"}), "`lin_normalizer` is 'words'"),
        (changed(layer={"token_shift": "no"}), "`token_shift` is 'no'; expected True or False"),
        (changed(layer={"norm": "norm_of_2027"}), "norm_of_2027"),
        (changed(layer={"rotary_dim": "all"}), "`rotary_dim` is 'all'"),
        (changed(layer={"qk_dropout": 2.0}), "`qk_dropout` is 2.0"),
        (changed(layer={"deep": deep}), "deep"),
        (changed(layer={"device": "cpu"}), "device"),
        (changed(norm="norm_of_2027"), "norm_of_2027"),
        (changed(depth=100_000), "`depth` is 100000, and there are 2 layers"),
        (changed(dim=10**6), r"stack.embedding.weight has shape \(23, 24\), expected \(23, 1000000\)"),
        (changed(dim=10**9), "describes no model of this version|expected"),
        (changed(vocab_size=10**12), r"expected \(1000000000000, 24\)"),
        (changed(hidden=10**18), "describes no model of this version|expected"),
        (changed(hidden=10**30), "describes no model of this version"),
        (changed(chunk_size=10**9), r"expected \(1999999999,\)"),
        (changed(kind="transformer", heads=24, layer={"head_dim": 10**9}), "missing|expected"),
        (changed(kind="transformer", layer={"device": "cpu", "head_dim": 10**9}), "device"),
        (
            changed(kind="transformer++", layer={"bias": "alibi", "head_dim": 10**6, "rotary_dim": 0}),
            "missing|expected",
        ),
    ]
    for description, message in cases:
        text = description if isinstance(description, str) else json.dumps(description)
        safetensors.save_file(weights, path, {"flashgau_model": text})
        with pytest.raises(ValueError, match=message) as caught:
            load(path)
        said = str(caught.value)
        assert said.startswith(f"load: {path} ")
        assert "\n" not in said
        assert len(said) < 800 + len(str(path))
    safetensors.save_file(integers, path, {"flashgau_model": json.dumps(described)})
    with pytest.raises(ValueError, match=r"in torch\.int64; expected a floating type"):
        load(path)
    safetensors.save_file(
        weights | {"x" * 9000 + "\n": torch.zeros(1)}, path, {"flashgau_model": json.dumps(described)}
    )
    with pytest.raises(ValueError, match=r"does not fit its own configuration: unexpected xxx.* \.\.\.$"):
        load(path)
    safetensors.save_file(weights, path, {"flashgau_model": json.dumps(described)})
    assert torch.equal(load(path)(tokens(1, 9)), model(tokens(1, 9)))


def test_a_model_without_numbers_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"save: `stack\.embedding\.weight` is on the device 'meta'"):
        CausalLM(config("flash"), device="meta").save(tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_files_of_other_models(tmp_path):
    path, model = tmp_path / "x.safetensors", causal("flash")
    described = {"class": "CausalLM", "config": model.config.to_dict()}
    weights = model.state_dict()
    del weights["stack.norm.weight"]
    for description, message in (
        (described, r"does not fit its own configuration: (?s:.*)stack\.norm\.weight"),
        (described | {"class": "Lion"}, "holds a Lion; expected one of CausalLM, MaskedLM, Encoder"),
        (described | {"config": {"colour": 1}}, "no field is called colour"),
    ):
        safetensors.save_file(weights, path, {"flashgau_model": json.dumps(description)})
        with pytest.raises(ValueError, match=message):
            load(path)


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_an_encoder_is_the_masked_model_without_its_head(kind, changes):
    masked = stirred(MaskedLM(config(kind, **changes), dtype=torch.float64))
    encoder = Encoder(masked.config, dtype=torch.float64)
    encoder.stack.load_state_dict(masked.stack.state_dict())
    text, lengths = tokens(2, 9), torch.tensor([9, 4])
    torch.testing.assert_close(masked.head(encoder(text, lengths)), masked(text, lengths), **TIGHT)
    assert encoder.num_parameters() <= masked.num_parameters()


def test_embedding_norm_is_before_the_first_layer():
    model = causal("flash", embedding_norm="rms", positions="scaled_sin", depth=1)
    embedded = model.stack.embedding.weight + model.stack.positions(torch.zeros(VOCAB, dtype=torch.int64))
    rms = embedded / (embedded.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    text = torch.arange(VOCAB)[:, None]
    expected = model.head(model.stack.norm(model.stack.layers[0](rms[:, None])))
    torch.testing.assert_close(model(text), expected, **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_bf16(kind):
    torch.manual_seed(0)
    model, text = CausalLM(config(kind)), tokens(2, 20)
    exact = model.loss(text)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(text)
        new = model.generate(text, 4, temperature=0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < 0.02
    assert new.shape == (2, 4)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["flash", "transformer++"])
def test_bf16_parameters(kind):
    model, text = CausalLM(config(kind)).to(torch.bfloat16), tokens(2, 20)
    loss = model.loss(text)
    loss.backward()
    assert loss.dtype == torch.float32
    assert model.generate(text, 3, temperature=0).shape == (2, 3)


def test_torch_compile():
    model, text = CausalLM(config("flash")), tokens(1, 9)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(text), model(text))


def test_cross_entropy_counts_only_the_targets():
    model, text = MaskedLM(config("flash")), tokens(1, 9)
    targets = torch.full_like(text, -100)
    targets[0, 4] = 3
    expected = F.cross_entropy(model(text)[0, 4:5], torch.tensor([3]))
    torch.testing.assert_close(model.loss(text, targets), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": "64"}, "`dim` is '64'; expected an int"),
        ({"depth": True}, "`depth` is True; expected an int"),
        ({"tied": "no"}, "`tied` is 'no'; expected True or False"),
        ({"layer": {"x": torch.zeros(1)}}, "`layer` is no JSON object"),
        ({"layer": "fast"}, "`layer` is 'fast'; expected a dict"),
    ],
)
def test_configurations_of_the_wrong_types_are_refused(changes, message):
    with pytest.raises(TypeError, match=f"ModelConfig: {message}"):
        ModelConfig(**changes)


one = tokens(1, 4)
ERRORS = {
    "kind": (lambda: ModelConfig(kind="rnn"), "`kind` is 'rnn'; expected one of flash"),
    "positive": (lambda: ModelConfig(depth=0), "`depth` is 0"),
    "positions": (lambda: ModelConfig(positions="learned"), "`positions` is 'learned'"),
    "name": (lambda: ModelConfig.named("flash-huge"), "no configuration is called 'flash-huge'"),
    "field": (lambda: ModelConfig.from_dict({"width": 3}), "no field is called width"),
    "shape": (lambda: causal("flash")(one[0]), r"`tokens` has shape \(4,\); expected \(B, N\)"),
    "range": (lambda: causal("flash")(one + VOCAB), "expected 0 to 22"),
    "loss": (lambda: causal("flash").loss(one[:, :1]), "N at least 2"),
    "targets": (lambda: MaskedLM(config("flash")).loss(one, one[:, :2]), "`targets` has shape"),
    "packed-state": (
        lambda: causal("flash")(one, cu_seqlens=torch.tensor([0, 4]), return_state=True),
        "`cu_seqlens` and a state",
    ),
    "prompt": (lambda: causal("flash").generate(one[:, :0], 3), "`prompt` has shape"),
    "new": (lambda: causal("flash").generate(one, -1), "`max_new_tokens` is -1"),
    "lengths": (lambda: causal("flash").generate(one, 1, lengths=torch.tensor([5])), "numbers from 1 to 4"),
    "temperature": (lambda: causal("flash").generate(one, 1, temperature=-1.0), "`temperature` is -1"),
    "top_k": (lambda: causal("flash").generate(one, 1, top_k=0), "`top_k` is 0"),
    "top_p": (lambda: causal("flash").generate(one, 1, top_p=1.5), "`top_p` is 1.5"),
    "keys": (
        lambda: causal("flash-quad", layer={"normalizer": "keys"}).generate(one, 1),
        'normalizer "keys" divides by the full length',
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_tokens_must_be_integers():
    with pytest.raises(TypeError, match=r"torch.float32; expected an integer type"):
        CausalLM(config("flash"))(torch.zeros(1, 3))
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        CausalLM(config("flash", layer={"colour": 1}))
