"""flashgau inside models of Hugging Face transformers: tiny random models against transformers' own eager attention."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from transformers_models import BERT, DECODERS, IDS, KINDS, NAME, build, close, gemma3_text, gradients

transformers = pytest.importorskip("transformers", minversion="5.5")
masking = pytest.importorskip("transformers.masking_utils")


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
