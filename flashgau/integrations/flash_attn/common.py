"""What the functions share: how their arguments become those of `flashgau.attention`, and its results theirs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashgau.bias import alibi_bias
from flashgau.contract.validate import Arguments
from flashgau.ops.attention import attend, attend_in_pages
from flashgau.options import AttentionOptions, Layout, Pages

from ..packing import end_to_end
from .helpers import within

# What `flashgau.attention` calls the arguments of these functions.
_THEIRS = {
    "cu_seqlens": "cu_seqlens_q",
    "leftpad": "cache_leftpad",
    "lengths": "cache_seqlens",
    "rel_bias": "alibi_slopes",
    "scale": "softmax_scale",
    "window": "window_size",
}


class Given(NamedTuple):
    """The options that all functions have, unchecked."""

    dropout_p: float
    scale: float | None
    causal: bool
    window: tuple[int, int]
    softcap: float
    slopes: Tensor | None
    deterministic: bool
    more: bool

    def checked(self, args: Arguments) -> dict[str, Any]:
        """Those of `flashgau.attention` but for dropout and bias."""
        return checked_options(args, self.scale, self.causal, self.window, self.softcap, self.deterministic, self.more)


def attend_batch(
    args: Arguments,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    pages: Pages | None = None,
    backend: str | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`flashgau.attention` and its log-sum-exp; what it refuses, it refuses in the words of the caller.

    With `pages` Triton's kernels read k and v (pages, Hkv, tokens of a page, .) where they are.
    """
    names = dict(args.names or {})
    names |= {ours: names.get(theirs, theirs) for ours, theirs in _THEIRS.items()}
    layout = Layout(lengths, cu_seqlens, cu_seqlens_k)
    own, given = Arguments(args.op, names), AttentionOptions(**options)
    if pages is not None:
        return attend_in_pages(own, q, k, v, pages, given, layout)
    out, lse = attend(own, q, k, v, given, layout, return_lse=True, backend=backend)
    return out, lse


def attend_packed(
    args: Arguments, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, bias: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences (tokens, H, .): (tokens, H, E) and the log-sum-exp (H, tokens)."""
    if bias is not None and bias.ndim == 3:  # one packed row has one bias: sequence by sequence
        ends = list(zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False))
        parts = [
            attend_packed(
                args, q[a:b], k[c:d], v[c:d], cu_q.new_tensor([0, b - a]), cu_k.new_tensor([0, d - c]), own, **options
            )
            for (a, b, c, d), own in zip(ends, bias, strict=True)
        ]
        if not parts:
            return q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_zeros(q.shape[1], 0)
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, lse = attend_batch(args, *rows, cu_seqlens=cu_q, cu_seqlens_k=cu_k, rel_bias=bias, **options)
    return out[0].transpose(0, 1), lse[0]


def attend_packed_pages(
    args: Arguments, q: Tensor, k: Tensor, v: Tensor, pages: Pages, cu_q: Tensor, cu_k: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """`attend_packed` to keys and values (pages, tokens of a page, Hkv, .)."""
    heads_first = q.transpose(0, 1)[None], k.transpose(1, 2), v.transpose(1, 2)
    out, lse = attend_batch(args, *heads_first, cu_seqlens=cu_q, cu_seqlens_k=cu_k, pages=pages, **options)
    return out[0].transpose(0, 1), lse[0]


def segments(queries: Tensor, begin: Tensor, end: Tensor, held: int) -> tuple[Tensor, Tensor]:
    """Rows of `held` tokens as one packed row: (queries, keys) is cut into (0, before), (M, valid), (0, behind)."""
    none = torch.zeros_like(queries)
    return end_to_end((none, begin), (queries, end - begin), (none, held - end))


def of_segments(bias: Tensor | None) -> Tensor | None:
    """A bias of each row, for each of the row's segments."""
    return bias.repeat_interleave(3, dim=0) if bias is not None and bias.ndim == 3 else bias


def unpacked(args: Arguments, name: str, x: Any, axes: str) -> tuple[Tensor, ...]:
    """The parts of a packed tensor, (B, N, 2 or 3, H, D) or without B."""
    letters = axes.split()
    place = next(i for i, letter in enumerate(letters) if letter.isdigit())
    args.sizes[letters[place]] = int(letters[place])
    args.tensor(name, x, axes)
    sizes = args.sizes
    sizes["E"] = sizes["D"]
    sizes.setdefault("M", sizes["N"])
    sizes.setdefault("Hkv", sizes.get("Hq", 0))
    return x.unbind(place)


def checked_options(
    args: Arguments, scale: Any, causal: Any, window: Any, softcap: Any, deterministic: Any, more: Any
) -> dict[str, Any]:
    """The options that are named or valued differently there."""
    args.flag("causal", causal)
    args.flag("deterministic", deterministic)
    args.flag("return_softmax_lse" if args.op.endswith("kvcache") else "return_attn_probs", more)
    if scale is not None:
        args.number("softmax_scale", scale, "a finite number or None")
    args.number("softcap", softcap, "a number, 0 for none")
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        args.fail("window_size", f"is {window!r}", "a pair (left, right) of whole numbers, -1 for open", TypeError)
    for i, side in enumerate(window):
        args.integer(f"window_size[{i}]", side, -1, "a whole number >= 0, or -1 for open")
    if not args.heads_in_groups():
        args.fail("q", f"has {args.sizes['Hq']} heads", f"a multiple of {args.sizes['Hkv']}, the heads of the keys")
    seen = tuple(None if side == -1 else int(side) for side in window)
    return {
        "causal": causal,
        "scale": scale,
        "window": None if seen == (None, None) else seen,
        "softcap": softcap if softcap > 0 else None,
    }


def alibi(args: Arguments, slopes: Any, longest: int, rows: str) -> Tensor | None:
    """The bias of slopes (H,) as (H, 2P-1), of (rows, H) as (rows, H, 2P-1)."""
    if slopes is None:
        return None
    args.per_head("alibi_slopes", slopes, "Hq" if getattr(slopes, "ndim", 1) == 1 else f"{rows} Hq")
    if slopes.dtype in (torch.float16, torch.bfloat16):
        slopes = slopes.float()
    return alibi_bias(slopes.flatten(), max(longest, 1)).unflatten(0, slopes.shape) if slopes.numel() else None


def checked_pages(args: Arguments, table: Any, rows: str) -> tuple[Tensor, int]:
    """Check a table of pages; the table, and how many tokens a row of it may hold."""
    table = args.indices("block_table", table, f"{rows} width")
    last = args.sizes["pages"] - 1
    within(args, "block_table", table, 0, last, f"numbers of pages, 0 to {last}")
    return table, args.sizes["width"] * args.sizes["page"]


def result(out: Tensor, lse: Tensor, more: bool) -> Any:
    """What the functions return: with `return_attn_probs` also the log-sum-exp, and no probabilities."""
    return (out, lse, None) if more else out
