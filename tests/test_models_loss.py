"""Language models: loss, masked tokens, integers of every type, and models over several processes."""

import copy

import pytest
import torch
from small_models import TIGHT, VOCAB, causal, config, stirred, tokens
from started import finish, started

from flashgau.models import KINDS, CausalLM, MaskedLM, mask_tokens

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


def work(rank, folder):
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
    finish([started("test_models_loss", rank, tmp_path) for rank in range(2)], 300)
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
