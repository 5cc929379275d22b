"""Language models: decoding is the parallel forward, sampling, and states."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import TIGHT, VARIANTS, causal, tokens

from flashgau.models import KINDS, sample

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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [None, [2, 9, 5]])
def test_prompts_read_in_pieces_are_the_prompts(kind, lengths):
    model, prompt, read = causal(kind), tokens(3, 9), []
    lengths = None if lengths is None else torch.tensor(lengths)
    options = {"lengths": lengths, "temperature": 0}
    whole = model.generate(prompt, 7, **options)
    assert torch.equal(model.generate(prompt, 7, piece=4, progress=lambda *n: read.append(n), **options), whole)
    at_once = lengths is not None and kind not in ("flash", "mc-tfm++")
    assert read == ([(9, 9)] if at_once else [(4, 9), (8, 9), (9, 9)])


@pytest.mark.parametrize("piece", [0, -1, 2.0, None])
def test_a_piece_is_a_number_of_tokens(piece):
    with pytest.raises(ValueError, match=f"generate: `piece` is {piece!r}; expected a number of tokens, at least 1"):
        causal("flash").generate(tokens(1, 3), 2, piece=piece)


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
