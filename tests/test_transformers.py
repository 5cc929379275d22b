"""flashgau inside models of Hugging Face transformers: tiny random models against transformers' own eager attention."""

from __future__ import annotations

import copy
import functools
import pickle
import re
import sys
import warnings

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import flashgau
from flashgau.integrations.transformers import attention as ours
from flashgau.integrations.transformers import patch_glu, register_attention

transformers = pytest.importorskip("transformers", minversion="5.5")
masking = pytest.importorskip("transformers.masking_utils")
transformers.utils.logging.set_verbosity_error()

NAME = register_attention()
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "attention_dropout": 0.0,
}
NO_EXPERTS = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
BERT = {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads", "attention_dropout")}
KINDS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**SIZES, "sliding_window": 4}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SIZES),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**SIZES, "sliding_window": 4, "attn_logit_softcapping": 1.5}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SIZES, "sliding_window": 4}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**NO_EXPERTS, "sliding_window": 4}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SIZES),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50}),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**BERT, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2, "eos_token_id": 2},
    ),
}
DECODERS = ("llama", "mistral", "gemma2", "gemma3", "gpt_oss")
IDS = torch.randint(1, 50, (3, 11), generator=torch.Generator().manual_seed(3))


@functools.cache
def _weights(kind):
    model_class, config_class, options = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
    for parameter in model.parameters():  # biases, norms and sinks, too, are something
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.state_dict()


def build(kind, implementation=NAME, dtype=torch.float64, **more):
    model_class, config_class, options = KINDS[kind]
    config = getattr(transformers, config_class)(**{**options, **more})
    if kind == "gpt_oss":
        more = {"experts_implementation": "eager"}  # the others have no fp64
    else:
        more = {}
    model = getattr(transformers, model_class)._from_config(config, attn_implementation=implementation, **more)
    model.load_state_dict(_weights(kind))
    assert model.config._attn_implementation == implementation
    return model.to(dtype).eval()


# transformers' eager attention takes the softmax in fp32 also in fp64.
def close(a, b, tolerance=2e-6):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_those_of_eager_attention(kind):
    results = []
    for implementation in ("eager", NAME):
        model = build(kind, implementation)
        logits = model(input_ids=IDS).logits
        weights = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        results.append((logits.detach(), gradients(model, (logits * weights).sum())))
    close(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        close(gradient, results[1][1][name], 1e-6 * max(1.0, gradient.abs().max().item()))
    assert kind != "gpt_oss" or any("sinks" in name for name in results[0][1])


@pytest.mark.parametrize("padding", ["left", "right", "both"])
@pytest.mark.parametrize("kind", [*DECODERS, "bert", "modernbert"])
def test_padded_rows_equal_rows_alone(kind, padding):
    first, end = {"left": ([0, 4, 9], [11, 11, 11]), "right": ([0, 0, 0], [11, 7, 1]), "both": ([0, 2, 3], [9, 11, 4])}[
        padding
    ]
    mask = torch.tensor([[int(a <= i < b) for i in range(11)] for a, b in zip(first, end, strict=True)])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    options = {} if kind == "modernbert" else {"position_ids": places}
    model, eager = build(kind), build(kind, "eager")
    logits = model(input_ids=IDS, attention_mask=mask, **options).logits
    alone = [eager(input_ids=IDS[b : b + 1, first[b] : end[b]]).logits[0] for b in range(3)]
    weights = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for b in range(3):
        close(logits[b, first[b] : end[b]], alone[b])
    got = gradients(model, (logits * weights)[mask.bool()].sum())
    wanted = gradients(eager, sum((x * weights[b, first[b] : end[b]]).sum() for b, x in enumerate(alone)))
    for name, gradient in wanted.items():
        close(got[name], gradient, 1e-6 * max(1.0, gradient.abs().max().item()))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_bidirectional_attention_equals_eager_at_padding_as_well(kind):
    mask = torch.tensor([[1] * 11, [1] * 6 + [0] * 5, [0] * 4 + [1] * 7])
    with torch.no_grad():
        got = build(kind)(input_ids=IDS, attention_mask=mask).logits
        wanted = build(kind, "eager")(input_ids=IDS, attention_mask=mask).logits
    valid = mask.bool() if kind == "gpt2" else slice(None)  # causal: padding gets 0 from attention
    close(got[valid], wanted[valid])


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", DECODERS)
def test_generate_with_unequal_prompts_gives_the_tokens_of_eager(kind, cache):
    mask = torch.ones_like(IDS)
    mask[1, :4], mask[2, :9] = 0, 0
    options = {"max_new_tokens": 7, "do_sample": False, "cache_implementation": cache}
    ids = torch.where(mask.bool(), IDS, 0)
    tokens = [
        build(kind, implementation, torch.float32).generate(ids, attention_mask=mask, **options)
        for implementation in ("eager", NAME)
    ]
    assert tokens[0].shape == (3, 18)
    assert torch.equal(*tokens)


@pytest.mark.parametrize("kind", DECODERS)
def test_prefix_then_several_tokens_then_one_equal_all_at_once(kind):
    model = build(kind)
    with torch.no_grad():
        whole = build(kind, "eager")(input_ids=IDS).logits
        for cache in (transformers.DynamicCache(config=model.config), transformers.StaticCache(model.config, 16)):
            parts = [
                model(input_ids=part, past_key_values=cache, use_cache=True).logits
                for part in (IDS[:, :5], IDS[:, 5:8], IDS[:, 8:9], IDS[:, 9:])
            ]
            close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("kind", [kind for kind in DECODERS if kind != "gpt_oss"])  # which makes masks without them
def test_sequences_packed_by_position_ids_equal_sequences_alone(kind):
    model, eager = build(kind), build(kind, "eager")
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 0]])
    logits = model(input_ids=IDS[:1], position_ids=position_ids, use_cache=False).logits
    pieces = [eager(input_ids=IDS[:1, a:b]).logits for a, b in ((0, 6), (6, 9), (9, 10), (10, 11))]
    close(logits, torch.cat(pieces, 1))
    got, wanted = gradients(model, logits.square().sum()), gradients(eager, sum(x.square().sum() for x in pieces))
    for name, gradient in wanted.items():
        close(got[name], gradient, 1e-6 * max(1.0, gradient.abs().max().item()))


