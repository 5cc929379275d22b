"""Tiny random models of Hugging Face transformers, on flashgau's attention or their own."""

from __future__ import annotations

import functools

import pytest
import torch

from flashgau.integrations.transformers import register_attention

transformers = pytest.importorskip("transformers", minversion="5.5")
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
MIXED = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "attention_bias": True,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
GATED = {
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", {**SIZES, **MIXED, **EXPERTS}),
    "qwen3_5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", {**SIZES, **MIXED}),
}
DECODERS = ("llama", "mistral", "gemma2", "gemma3", "gpt_oss")
IDS = torch.randint(1, 50, (3, 11), generator=torch.Generator().manual_seed(3))


@functools.cache
def _weights(kind):
    model_class, config_class, options = (KINDS | GATED)[kind]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
    for parameter in model.parameters():  # biases, norms and sinks, too, are something
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.state_dict()


def build(kind, implementation=NAME, dtype=torch.float64, **more):
    model_class, config_class, options = (KINDS | GATED)[kind]
    config = getattr(transformers, config_class)(**{**options, **more})
    if "num_experts_per_tok" in options:
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


def gemma3_text(**more):
    return transformers.Gemma3TextConfig(
        **{**SIZES, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], **more}
    )
