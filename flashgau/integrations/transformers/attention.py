"""The attention function, and how transformers comes to know of it."""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch
from torch import Tensor, nn

import flashgau

from .description import _HEADER, _LENGTHS, _PLAIN, _UNBOUNDED, _Facts, _facts, _short
from .masks import _attention_mask

_OLDEST = (5, 5)
_OFFSETS = (torch.int32, torch.int64)
_AGREES = "_flashgau_agrees"

# Arguments of a model that travel down to its attention and change nothing there. What is not among them is refused.
_HARMLESS = {
    "cache_position", "deterministic", "labels", "layer_idx", "max_length_k", "max_length_q", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "position_embeddings", "position_ids", "return_dict", "seq_idx",
    "use_cache",
}  # fmt: skip


def register_attention(name: str = "FlashGAU") -> str:
    """Make `attn_implementation=name` run `flashgau.attention` in models of transformers.

    Registers an attention function and a mask function with transformers, for this process. Grouped queries, sliding
    windows, softcap, sinks, attention dropout, left and right padding, dynamic and static caches and sequences
    packed by `position_ids` are computed exactly; whatever else would change the result is refused by name. Output
    rows of padding are 0. `docs/transformers.md` has the details.

    Registering twice is harmless. transformers takes every implementation whose name contains "flash" (in lower
    case) for flash-attn: it looks for that package, and models leave masking to it. Such names are refused, hence
    the capitals.

    Args:
        name: of letters, digits and underscores, and not one that transformers has or treats specially.

    Returns:
        The name.

    Raises:
        ImportError: without transformers 5.5 or later.
        TypeError, ValueError: for a name that is not a string, or is taken or special.

    Example:
        >>> from flashgau.integrations.transformers import register_attention
        >>> model = AutoModelForCausalLM.from_pretrained(..., attn_implementation=register_attention()) # doctest: +SKIP
    """
    if not isinstance(name, str):
        raise TypeError(f"register_attention: `name` is {name!r}; expected a string")
    special = [word for word in ("flash", "sdpa", "flex_attention", "eager", "paged") if word in name]
    if special or not name.isidentifier():
        reason = f"contains {special[0]!r}, to which transformers gives a meaning" if special else "is not one word"
        raise ValueError(
            f"register_attention: `name` is {name!r}, which {reason}; expected letters, digits and underscores, "
            "such as 'FlashGAU'"
        )
    transformers = _transformers("register_attention")
    attention, mask = transformers.AttentionInterface, transformers.AttentionMaskInterface
    if (name in attention() or name in mask()) and attention().get(name) is not _attention_forward:
        raise ValueError(f"register_attention: `name` is {name!r}, which is registered already; expected another name")
    attention.register(name, _attention_forward)
    reason = "flashgau finds the sequences of a mask in its values; torch.export needs strict=False"
    mask.register(name, torch.compiler.disable(_attention_mask, reason=reason))
    return name


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    flashgau_gate: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function that `register_attention` registers: called by the layers of a model.

    What a query sees is in `attention_mask` alone, as in transformers' eager attention. Only without one (vision
    models) does `is_causal`, or else `module.is_causal`, decide.

    Args:
        module: the layer.
        query: (B, Hq, M, D).
        key: (B, Hkv, N, D), Hq a multiple of Hkv.
        value: (B, Hkv, N, E).
        attention_mask: what `_attention_mask` returned, or None.
        dropout: probability that an element of the attention matrix is dropped; layers pass 0 unless they train.
        scaling: factor of the scores, 1/sqrt(D) unless given.
        is_causal: without a mask, whether to hide the keys that follow a query.
        softcap: bound of the scores.
        s_aux: (Hq,) sinks: an extra logit per head in the softmax's denominator.
        sliding_window: the layer's window; it is in the mask already.
        cu_seq_lens_q: (G+1,) sequences packed in one row, as a data collator gives them. They must be the mask's.
        cu_seq_lens_k: the same of the keys.
        flashgau_gate: (B, Hq, M, E), whose sigmoid multiplies the result. Only patched layers pass it.
        options: what else the model was called with; refused unless it is None or changes nothing here.

    Returns:
        (B, M, Hq, E), and None for the attention matrix, which is never formed.

    Raises:
        ValueError: for an option or a mask that would change the result and that flashgau does not have.
    """
    if options.pop("output_attentions", None):
        raise ValueError("flashgau: `output_attentions` is True; expected False, since the matrix is never formed")
    unknown = [name for name, x in options.items() if x is not None and name not in _HARMLESS]
    if unknown:
        raise ValueError(
            f"flashgau: the layer {type(module).__name__} passes {', '.join(map(repr, unknown))} to its attention; "
            "expected nothing that flashgau does not know. attn_implementation='sdpa' or 'eager' may take it"
        )
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    if attention_mask is None:
        facts = _without_mask(module, query, keys, is_causal, sliding_window)
    else:
        facts = _facts(attention_mask)
        if (facts.queries, facts.keys) != (queries, keys) or (facts.batch != batch and facts.kind != _PLAIN):
            raise ValueError(
                f"flashgau: `attention_mask` is for B = {facts.batch}, M = {facts.queries}, N = {facts.keys}; "
                f"expected the layer's B = {batch}, M = {queries}, N = {keys}"
            )
    left, right = (None if side == _UNBOUNDED else side for side in (facts.left, facts.right))
    if s_aux is not None and s_aux.dtype not in (torch.float32, query.dtype):
        s_aux = s_aux.float()
    lengths, q_ends, k_ends = _sequences(facts, attention_mask, query, cu_seq_lens_q, cu_seq_lens_k)
    if q_ends is not None:
        query, key, value = _end_to_end(query), _end_to_end(key), _end_to_end(value)
        flashgau_gate = None if flashgau_gate is None else _end_to_end(flashgau_gate)
    out = flashgau.attention(
        query, key, value, causal=right == 0, window=(left, right), scale=scaling, softcap=softcap, sinks=s_aux,
        lengths=lengths, cu_seqlens=q_ends, cu_seqlens_k=k_ends, dropout_p=float(dropout), gate=flashgau_gate,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    if q_ends is not None:
        return out[0].transpose(0, 1).unflatten(0, (batch, queries)), None
    return out.transpose(1, 2), None


def _end_to_end(x: Tensor) -> Tensor:
    """(B, H, L, D) -> (1, H, B*L, D): a view of a tensor that lies as (B, L, H, D), as a projection leaves it."""
    return x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _without_mask(module: nn.Module, query: Tensor, keys: int, is_causal: bool | None, window: int | None) -> _Facts:
    """What a layer that was given no mask means: everything, or the keys up to the query."""
    batch, _, queries, _ = query.shape
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if causal is None:
        raise ValueError(
            f"flashgau: the layer {type(module).__name__} gives neither a mask nor `is_causal`; expected one of them"
        )
    if window is not None and window < max(queries, keys):
        raise ValueError(f"flashgau: `sliding_window` is {window} without a mask; expected a mask that has the window")
    if queries == 1 or not causal:
        return _Facts(_PLAIN, _UNBOUNDED, _UNBOUNDED, batch, queries, keys, 0)
    if queries != keys:
        raise ValueError(
            f"flashgau: {queries} queries and {keys} keys with `is_causal` and without a mask; expected equal numbers, "
            "or a mask that says where the queries stand"
        )
    return _Facts(_PLAIN, _UNBOUNDED, 0, batch, queries, keys, 0)


def _sequences(
    facts: _Facts, mask: Tensor | None, query: Tensor, cu_q: Tensor | None, cu_k: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`lengths`, `cu_seqlens` and `cu_seqlens_k` for `flashgau.attention`."""
    cu_q, cu_k = (x.long() if x is not None and x.dtype not in _OFFSETS else x for x in (cu_q, cu_k))
    given = cu_q is not None or cu_k is not None
    if given and (cu_q is None or cu_k is None):
        raise ValueError("flashgau: one of `cu_seq_lens_q` and `cu_seq_lens_k` is None; expected both or neither")
    if mask is None or facts.kind == _PLAIN:
        if given and facts.batch != 1:
            raise ValueError(f"flashgau: `cu_seq_lens_q` with a batch of {facts.batch}; expected one packed row")
        return None, cu_q, cu_k
    data = mask.flatten()[_HEADER:].to(query.device)[: 2 * facts.sequences]
    if facts.kind == _LENGTHS:
        if given:
            raise ValueError("flashgau: `cu_seq_lens_q` with padding in `attention_mask`; expected one of them")
        return data[: facts.sequences], None, None
    ours = data[: facts.sequences], data[facts.sequences :]
    if given and getattr(mask, _AGREES, None) is not cu_q:
        for name, theirs, x in zip(("cu_seq_lens_q", "cu_seq_lens_k"), (cu_q, cu_k), ours, strict=True):
            assert theirs is not None
            if not torch.equal(theirs.unique_consecutive().to(x), x.unique_consecutive()):
                raise ValueError(
                    f"flashgau: `{name}` is {_short(theirs.tolist())}, but position_ids and attention_mask say "
                    f"{_short(x.unique_consecutive().tolist())}; expected the same sequences"
                )
        setattr(mask, _AGREES, cu_q)  # the next layers need not wait for the same answer
    return None, *ours


def _transformers(asker: str) -> Any:
    """The package of that name, which is not this module, in a version that has what is needed."""
    expected = f"expected transformers {'.'.join(map(str, _OLDEST))} or later"
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(f"{asker}: transformers cannot be imported ({error}); {expected}") from error
    version = re.match(r"(\d+)\.(\d+)", transformers.__version__)
    if version is None or tuple(map(int, version.groups())) < _OLDEST:
        raise ImportError(f"{asker}: this is transformers {transformers.__version__}; {expected}")
    return transformers