def test_a_collator_s_cu_seq_lens_are_honoured_and_must_agree_with_position_ids():
    model = build("llama")
    position_ids = torch.tensor([[*range(6), *range(5)]])
    ends = torch.tensor([0, 6, 11], dtype=torch.int32)
    packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6, "max_length_k": 6, "use_cache": False}
    with torch.no_grad():
        wanted = model(input_ids=IDS[:1], position_ids=position_ids, use_cache=False).logits
        close(model(input_ids=IDS[:1], position_ids=position_ids, **packed).logits, wanted)
        close(model(input_ids=IDS[:1], **packed).logits, wanted)  # rotary positions are relative
        other = {**packed, "cu_seq_lens_q": torch.tensor([0, 5, 11]), "cu_seq_lens_k": torch.tensor([0, 5, 11])}
        with pytest.raises(ValueError, match=r"`cu_seq_lens_q` is \[0, 5, 11\].*say \[0, 6, 11\]"):
            model(input_ids=IDS[:1], position_ids=position_ids, **other)
        with pytest.raises(ValueError, match=r"one of `cu_seq_lens_q` and `cu_seq_lens_k` is None"):
            model(input_ids=IDS[:1], **{**packed, "cu_seq_lens_k": None})
        with pytest.raises(ValueError, match=r"with a batch of 3"):
            model(input_ids=IDS, **packed)
        mask = torch.tensor([[1] * 9 + [0] * 2])
        with pytest.raises(ValueError, match=r"with padding"):
            model(input_ids=IDS[:1], attention_mask=mask, **packed)


def test_cu_seq_lens_pack_a_model_that_makes_masks_without_position_ids():
    position_ids = torch.tensor([[*range(6), *range(5)]])
    ends = torch.tensor([0, 6, 11], dtype=torch.int32)
    with torch.no_grad():
        packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "use_cache": False}
        got = build("gpt_oss")(input_ids=IDS[:1], position_ids=position_ids, **packed).logits
        eager = build("gpt_oss", "eager")
        close(got, torch.cat([eager(input_ids=IDS[:1, a:b]).logits for a, b in ((0, 6), (6, 11))], 1))


def test_encoders_pack_by_cu_seq_lens_and_not_by_position_ids():
    model, eager = build("bert"), build("bert", "eager")
    position_ids = torch.tensor([[*range(6), *range(5)]])
    ends = torch.tensor([0, 6, 11], dtype=torch.int32)
    inputs = {"input_ids": IDS[:1], "position_ids": position_ids}
    with torch.no_grad():
        close(model(**inputs).logits, eager(**inputs).logits)
        alone = [eager(input_ids=IDS[:1, a:b]).logits for a, b in ((0, 6), (6, 11))]
        close(model(**inputs, cu_seq_lens_q=ends, cu_seq_lens_k=ends).logits, torch.cat(alone, 1))


def test_cross_attention_with_as_many_keys_as_queries_keeps_all_queries():
    options = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "vocab_size": 50, "pad_token_id": 0}
    options |= {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in {"attention_heads": 4, "ffn_dim": 32}.items()
    }
    torch.manual_seed(0)
    models = [
        transformers.BartForConditionalGeneration._from_config(
            transformers.BartConfig(**options), attn_implementation=x
        )
        for x in ("eager", NAME)
    ]
    models[1].load_state_dict(models[0].state_dict())
    mask = torch.tensor([[1] * 11, [1] * 6 + [0] * 5, [0] * 2 + [1] * 9])
    for decoder in (IDS, IDS[:, :5]):
        with torch.no_grad():
            a, b = (
                m.double().eval()(input_ids=IDS, attention_mask=mask, decoder_input_ids=decoder).logits for m in models
            )
        close(a, b)


def test_vision_models_have_no_mask():
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(**options, image_size=8, patch_size=2)
    torch.manual_seed(0)
    eager = transformers.ViTModel._from_config(config, attn_implementation="eager").double().eval()
    model = transformers.ViTModel._from_config(copy.deepcopy(config), attn_implementation=NAME).double().eval()
    model.load_state_dict(eager.state_dict())
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        close(model(image).last_hidden_state, eager(image).last_hidden_state)


