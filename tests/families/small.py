"""Small configurations of transformers' causal language models, made from the defaults of each."""

from __future__ import annotations

from typing import Any

VOCABULARY, SEQ_LEN = 264, 16

# Names of sizes in transformers' configurations; a family is given those that it has.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "intermediate_size": 64,
    "n_inner": 64,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_d_head": 16,
    "mamba_n_heads": 4,
    "mamba_n_groups": 1,
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
}
_MLA = {"num_key_value_heads": 4, "head_dim": 8}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
# What a family needs beside that: sizes that depend on others, parts that are larger than the rest by default.
_OWN: dict[str, dict[str, Any]] = {
    "axk2": _MLA,
    "bailing_hybrid": {**_MLA, "layer_group_size": 2},
    "bamba": {"mamba_expand": 2, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
    },
    "deepseek_v2": {**_MLA, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_MLA, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "dots1": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 264, "hidden_size_per_layer_input": 8},
    "glm4_moe_lite": {**_MLA, "first_k_dense_replace": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"mamba_expand": 2, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "expand": 2},
    "minicpm3": _MLA,
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "youtu": _MLA,
}


# Those that `make test` tries: the ones that people use most, and one of each kind of trouble.
_SOME = (
    "bloom codegen deepseek_v2 deepseek_v3 gemma2 glm4_moe gpt2 gpt_neo gpt_neox gpt_oss gptj granitemoe jamba "
    "llama mamba minimax mixtral olmoe phimoe qwen2_moe qwen3 qwen3_moe qwen3_next "
)
# And those that `make families` tries as well. Encoders, and decoders of another model, are no language models alone.
_OTHERS = (
    "afmoe apertus arcee aria_text axk2 bailing_hybrid bamba beam biogpt bitnet cohere cohere2 cohere2_moe ctrl cwm "
    "dbrx deepseek_v4 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba "
    "flex_olmo flint gemma gemma3_text gemma3n_text gemma4_unified_text glm glm4 glm4_moe_lite gpt-sw3 gpt_bigcode "
    "gpt_neox_japanese granite granite_swa granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text "
    "hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax inkling2_text inkling_text internlm3 iquestcoder jais2 "
    "jetmoe kolibri1 laguna lfm2 lfm2_moe lfm3 llama4_text mamba2 mellum mimo_v2_flash minicpm3 minimax_m2 "
    "minimax_m3_vl_text ministral ministral3 mistral modernbert-decoder moshi mpt nanochat nemotron nemotron_h olmo "
    "olmo2 olmo3 olmo_hybrid openai-gpt opt persimmon phi phi3 qwen2 qwen3_5_moe_text qwen3_5_text qwen4_exp_text "
    "recurrent_gemma rwkv seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm xlstm youtu "
)
SOME, OTHERS = _SOME.split(), _OTHERS.split()


def small_config(model_type: str) -> dict[str, Any]:
    """Arguments of a transformers configuration, as `model.config` takes them: two narrow layers, nothing random."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(model_type)
    others: dict[str, str] = getattr(type(default), "attribute_map", {}) or {}
    has = default.to_dict()
    sizes = {others.get(name, name): value for name, value in _SIZES.items() if others.get(name, name) in has}
    still = {name: 0.0 for name, value in has.items() if "drop" in name and isinstance(value, float)}
    return {"model_type": model_type, **sizes, **still, **_OWN.get(model_type, {})}
