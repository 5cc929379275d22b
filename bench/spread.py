"""A model, not a measurement, of one sequence over many GPUs: `python -m bench.spread` prints the table of
docs/distributed.md.

Bytes are those of `flashgau.distributed.ways`, which tests hold to what processes send. Seconds are products over one
rate and bytes over another, of one call and its backward; what a ring or a window sends travels beside its products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flashgau.distributed.agreement import ranges, shares
from flashgau.distributed.scan import Chain
from flashgau.distributed.sight import Sight
from flashgau.distributed.ways import Sent, Widths, bytes_of_gau, bytes_of_mixed_chunk, bytes_sent

RATE = 500e12  # FLOP/s of products in bf16, attained
WITHIN, BETWEEN, NODE = 380e9, 50e9, 8  # bytes/s of a GPU, one way: to the GPUs of its node, and to others
GPUS, TOKENS = (8, 64, 1024), (10**6, 10**7, 10**8)
HEADS, WIDTH, WINDOW = 32, 128, 4096
NARROW, WIDE, CHUNK = 128, 2048, 256
HALF = 2  # bytes


@dataclass(frozen=True)
class Load:
    """What the busiest process has to do in a forward and a backward.

    Attributes:
        flop: of products.
        sent: bytes.
        near: the part of these that goes to the same node.
    """

    flop: float
    sent: float
    near: float

    @property
    def compute(self) -> float:
        """Seconds."""
        return self.flop / RATE

    @property
    def communicate(self) -> float:
        """Seconds."""
        return self.sent * (self.near / WITHIN + (1 - self.near) / BETWEEN)


def attention(way: str, kv_heads: int, gpus: int, tokens: int) -> Load | None:
    """Causal softmax attention in layers of 32 heads; None where it cannot go so.

    A backward computes 2.5 times what a forward does.
    """
    if way == "heads" and gpus > HEADS:
        return None
    even = _slices(gpus, tokens)
    sight = Sight(even, even, (WINDOW if way == "window" else None, 0))
    sent = bytes_sent(way, Widths(1, HEADS, kv_heads, WIDTH, WIDTH, HALF), sight)
    pairs = tokens * min(WINDOW, tokens) if way == "window" else tokens**2 / 2
    forward = 4 * HEADS * WIDTH * pairs / gpus
    if way == "ring":  # the last process sees all keys, and computes its parts again; the one before it sends most
        busiest = (2 * gpus - 1) / gpus
        return Load(4.5 * forward * busiest, _of_one(sent, gpus) * 2, 0 if gpus > NODE else 1)
    if way == "window":  # the first process of a node has its neighbours in another
        return Load(3.5 * forward, _of_one(sent, gpus), 0 if gpus > NODE else 1)
    near = min(1, (NODE - 1) / (gpus - 1))
    return Load(3.5 * forward, _of_one(sent, gpus), near)


def gau(gpus: int, tokens: int) -> Load:
    """Causal gated attention with a gate; every process computes all scores."""
    even = _slices(gpus, tokens)
    sent = bytes_of_gau(1, (NARROW, WIDE), HALF, Sight(even, even, (None, 0)))
    return Load(3.5 * tokens**2 * (NARROW + WIDE / gpus), _of_one(sent, gpus), min(1, (NODE - 1) / (gpus - 1)))


def mixed_chunk(gpus: int, tokens: int) -> Load:
    """Causal; its backward computes twice what the forward does."""
    # The busiest process sends in every round, always to another node if there is one: the last of its own does.
    sent = bytes_of_mixed_chunk(1, (NARROW, WIDE), HALF, len(Chain(tuple(range(gpus)), 1).rounds))
    per_token = 2 * CHUNK * (NARROW + WIDE) + 4 * NARROW * WIDE
    return Load(3 * per_token * tokens / gpus, sum(sent), 0 if gpus > NODE else 1)


def _slices(gpus: int, tokens: int) -> tuple[tuple[int, int], ...]:
    return ranges(shares(tokens, gpus))


def _of_one(sent: Sent, gpus: int) -> float:
    return (sent.forward + sent.backward) / gpus


def rows() -> Iterator[str]:
    """The table, line by line."""
    yield "| | GPUs | " + " | ".join(f"{tokens // 10**6}M tokens" for tokens in TOKENS) + " |"
    yield "|---|---|" + "---|" * len(TOKENS)
    for name, load in (
        ("attention by heads, 8 key heads", lambda *sizes: attention("heads", 8, *sizes)),
        ("by ring, 8 key heads", lambda *sizes: attention("ring", 8, *sizes)),
        ("by ring, 1 key head", lambda *sizes: attention("ring", 1, *sizes)),
        ("by window, 8 key heads", lambda *sizes: attention("window", 8, *sizes)),
        ("gau", gau),
        ("mixed chunk", mixed_chunk),
    ):
        for gpus in GPUS:
            found = [load(gpus, tokens) for tokens in TOKENS]
            if None not in found:
                yield f"| {name} | {gpus} | " + " | ".join(_cell(x) for x in found if x is not None) + " |"


def _cell(load: Load) -> str:
    return f"{_short(load.sent / 1e6)} MB, {_short(load.compute)} + {_short(load.communicate)} s"


def _short(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.2g}"


if __name__ == "__main__":
    print("\n".join(rows()))