def test_attention_dropout_in_training_only():
    model = build("llama", attention_dropout=0.5)
    with torch.no_grad():
        still = model(input_ids=IDS).logits
        assert torch.equal(still, model(input_ids=IDS).logits)
        model.train()
        torch.manual_seed(1)
        first = model(input_ids=IDS).logits
        torch.manual_seed(1)
        assert torch.equal(first, model(input_ids=IDS).logits)
        assert (first - still).abs().max() > 1e-3


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    results = []
    for checkpointing in (False, True):
        model = build("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        results.append(gradients(model, model(input_ids=IDS, attention_mask=mask).logits.square().sum()))
    for name, gradient in results[0].items():
        close(results[1][name], gradient, 1e-12 * max(1.0, gradient.abs().max().item()))


def test_compiled_model_equals_the_model():
    torch.compiler.reset()
    model = build("llama", dtype=torch.float32)
    compiled = torch.compile(model, backend="eager")
    mask = torch.ones_like(IDS)
    mask[1, :4], mask[2, :9] = 0, 0
    with torch.no_grad():
        for options in ({}, {"attention_mask": mask}, {"attention_mask": mask.flip(1)}):
            close(compiled(input_ids=IDS, **options).logits, model(input_ids=IDS, **options).logits)


def test_decoding_with_a_static_cache_compiles_as_one_graph_for_all_steps():
    torch.compiler.reset()
    model, counter = build("llama", dtype=torch.float32), torch._dynamo.testing.CompileCounter()
    mask = torch.ones(3, 16, dtype=torch.int64)
    mask[1, :4] = 0
    cache = transformers.StaticCache(model.config, 16)
    compiled = torch.compile(model.forward, fullgraph=True, backend=counter)
    with torch.no_grad():
        model(input_ids=IDS[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
        for i in range(8, 11):  # as generate does it: masks of four axes, made outside the graph
            made = masking.create_causal_mask(
                model.config, torch.empty(3, 1, 0), attention_mask=mask[:, : i + 1], past_key_values=cache
            )
            step = compiled(input_ids=IDS[:, i : i + 1], attention_mask=made, past_key_values=cache).logits
        whole = model(input_ids=IDS, attention_mask=mask[:, :11]).logits
    close(step[:, 0], whole[:, -1])
    assert counter.frame_count == 1


# The mask and the attention function themselves


@st.composite
def batches(draw):
    """Rows of tokens with padding on both sides, of which some are in a cache, dynamic or static."""
    batch, queries, past = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(0, 5))
    total = past + queries
    rows = [sorted(draw(st.tuples(st.integers(0, total), st.integers(0, total)))) for _ in range(batch)]
    mask = torch.tensor([[a <= i < b for i in range(total)] for a, b in rows]) if draw(st.booleans()) else None
    window = draw(st.none() | st.integers(1, 7))
    causal = draw(st.booleans())
    spare = draw(st.integers(0, 3)) if causal else 0
    if not causal and window is not None:
        past, mask = 0, None if mask is None else mask[:, past:]
    offset = torch.tensor(past) if draw(st.booleans()) else past
    if not causal and window is not None:
        offset = past
    return batch, queries, past, spare, offset, mask, window, causal


@given(batches(), st.booleans(), st.integers(0, 2**31))
def test_any_batch_equals_softmax_with_transformers_own_mask(case, opaque, seed):
    batch, queries, past, spare, offset, mask, window, causal = case
    keys = past + queries + spare
    factory = {
        (True, True): masking.sliding_window_causal_mask_function,
        (False, True): masking.sliding_window_bidirectional_mask_function,
        (True, False): lambda _: masking.causal_mask_function,
        (False, False): lambda _: masking.bidirectional_mask_function,
    }[causal, window is not None](window)
    function = (lambda *places: factory(*places)) if opaque else factory  # known by evaluation, known by comparison
    call = {"batch_size": batch, "q_length": queries, "kv_length": keys, "q_offset": offset, "mask_function": function}
    call |= {"attention_mask": mask, "local_size": window, "allow_is_causal_skip": False}
    visible = masking.sdpa_mask(**call)
    encoded = ours._attention_mask(**call)

    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, n, h, 4, dtype=torch.float64, generator=generator).transpose(1, 2)
        for n, h in ((queries, 4), (keys, 2), (keys, 2))
    )
    tokens = torch.arange(keys) < past + queries
    if mask is not None:
        tokens = tokens & nn.functional.pad(mask, (0, spare))
    for x in (k, v):  # padding and slots of the cache that are not used yet hold rubbish
        x.transpose(1, 2)[~tokens.expand(batch, -1)] = float("nan")
    layer = nn.Module()
    got, matrix = ours._attention_forward(layer, q, k, v, encoded, scaling=0.3)
    assert matrix is None
    assert got.shape == (batch, queries, 4, 4)

    clean_k, clean_v = (x.nan_to_num().repeat_interleave(2, 1) for x in (k, v))
    scores = (0.3 * q @ clean_k.mT).masked_fill(~visible, float("-inf"))
    wanted = (scores.softmax(-1).nan_to_num() @ clean_v).transpose(1, 2)
    if mask is not None and (causal or window is not None):  # at padding 0, or what it would see were it none
        assert got.isfinite().all()
        assert opaque or not causal or not got[~mask[:, past:]].any()
        got, wanted = (x.masked_fill(~mask[:, past:, None, None], 0) for x in (got, wanted))
    close(got, wanted, 1e-12)
    lost = encoded.clone()  # as on another device: what the host knew is read again
    assert ours._facts(lost) == ours._facts(encoded)


