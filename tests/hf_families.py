"""Tiny random models of transformers, one per family that is read, and the comparison with ours."""

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

from tests.t5_oracle import one_thread

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
GLOBAL = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [4.0, 5.0, 6.0, 8.0],
    "original_max_position_embeddings": 64,
}
PHI = {**LONGROPE, "short_mscale": 1.2, "long_mscale": 1.3}
LATENT = {
    **SIZES,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,  # tiny tied ones repeat themselves
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {**SIZES, "tie_word_embeddings": True}),
    "llama-biases": (
        LlamaForCausalLM,
        LlamaConfig,
        {**SIZES, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama-linear": (
        LlamaForCausalLM,
        LlamaConfig,
        {**SIZES, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}},
    ),
    "llama-llama3": (LlamaForCausalLM, LlamaConfig, {**SIZES, "rope_parameters": LLAMA3}),
    "llama-yarn": (LlamaForCausalLM, LlamaConfig, {**SIZES, "rope_parameters": YARN}),
    "llama-longrope": (LlamaForCausalLM, LlamaConfig, {**SIZES, "rope_parameters": LONGROPE}),
    "mistral": (MistralForCausalLM, MistralConfig, {**SIZES, "sliding_window": 5}),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {**SIZES, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**SIZES, "head_dim": 16}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {**SIZES, **LOCAL}),
    "mixtral-window": (
        MixtralForCausalLM,
        MixtralConfig,
        {**SIZES, **LOCAL, "sliding_window": 5},
    ),
    "phimoe": (
        PhimoeForCausalLM,
        PhimoeConfig,
        {
            **SIZES,
            **LOCAL,
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.3,
        },
    ),
    "phimoe-longrope": (
        PhimoeForCausalLM,
        PhimoeConfig,
        {**SIZES, **LOCAL, "rope_parameters": PHI},
    ),
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {**SIZES, **GLOBAL, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**SIZES, **GLOBAL, "head_dim": 16, "norm_topk_prob": True, "decoder_sparse_step": 2},
    ),
    "olmoe": (
        OlmoeForCausalLM,
        OlmoeConfig,
        {**SIZES, "num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 1.5},
    ),
    "deepseek_v2": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config,
        {
            **LATENT,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5},
        },
    ),
    "deepseek_v2-biases": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config,
        {**LATENT, "q_lora_rank": 12, "attention_bias": True},
    ),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {
            **LATENT,
            "q_lora_rank": 12,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek_v3-halves": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {**LATENT, "q_lora_rank": 12, "n_group": 1, "topk_group": 1, "rope_interleave": False},
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {**SIZES, **LOCAL, "head_dim": 16, "sliding_window": 5},
    ),
}
SWITCH = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 4,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_experts": 4,
    "expert_capacity": 512,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "decoder_start_token_id": 0,
}
NLLB = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_experts": 4,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
}
TRANSLATORS = {
    "switch": (SwitchTransformersForConditionalGeneration, SwitchTransformersConfig, SWITCH),
    "nllb_moe": (NllbMoeForConditionalGeneration, NllbMoeConfig, NLLB),
}
SCALES = {
    "router": 1.0,
    "gate.weight": 1.0,
    "lm_head": 1.0,
    "wte": 1.0,
    "wpe": 1.0,
    "mlp.c_proj": 0.1,
}


def make_oracle(name, **changes):
    """A model of a family, with weights so large that its answers vary and all experts are met."""
    model_class, config_class, values = (MODELS | TRANSLATORS)[name]
    with one_thread():
        model = model_class(config_class(**{**values, **changes}, attn_implementation="eager"))
    if name in TRANSLATORS:  # tiny tied ones repeat themselves
        model.lm_head.weight = torch.nn.Parameter(torch.empty(model.config.vocab_size, 32))
    for module in model.modules():
        if isinstance(module, NllbMoeExperts):
            module.forward = all_experts.__get__(module)
    return widen(model)


def all_experts(self, hidden_states, router_mask, router_probs):
    """What NllbMoeExperts means to do.

    That of transformers 5.23 takes the mask (N, E) of the best expert for ids of experts, so it
    runs experts 0 and 1 whichever were chosen; its predecessors did as here.
    """
    share = 1 - self.moe_token_dropout
    each = range(self.num_experts)
    return share * sum(
        self[f"expert_{e}"](hidden_states) * router_probs[:, e : e + 1] for e in each
    )


def widen(model, seed=1):
    """Random weights, large enough to tell a wrong model from a right one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name or "embed_positions" in name:
                continue
            if weight.ndim == 1 and name.endswith("weight"):  # of a norm
                weight.uniform_(0.5, 1.5, generator=generator)
            elif weight.ndim == 1 or "bias" in name:
                weight.normal_(0, 0.3, generator=generator)
            else:
                std = next((std for part, std in SCALES.items() if part in name), 0.3)
                weight.normal_(0, std, generator=generator)
    return model.eval()


def ragged_prompts(seed=1, lengths=(3, 11, 7)):
    """Rows of so many tokens, padded with 0, and segments that say so."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    segments_BS = torch.ones_like(tokens_BS)
    for row, length in enumerate(lengths):
        tokens_BS[row, length:] = 0
        segments_BS[row, length:] = 0
    return tokens_BS, segments_BS


@torch.no_grad()
def greedy(model, tokens_BS, segments_BS, steps):
    """Our greedy tokens (B, steps), one step at a time over the cache.

    The last token of a prompt is the first that is stepped.
    """
    lengths_B1 = segments_BS.sum(-1, keepdim=True)
    tokens_B1 = tokens_BS.gather(1, lengths_B1 - 1)
    before_BS = segments_BS.scatter(1, lengths_B1 - 1, 0)
    cache = model.start_cache(model.encode(tokens_BS, before_BS), before_BS, steps)
    result = []
    for _ in range(steps):
        tokens_B1 = model.logits(model.step(tokens_B1, cache)).argmax(-1)
        result.append(tokens_B1)
    return torch.cat(result, 1)


@one_thread()
@torch.no_grad()
def assert_equal_to_oracle(model, oracle, steps=32, lengths=(3, 11, 7)):
    """Logits of ragged rows within 1e-4, and 32 greedy tokens are the oracle's, which vary."""
    tokens_BS, segments_BS = ragged_prompts(lengths=lengths)
    found = model.logits(model.read(tokens_BS, segments_BS))
    answers = greedy(model, tokens_BS, segments_BS, steps)
    for row, length in enumerate(segments_BS.sum(-1).tolist()):
        # told what we answered, the oracle would have chosen the same at each step
        whole = torch.cat([tokens_BS[row, :length], answers[row]])
        expected = oracle(input_ids=whole.unsqueeze(0)).logits[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(found[row, :length], expected[:length], rtol=0, atol=1e-4)
        assert expected[length - 1 : -1].argmax(-1).tolist() == answers[row].tolist()
    assert len(answers.unique()) >= 8
