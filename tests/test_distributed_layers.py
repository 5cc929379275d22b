"""Layers and models over several processes are those in one: output, gradients of the input and of parameters."""

from __future__ import annotations

import re
from typing import Any

import distributed_world
import pytest
import torch
from distributed_world import MEMBERS, World, gradients_of, pieces
from strategies import randn
from torch import Tensor, nn

from flashgau.distributed import cut_tokens, spread_tokens
from flashgau.models import CausalLM, Encoder, MaskedLM, ModelConfig
from flashgau.nn import FLASH, GAU, MultiHeadAttention, MultiHeadMixedChunk, Spread

alone = distributed_world.alone
world = distributed_world.world

N, WIDTH = 16, 12
# Whole chunks of 4 tokens; an empty slice first, in the middle and last.
CUTS = {"all": [[4, 12], [0, 8], [8, 8], [12, 16]], "pair": [[8], [12], [0], [16]]}
LENGTHS, BOUNDS = torch.tensor([16, 7]), torch.tensor([0, 3, 3, 10, 16], dtype=torch.int32)
# Where they are allowed: attention and GAU cut anywhere.
ANYWHERE = {"all": [[1, 10], [3, 4]], "pair": [[5], [15]]}

LAYERS: dict[str, Any] = {
    "attention": lambda: MultiHeadAttention(WIDTH, 6, kv_heads=3, causal=True, bias="alibi", gate="elementwise"),
    "attention, table": lambda: MultiHeadAttention(WIDTH, 3, bias="toeplitz", max_length=N, gate="headwise"),
    "attention, buckets": lambda: MultiHeadAttention(WIDTH, 3, rotary_dim=2, bias="t5"),
    "attention, one head for all": lambda: MultiHeadAttention(WIDTH, 2, kv_heads=1, causal=True),
    "gau": lambda: GAU(WIDTH, key_dim=4, causal=True, normalizer="row", token_shift=True),
    "gau, both ways": lambda: GAU(WIDTH, key_dim=4, token_shift=True, bias="toeplitz", max_length=N),
    "gau, lucidrains": lambda: GAU(WIDTH, key_dim=4, spec="lucidrains"),
    "gau, softmax": lambda: GAU(WIDTH, key_dim=4, spec="gau-alpha", causal=True),
    "flash": lambda: FLASH(WIDTH, key_dim=4, chunk_size=4, causal=True, token_shift=True),
    "flash, both ways": lambda: FLASH(WIDTH, key_dim=4, chunk_size=4, bias="rotary", score="laplace"),
    "flash, lucidrains": lambda: FLASH(
        WIDTH, key_dim=4, chunk_size=4, causal=True, spec="lucidrains", token_shift=True
    ),
    "mixed chunk": lambda: MultiHeadMixedChunk(WIDTH, 6, kv_heads=2, chunk_size=4, causal=True),
    "mixed chunk, biased": lambda: MultiHeadMixedChunk(WIDTH, 3, chunk_size=4, causal=True, score="laplace"),
    "mixed chunk, both ways": lambda: MultiHeadMixedChunk(WIDTH, 3, chunk_size=4, rotary_dim=0, bias="t5"),
}
CHUNKED = ("flash", "mixed")  # how names begin
UNPACKED = (*CHUNKED, "gau, lucidrains")  # whose bias is divided by the length of each sequence
MODELS = {
    **{f"{kind}, causal": (CausalLM, kind) for kind in ("flash", "flash-quad", "transformer", "mc-tfm++")},
    **{f"{kind}, masked": (MaskedLM, kind) for kind in ("flash", "flash-quad", "transformer++")},
    "transformer, encoder": (Encoder, "transformer"),
}