@given(st.integers(1, 3), st.integers(1, 9), st.none() | st.integers(1, 5), st.integers(0, 2**31))
def test_any_packing_equals_softmax_with_transformers_own_mask(batch, length, window, seed):
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(batch, length, generator=generator) < 0.4
    starts[:, 0] = True
    place = torch.arange(length).expand(batch, -1)
    position_ids = place - torch.where(starts, place, 0).cummax(1).values
    packed = masking.find_packed_sequence_indices(position_ids)
    factory = masking.causal_mask_function if window is None else masking.sliding_window_causal_mask_function(window)
    if packed is not None and hasattr(masking, "packed_sequence_compatibility_function"):
        factory = masking.packed_sequence_compatibility_function(factory, position_ids, packed)
    elif packed is not None:  # older versions
        factory = masking.and_masks(factory, masking.packed_sequence_mask_function(packed))
    call = {"batch_size": batch, "q_length": length, "kv_length": length, "mask_function": factory}
    call |= {"local_size": window, "allow_is_causal_skip": False}
    visible, encoded = masking.sdpa_mask(**call), ours._attention_mask(**call)
    q, k, v = (torch.randn(batch, 2, length, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    wanted = (0.5 * q @ k.mT).masked_fill(~visible, float("-inf")).softmax(-1) @ v
    close(ours._attention_forward(nn.Module(), q, k, v, encoded)[0], wanted.transpose(1, 2), 1e-12)


def asymmetric(left, right):
    """As moonshine, T5Gemma 2 and others make it: `left` keys back, `right` ahead."""
    return lambda b, h, q, k: ((q >= k) & (q - k <= left)) | ((q < k) & (k - q <= right))


@given(
    st.integers(1, 2), st.integers(1, 8), st.integers(0, 9), st.integers(0, 9), st.sampled_from(("and", "or", "plain")),
    st.sampled_from(("none", "left", "right", "packed")), st.integers(0, 2**31),
)  # fmt: skip
def test_a_window_is_found_in_the_mask_whoever_made_it(batch, length, left, right, how, padding, seed):
    """Without a word about the window beside the mask."""
    window = asymmetric(left, right)
    function = {
        "and": masking.and_masks(masking.bidirectional_mask_function, window),
        "or": masking.or_masks(masking.sliding_window_causal_mask_function(left + 1), window),
        "plain": window,
    }[how]
    generator = torch.Generator().manual_seed(seed)
    mask = None
    if padding == "packed":
        numbers = torch.randint(0, 2, (batch, length), generator=generator).cumsum(1)
        function = masking.and_masks(function, masking.packed_sequence_mask_function(numbers))
    elif padding != "none":
        mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=generator)
        mask = mask.flip(1) if padding == "left" else mask
    call = {"batch_size": batch, "q_length": length, "kv_length": length, "mask_function": function}
    call |= {"attention_mask": mask, "use_vmap": padding != "packed"}
    visible, encoded = masking.sdpa_mask(**call, allow_is_causal_skip=False), ours._attention_mask(**call)
    q, k, v = (torch.randn(batch, 2, length, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    wanted = ((0.5 * q @ k.mT).masked_fill(~visible, float("-inf")).softmax(-1) @ v).transpose(1, 2)
    got = ours._attention_forward(nn.Module(), q, k, v, encoded)[0]
    token = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    close(got[token], wanted[token], 1e-12)


@given(st.integers(2, 7), st.integers(0, 2**31))
def test_any_mask_is_computed_or_refused(length, seed):
    """Whatever a mask of ones and zeros says: never another one."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(1, length, length, generator=generator) < torch.rand((), generator=generator) ** 0.3
    table = table if seed % 2 else table & torch.ones(length, length).tril().bool()
    call = {
        "batch_size": 1,
        "q_length": length,
        "kv_length": length,
        "mask_function": lambda b, h, q, k: table[b, q, k],
    }
    q, k, v = (torch.randn(1, 2, length, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    try:
        encoded = ours._attention_mask(**call)
    except ValueError as error:
        message = str(error)
    else:
        wanted = (0.5 * q @ k.mT).masked_fill(~table, float("-inf")).softmax(-1) @ v
        close(ours._attention_forward(nn.Module(), q, k, v, encoded)[0], wanted.transpose(1, 2), 1e-12)
        return
    row, query, sees, key = re.search(
        r"first in row (\d+), where query (\d+) (sees|does not see) key (\d+)", message
    ).groups()
    assert bool(table[int(row), int(query), int(key)]) == (sees == "sees")


def gemma3_text(**more):
    return transformers.Gemma3TextConfig(
        **{**SIZES, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], **more}
    )


def gemma3_with_images():
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    tower |= {"image_size": 16, "patch_size": 4}
    config = transformers.Gemma3Config(
        text_config=gemma3_text(), vision_config=transformers.SiglipVisionConfig(**tower), mm_tokens_per_image=4,
        image_token_index=49,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config).double().eval()


def one_of(model, **inputs):
    """The first output, of eager attention and of flashgau's."""
    results = []
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(model(**inputs)[0])
    return results


def test_gemma3_with_text_only_is_a_window_and_with_an_image_refused():
    """Its processor always gives token types, and then the window comes without a word about its size."""
    torch.manual_seed(0)
    model, ids = gemma3_with_images(), IDS.clamp(max=48)
    text = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "use_cache": False}
    close(*one_of(model, **text))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    alone = one_of(model, input_ids=ids[1:2, 4:], token_type_ids=ids[1:2, 4:] * 0, use_cache=False)[0]
    with torch.no_grad():  # rotary positions are relative
        close(model(**text, attention_mask=mask).logits[1:2, 4:], alone)
        image = torch.zeros_like(ids)
        image[1, 3:7] = 1
        with pytest.raises(ValueError, match=r"at 6 places, first in row 1, where query 3 sees key 4"):
            model(input_ids=ids, token_type_ids=image, use_cache=False)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["embeddinggemma", "llama", "mistral"])
def test_decoders_that_see_both_ways(kind, padding):
    torch.manual_seed(0)
    if kind == "embeddinggemma":
        model = transformers.Gemma3TextModel(gemma3_text(use_bidirectional_attention=True))
    else:
        config = getattr(transformers, KINDS[kind][1])(**KINDS[kind][2])
        config.is_causal = False
        model = getattr(transformers, KINDS[kind][0].replace("ForCausalLM", "Model"))(config)
    mask = torch.ones_like(IDS)
    if padding != "none":
        mask[1, :4], mask[2, :9] = 0, 0
    mask = mask.flip(1) if padding == "right" else mask
    model.double().eval()
    alone = [one_of(model, input_ids=row[valid.bool()][None])[0][0] for row, valid in zip(IDS, mask, strict=True)]
    with torch.no_grad():
        close(model(input_ids=IDS, attention_mask=mask)[0][mask.bool()], torch.cat(alone))


def test_encoders_that_pack_sequences_by_numbers():
    if not hasattr(transformers, "EsmcModel"):
        pytest.skip("this transformers has no ESM C")
    sizes = {k: BERT[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    model = transformers.EsmcModel(transformers.EsmcConfig(**sizes, num_attention_heads=4)).double().eval()
    numbers = torch.tensor([[0] * 6 + [1] * 5, [0] * 3 + [1] * 4 + [-1] * 4, [0] * 11])
    close(*one_of(model, input_ids=IDS, attention_mask=None, sequence_id=numbers))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_narrow_integers_of_a_model_do_not_wrap(dtype):
    ids = torch.randint(1, 50, (1, 300), generator=torch.Generator().manual_seed(1))
    model = build("llama", max_position_embeddings=512)
    mask = torch.ones_like(ids)
    mask[0, 280:] = 0
    places = (torch.arange(300) % 100)[None]
    ends = torch.tensor([0, 50, 100])
    with torch.no_grad():
        for name, value in (("attention_mask", mask), ("position_ids", places)):
            inputs = {"input_ids": ids, "use_cache": False}
            close(model(**inputs, **{name: value.to(dtype)}).logits, model(**inputs, **{name: value}).logits)
        packed = [{"cu_seq_lens_q": e, "cu_seq_lens_k": e, "use_cache": False} for e in (ends, ends.to(dtype))]
        results = [model(input_ids=ids[:, :100], **x).logits for x in packed]
    close(*results)


# torch.export


def test_a_decoder_is_exported_for_any_batch_and_length():
    model, auto = build("mistral", num_hidden_layers=2), torch.export.Dim.AUTO
    shapes = {"input_ids": {0: auto, 1: auto}, "use_cache": None}
    program = torch.export.export(model, (IDS,), {"use_cache": False}, dynamic_shapes=shapes, strict=False).module()
    other = torch.randint(1, 50, (2, 17), generator=torch.Generator().manual_seed(1))
    for ids in (IDS, other):
        close(program(ids, use_cache=False).logits, model(ids, use_cache=False).logits, 1e-12)


def test_an_exported_decoder_takes_padding_and_stops_at_what_it_was_not_exported_for():
    model = build("llama", num_hidden_layers=2)
    mask = torch.ones_like(IDS)
    mask[1, :4], mask[2, 9:] = 0, 0
    places = torch.arange(11).expand(3, -1)
    inputs = {"attention_mask": mask, "position_ids": places, "use_cache": False}
    program = torch.export.export(model, (IDS,), inputs, strict=False).module()
    for valid in (mask, mask.flip(1)):
        inputs = {"attention_mask": valid, "position_ids": places, "use_cache": False}
        close(program(IDS, **inputs).logits[valid.bool()], model(IDS, **inputs).logits[valid.bool()], 1e-12)
    holes = mask.clone()
    holes[0, 3] = 0
    with pytest.raises(RuntimeError, match=r"flashgau: `attention_mask` has a hole"):
        program(IDS, attention_mask=holes, position_ids=places, use_cache=False)
    inputs = {"position_ids": places, "use_cache": False}
    program = torch.export.export(model, (IDS,), inputs, strict=False).module()
    with pytest.raises(RuntimeError, match=r"flashgau: `position_ids` pack several sequences"):
        program(IDS, position_ids=places % 6, use_cache=False)


def test_an_export_that_cannot_be_says_why():
    model = build("llama")
    with pytest.raises(Exception, match=r"flashgau finds the sequences of a mask in its values.*strict=False"):
        torch.export.export(model, (IDS,), {"use_cache": False}, strict=True)
    torch.manual_seed(0)
    model = transformers.Gemma3TextModel(gemma3_text(use_bidirectional_attention=True)).eval()
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match=r"flashgau: torch.export has no values.*attn_implementation='sdpa'"):
        torch.export.export(model, (IDS,), strict=False)


def test_models_that_compute_with_their_mask_are_told_so():
    """Unseen, a matrix of biases was added to a description of sequences, and the shapes did not fit."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    beit = transformers.BeitModel(
        transformers.BeitConfig(**sizes, image_size=16, patch_size=4, use_relative_position_bias=True)
    )
    doge = transformers.DogeModel(transformers.DogeConfig(**sizes, num_key_value_heads=2, vocab_size=50))
    for model, x in ((beit, torch.randn(1, 3, 16, 16)), (doge, IDS)):
        model.eval().set_attn_implementation(NAME)
        with pytest.raises(
            ValueError, match=r"flashgau: this model computes with its attention mask by itself \((add|ne)\)"
        ):
            model(x)
    mask = ours._attention_mask(2, 3, 3)
    for call in (lambda: 1.0 - mask, lambda: mask == 0, lambda: torch.zeros(2, 4, 3, 3) + mask[:, :, :, :3]):
        with pytest.raises(ValueError, match="computes with its attention mask"):
            call()
    for same in (mask.clone(), mask.to("cpu"), copy.deepcopy(mask), mask[:, :, :, :3]):
        assert ours._facts(same) == ours._facts(mask)


def test_masks_are_known_by_comparison_and_cheap(monkeypatch):
    def evaluated(*_, **__):
        raise AssertionError("evaluated")

    call = {"batch_size": 2, "q_length": 6, "kv_length": 6}
    monkeypatch.setattr(masking, "sdpa_mask", evaluated)
    for function in (
        masking.causal_mask_function,
        masking.bidirectional_mask_function,
        masking.sliding_window_causal_mask_function(3),
        masking.sliding_window_bidirectional_mask_function(3),
    ):
        assert ours._attention_mask(**call, mask_function=function, local_size=3).numel() == 1024
    with pytest.raises(AssertionError, match="evaluated"):  # another window than the argument says
        ours._attention_mask(**call, mask_function=masking.sliding_window_causal_mask_function(2), local_size=3)
    q = torch.randn(1, 6, 2, 4).transpose(1, 2)
    assert ours._end_to_end(torch.randn(3, 6, 2, 4).transpose(1, 2))._base is not None  # a view, not a copy
    assert ours._attention_forward(nn.Module(), q, q, q, ours._attention_mask(1, 6, 6))[0].shape == (1, 6, 2, 4)


def test_right_padding_goes_by_lengths_and_no_padding_by_nothing(monkeypatch):
    seen = []
    real = flashgau.attention
    monkeypatch.setattr(flashgau, "attention", lambda *a, **k: seen.append(k) or real(*a, **k))
    model = build("llama")
    right = torch.tensor([[1] * 11, [1] * 6 + [0] * 5, [1] + [0] * 10])
    for mask in (None, torch.ones_like(right), right, right.flip(1)):
        model(input_ids=IDS, attention_mask=mask)
    kinds = [(k["lengths"] is not None, k["cu_seqlens"] is not None) for k in seen[::2]]
    assert kinds == [(False, False), (False, False), (True, False), (False, True)]
    assert seen[4]["lengths"].tolist() == [11, 6, 1]


# What is refused


def test_masks_that_are_not_sequences_and_a_window_are_refused():
    call = {"batch_size": 1, "q_length": 9, "kv_length": 9}
    image = masking.or_masks(masking.causal_mask_function, lambda b, h, q, k: (q < 3) & (k < 3))
    where = r"as causal attention it would differ at 3 places, first in row 0, where query 0 sees key 1"
    with pytest.raises(ValueError, match=where):
        ours._attention_mask(**call, mask_function=image, use_vmap=True)
    fewer = masking.and_masks(masking.causal_mask_function, lambda b, h, q, k: k != 4)
    with pytest.raises(ValueError, match=r"where query 4 does not see key 4"):
        ours._attention_mask(**call, mask_function=fewer)
    chunks = masking.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"not one of sequences and a window"):
        ours._attention_mask(1, 3, 9, q_offset=6, mask_function=chunks, local_size=4)


def test_a_window_of_nothing_gives_nothing():
    encoded = ours._attention_mask(
        2, 3, 5, 2, mask_function=masking.sliding_window_causal_mask_function(0), local_size=0
    )
    q, k = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 5, 4)
    assert not ours._attention_forward(nn.Module(), q, k, k, encoded)[0].any()


def test_masks_of_another_make_that_mean_the_same_are_taken(monkeypatch):
    monkeypatch.setattr("flashgau.integrations.transformers.intervals._BLOCK", 20)  # several blocks
    call = {"batch_size": 1, "q_length": 9, "kv_length": 9}
    plain = masking.or_masks(masking.causal_mask_function, lambda b, h, q, k: k == q)
    assert ours._facts(ours._attention_mask(**call, mask_function=plain, use_vmap=True)).kind == ours._PLAIN
    chunks = masking.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))  # three sequences
    encoded = ours._attention_mask(**call, mask_function=chunks, local_size=4)
    visible = masking.sdpa_mask(**call, mask_function=chunks, allow_is_causal_skip=False)
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    wanted = (0.5 * q @ k.mT).masked_fill(~visible, float("-inf")).softmax(-1) @ v
    close(ours._attention_forward(nn.Module(), q, k, v, encoded)[0], wanted.transpose(1, 2), 1e-12)


def test_refused_inputs_of_a_model():
    model = build("llama")
    holes = torch.ones_like(IDS)
    holes[1, 3] = 0
    with pytest.raises(ValueError, match=r"`attention_mask` is \[1, 1, 1, 0, 1, .* in row 1, with a hole"):
        model(input_ids=IDS, attention_mask=holes)
    for mask in (
        torch.ones(3, 1, 11, 11, dtype=torch.bool),
        torch.zeros(3, 1, 11, 11),
        torch.ones(1, 2000, 1, 1).long(),
    ):
        with pytest.raises(ValueError, match=r"is a torch\.\w+ tensor of shape .*attn_implementation='sdpa'"):
            model(input_ids=IDS, attention_mask=mask)
    with pytest.raises(ValueError, match="output_attentions"):
        model(input_ids=IDS, output_attentions=True)
    with pytest.raises(ValueError, match=r"LlamaAttention passes 'position_bias' to its attention"):
        model(input_ids=IDS, position_bias=torch.zeros(1, 4, 11, 11))
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="ends before the last query"):
        model(input_ids=IDS[:, :1], past_key_values=cache, attention_mask=torch.ones_like(IDS))


def test_the_relative_bias_of_t5_is_refused():
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, vocab_size=50)
    model = transformers.T5EncoderModel._from_config(config, attn_implementation=NAME)
    # Before 5.10 or so T5 adds the mask to its scores by itself, which fails for the shape.
    for length in range(1, 12):
        with pytest.raises((ValueError, RuntimeError), match=r"'position_bias'|computes with its attention mask"):
            model(input_ids=IDS[:, :length])


def test_refused_calls_of_the_attention_function():
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 9, 4)
    layer = nn.Module()
    with pytest.raises(ValueError, match="neither a mask nor `is_causal`"):
        ours._attention_forward(layer, q, q, q, None)
    with pytest.raises(ValueError, match="5 queries and 9 keys"):
        ours._attention_forward(layer, q, k, k, None, is_causal=True)
    with pytest.raises(ValueError, match="`sliding_window` is 4 without a mask"):
        ours._attention_forward(layer, q, q, q, None, is_causal=True, sliding_window=4)
    with pytest.raises(ValueError, match=r"is for B = 1, M = 5, N = 5; expected the layer's B = 1, M = 5, N = 9"):
        ours._attention_forward(layer, q, k, k, ours._attention_mask(1, 5, 5))
    with pytest.raises(ValueError, match="is list; expected"):
        ours._attention_forward(layer, q, q, q, [1])
    layer.is_causal = True  # which layers say by attribute as well
    got = ours._attention_forward(layer, q, q, q, None, sliding_window=64)[0]
    close(got, flashgau.attention(q, q, q, causal=True).transpose(1, 2), 1e-6)
    window = masking.sliding_window_bidirectional_mask_function(2)
    with pytest.raises(ValueError, match="3 queries beside 5 keys in a mask that is 2 keys ahead with 2 keys back"):
        ours._attention_mask(1, 3, 5, mask_function=window, local_size=2)
    with pytest.raises(ValueError, match="query 2 stands at key 6 of 5"):
        ours._attention_mask(1, 3, 5, q_offset=4)


@pytest.mark.parametrize(
    "name", ["eager", "sdpa", "flash_attention_2", "flex_attention", "flashgau", "paged_x", "a/b", ""]
)
def test_names_that_mean_something_to_transformers_are_refused(name):
    with pytest.raises(ValueError, match="`name` is"):
        register_attention(name)


def test_registering():
    assert register_attention() == register_attention("FlashGAU") == "FlashGAU"
    assert register_attention("another_name") == "another_name"
    transformers.AttentionInterface.register("somebody_elses", lambda *_: None)
    transformers.AttentionMaskInterface.register("his_mask", lambda *_: None)
    for name in ("somebody_elses", "his_mask"):
        with pytest.raises(ValueError, match="registered already"):
            register_attention(name)
    with pytest.raises(TypeError, match="expected a string"):
        register_attention(3)
    model = build("llama", "eager")
    model.set_attn_implementation(NAME)
    assert model.config._attn_implementation == NAME


def test_without_transformers_or_with_an_old_one_the_error_says_so(monkeypatch):
    # Not `transformers`, which may have replaced itself in the meantime.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.40.0")
    with pytest.raises(ImportError, match=r"this is transformers 4\.40\.0; expected transformers 5\.5 or later"):
        register_attention()

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(ours.importlib, "import_module", missing)
    with pytest.raises(ImportError, match="cannot be imported"):
        register_attention()


# patch_glu


def t5(activation="gated-gelu"):
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    torch.manual_seed(0)
    config = transformers.T5Config(**sizes, feed_forward_proj=activation, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2", "gemma3", "modernbert", "t5"])
def test_a_patched_model_computes_the_same(kind):
    model = t5().double() if kind == "t5" else build(kind, "eager")
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if kind == "t5" else {})}
    results = []
    keys = list(model.state_dict())
    for patched in (False, True):
        if patched:
            names = patch_glu(model)
            assert len(names) == (4 if kind == "t5" else 2)
            assert patch_glu(model) == names
            assert list(model.state_dict()) == keys
            assert all("forward" in model.get_submodule(name).__dict__ for name in names)
        logits = model(**inputs).logits
        results.append((logits.detach(), gradients(model, logits.square().sum())))
    close(results[0][0], results[1][0], 1e-11)
    for name, gradient in results[0][1].items():
        close(results[1][1][name], gradient, 1e-11 * max(1.0, gradient.abs().max().item()))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for parameter in twin.parameters():
            parameter.data.zero_()  # its own, not the original's
        assert not torch.equal(twin(**inputs).logits, results[0][0])
    close(model(**inputs).logits.detach(), results[1][0], 1e-11)


def test_patched_projections_fuse_only_while_they_are_plain(monkeypatch):
    calls = []
    for name in ("glu", "glu_linear"):
        real = getattr(flashgau, name)
        monkeypatch.setattr(flashgau, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k))
    model = build("llama", "eager")
    patch_glu(model)
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    wanted = type(mlp).forward(mlp, x)

    def used():
        calls.clear()
        close(mlp(x), wanted, 1e-12)
        return list(calls)

    assert used() == ["glu_linear"]
    fired = []
    for part, expected in ((mlp.up_proj, ["glu"]), (mlp.act_fn, []), (mlp.down_proj, ["glu_linear"])):
        handle = part.register_forward_hook(lambda *_: fired.append(1))
        assert used() == expected
        assert len(fired) == 1
        handle.remove()
        fired.clear()
    torch.nn.utils.parametrize.register_parametrization(mlp.gate_proj, "weight", nn.Identity())
    assert used() == ["glu"]
    torch.nn.utils.parametrize.remove_parametrizations(mlp.gate_proj, "weight")
    assert used() == ["glu_linear"]
    del mlp.forward
    assert used() == []


def test_t5_keeps_wo_in_fp32_and_its_dropout():
    model = t5().to(torch.bfloat16).train()
    layer = model.encoder.block[0].layer[1].DenseReluDense
    layer.wo.float()
    x = torch.randn(2, 3, 16, dtype=torch.bfloat16)
    torch.manual_seed(1)
    wanted = layer(x)
    patch_glu(model)
    torch.manual_seed(1)
    got = layer(x)
    assert got.dtype == wanted.dtype == torch.float32
    close(got, wanted, 2e-2)
    assert torch.equal(got == 0, wanted == 0)


class Gated(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12), nn.Linear(8, 12, bias=False)
        self.down_proj, self.act_fn = nn.Linear(12, 8), act or nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Clipped(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=50.0)) * self.up_proj(x))


class Swapped(Gated):
    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Residual(Gated):
    def forward(self, x):
        return x + super().forward(x)


class Extra(Gated):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("other", [Clipped, Swapped, Residual, Extra, lambda: nn.Linear(3, 3)])
def test_other_arithmetic_is_left_alone(other):
    model = nn.Sequential(other(), Gated())
    assert patch_glu(model) == ["1"]
    with pytest.raises(ValueError, match=r"nothing to patch in Sequential; expected .*gate_proj, up_proj, down_proj"):
        patch_glu(model[:1])


ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
    "linear": "identity",
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_known_by_what_they_compute(name):
    model = nn.Sequential(Gated(transformers.activations.ACT2FN[name])).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    wanted = model(x)
    assert patch_glu(model) == ["0"]
    assert model[0].forward.args[-1] == ACTIVATIONS[name]
    close(model(x), wanted, 1e-12)


def test_an_activation_that_flashgau_does_not_have_is_reported():
    model = nn.Sequential(Gated(), Gated(transformers.activations.ACT2FN["quick_gelu"]), Gated(nn.Mish()))
    with pytest.warns(UserWarning, match=r"activation: 1 \(QuickGELUActivation\), 2 \(Mish\)"):
        assert patch_glu(model) == ["0"]


def test_a_forward_replaced_by_others_is_reported():
    model = nn.Sequential(Gated(), Gated())
    model[0].forward = functools.partial(Gated.forward, model[0])
    with pytest.warns(UserWarning, match=r"replaced by other code: 0$"):
        assert patch_glu(model) == ["1"]


def test_weights_on_the_meta_device_and_the_random_state_do_not_matter():
    with torch.device("meta"):
        assert patch_glu(nn.Sequential(Gated())) == ["0"]
    model = Gated()
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert patch_glu(model) == [""]
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        patch_glu({})