def made(name: str) -> nn.Module:
    """A layer or model in fp64, all of whose parameters matter."""
    torch.manual_seed(5)
    if name in LAYERS:
        module = LAYERS[name]().double()
    else:
        make, kind = MODELS[name]
        config = ModelConfig(
            kind=kind,
            dim=WIDTH,
            depth=2,
            heads=3,
            key_dim=4,
            chunk_size=4,
            checkpointing=kind in ("flash", "transformer"),
        )
        module = make(config, dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def check_equal(world: World, name: str, x: Tensor, cuts: list[int], group: str, **options: Any) -> None:
    """Outputs are put together, and gradients of parameters added up."""
    module, rows = made(name), x.shape[0]
    with torch.no_grad():
        weight = randn(9, *module(x).shape, dtype=torch.float64)
    if (lengths := options.get("lengths")) is not None:
        weight *= (torch.arange(N) < lengths[:, None])[..., None]
    own = x.detach().requires_grad_() if x.is_floating_point() else x
    expected = gradients_of(module, own, weight, **options)
    parts = list(zip(pieces(x, 1, cuts), pieces(weight, 1, cuts), strict=True))
    members = len(MEMBERS[group])
    found = world.results("layered", parts, [{"module": module, **options}] * members, group=group)
    results = [list(parts) for parts in zip(*(results for results, _ in found), strict=True)]
    split = 2 if x.is_floating_point() else 1
    assert len(results) == len(expected)
    seen = weight != 0
    for place, (ours, whole) in enumerate(zip(results, expected, strict=True)):
        joined = torch.cat(ours, 1) if place < split else torch.stack(ours).sum(0)
        if place == 0:
            joined, whole = joined[seen], whole.detach()[seen]
        error = (joined - whole).abs().max() if whole.numel() else torch.zeros(())
        assert joined.shape == whole.shape
        assert error <= 1e-10 * max(1.0, float(whole.abs().max())), (name, cuts, rows, place, float(error))


@pytest.mark.parametrize("group", ["all", "pair"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_those_of_one_process(name: str, group: str, world: World) -> None:
    """With slices of unequal lengths, or empty; also padded and packed."""
    x = randn(1, 2, N, WIDTH, dtype=torch.float64)
    chunked = name.startswith(CHUNKED)
    for cuts in CUTS[group] + ([] if chunked else ANYWHERE[group]):
        check_equal(world, name, x, cuts, group)
    for cuts in CUTS[group][:2]:
        check_equal(world, name, x, cuts, group, lengths=LENGTHS)
    if not name.startswith(UNPACKED):
        for cuts in CUTS[group][:2] + ANYWHERE[group]:
            check_equal(world, name, x[:1], cuts, group, cu_seqlens=BOUNDS)
    if chunked:
        for cuts in {"all": [[3, 14], [7, 7]], "pair": [[7], [10]]}[group]:  # between the chunks of 4 of the sequences
            check_equal(world, name, x[:1], cuts, group, cu_seqlens=BOUNDS)


@pytest.mark.parametrize("name", MODELS)
def test_models_equal_those_of_one_process(name: str, world: World) -> None:
    tokens = torch.randint(256, (2, N), generator=torch.Generator().manual_seed(3))
    for group in ("all", "pair"):
        check_equal(world, name, tokens, CUTS[group][0], group)
        check_equal(world, name, tokens, CUTS[group][1], group, lengths=LENGTHS)
    chunked = name.startswith(("flash,", "mc"))
    check_equal(world, name, tokens[:1], [7] if chunked else ANYWHERE["pair"][0], "pair", cu_seqlens=BOUNDS)


@pytest.mark.parametrize("kind", ["flash", "flash-quad", "transformer++", "mc-tfm++"])
def test_with_checkpointing_a_process_keeps_its_share(kind: str, world: World) -> None:
    """Of what one process keeps for the backward, half in each of two."""
    config = ModelConfig(kind=kind, dim=16, depth=2, heads=2, key_dim=8, chunk_size=16, checkpointing=True)
    model, tokens = CausalLM(config), torch.zeros(1, 128, dtype=torch.int64)
    parts = [[part] for part in pieces(tokens, 1, [64])]
    shares = [int(results[0]) for results, _ in world.results("kept", parts, [{"module": model}] * 2, group="pair")]
    whole = int(distributed_world.kept(tokens, module=model, group=None)[0])
    assert all(2 * share <= 1.05 * whole for share in shares), (shares, whole)


@pytest.mark.parametrize(
    ("name", "cuts", "tokens", "options", "errors"),
    [
        (
            "gau",
            [8],
            [8, 7],
            {},
            [
                r"process 0 is in a call of token_shift, process 2 is in a call of a layer; expected the same",
                r"GAU: `x` has shape \(2, 8, 12\); expected 7 tokens, which `spread` has for process 1 of 2",
            ],
        ),
        (
            "flash",
            [6],
            None,
            {},
            [r"context_parallel_mixed_chunk: `quad_q` has 6 tokens in process 0; expected a multiple of chunk_size = 4"]
            * 2,
        ),
        ("gau", [8], None, {"return_state": True}, ["GAU: `return_state` and `spread` together; expected one of"] * 2),
        (
            "mixed chunk",
            [8],
            None,
            {"cu_seqlens": BOUNDS},
            ["MultiHeadMixedChunk: `x` has B = 2 rows; expected B = 1"] * 2,
        ),
    ],
)
def test_what_a_layer_refuses(
    name: str, cuts: list[int], tokens: Any, options: dict[str, Any], errors: list[str], world: World
) -> None:
    """In all processes, whichever met it."""
    x = randn(1, 2, N, WIDTH, dtype=torch.float64)
    parts = [[part, part] for part in pieces(x, 1, cuts)]
    own = [{"module": made(name), "tokens": None if tokens is None else tokens[i], **options} for i in range(2)]
    found = world.errors("layered", parts, own, group="pair")
    for (kind, said), error in zip(found, errors, strict=True):
        assert kind is ValueError
        assert re.search(error, said)


def test_tokens_out_of_the_vocabulary_in_one_process(world: World) -> None:
    """The others do not wait for it."""
    tokens = torch.zeros(2, N, dtype=torch.int64)
    tokens[1, 12] = 256
    parts = [[part, part] for part in pieces(tokens, 1, [8])]
    found = world.errors("layered", parts, [{"module": made("flash, causal")}] * 2, group="pair")
    assert "process 2 is in a call of a layer" in found[0][1]
    assert "model: `tokens` has values from 0 to 256" in found[1][1]


@pytest.mark.parametrize(
    ("error", "tokens", "said"),
    [
        (TypeError, 2.0, "spread_tokens: `tokens` is a float; expected an int"),
        (TypeError, True, "spread_tokens: `tokens` is a bool"),
        (ValueError, -1, "spread_tokens: `tokens` is -1; expected 0 or more"),
    ],
)
def test_tokens_are_a_number(error: type[Exception], tokens: Any, said: str, alone: None) -> None:
    with pytest.raises(error, match=said):
        spread_tokens(tokens)


def test_one_process_alone(alone: None) -> None:
    """What a slice says of itself; and a layer with an operation of its own cannot use it."""
    spread = spread_tokens(N)
    assert (spread.counts, spread.own, spread.start, spread.total) == ((N,), slice(0, N), 0, N)
    assert isinstance(spread, Spread)
    layer = GAU(WIDTH, key_dim=4, attention_fn=lambda *args, **options: args[2])
    with pytest.raises(ValueError, match="GAU: `attention_fn` and `spread` together; expected one of them"):
        layer(torch.zeros(1, N, WIDTH), spread=spread)


def test_cuts_are_whole_chunks() -> None:
    layers = nn.ModuleList([FLASH(WIDTH, key_dim=4, chunk_size=4), FLASH(WIDTH, key_dim=4, chunk_size=6)])
    for length, parts in ((100, 3), (24, 2), (13, 2), (12, 1)):
        cuts = cut_tokens(length, parts, layers)
        assert [cut.start for cut in cuts[1:]] == [cut.stop for cut in cuts[:-1]]
        assert (cuts[0].start, cuts[-1].stop) == (0, length)
        assert all(cut.start % 12 == 0 for cut in cuts)
        assert all(cut.stop > cut.start for cut in cuts)
    assert cut_tokens(7, 3) == [slice(0, 3), slice(3, 5), slice(5, 7)]
    with pytest.raises(ValueError, match="`parts` is 3; expected 1 to 2, as a `length` of 13 tokens has 2 chunks of"):
        cut_tokens(13, 3, layers)
    with pytest.raises(ValueError, match="`parts` is 0; expected 1 to"):
        cut_tokens(13, 0)


@pytest.mark.parametrize("layer", [GAU(16), FLASH(16), MultiHeadAttention(16, 2), MultiHeadMixedChunk(16, 2)])
def test_what_is_no_spread_is_refused(layer: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"{type(layer).__name__}: `spread` is a int; expected what `flashgau.distri"):
        layer(torch.randn(1, 4, 16), spread=3)
