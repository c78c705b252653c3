"""A tiny model of every type in transformers' mapping of causal language models, made from its config.

A config class is read field by field: what says a size is made small, layers of each kind are kept once.
`OWN` holds what a type needs beyond that, `LEFT_OUT` the types that are no causal language model over text
alone, or cannot be built here, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SPECIAL = ("<|end|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
VOCAB = 256 + len(SPECIAL)
EOS, PAD = 256, 257
CONTEXT = 256
WINDOW = 16  # tokens that windowed and chunked layers see: shorter than the rows of the tests
STD = 0.12  # of the weights: about six times what most types begin with, so that a mistake shows

IDS = {"vocab_size": VOCAB, "eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": None}

# What a field of a config becomes, by its name. Widths fit each other: 4 heads of 8 make 32.
SIZES: dict[str, Any] = {
    # width
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim", "dim", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("embedding_dim", "input_embedding_size", "output_embedding_size", "lru_width"), 32),
    # depth
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("swa_num_attention_heads",), 4),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "d_head", "dim_head", "kv_channels"), 8),
    **dict.fromkeys(("attention_head_size", "attention_head_dim", "query_pre_attn_scalar"), 8),
    # feed-forward
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "ffn_hidden_size", "dim_ff"), 64),
    **dict.fromkeys(("dff", "d_inner", "feed_forward_size"), 64),
    # experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16
    ),
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size",), 16),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("zero_expert_num",), 2),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("num_nextn_predict_layers", "num_kv_shared_layers"), 0),
    # latent attention and its indexer
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "hc_lowrank", "gated_norm_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "index_head_dim"), 8),
    "qk_rope_head_dim": 4,
    "qk_head_dim": 12,
    "index_n_heads": 8,  # their ReLU makes ties at 0 where they are few, and a tie is anybody's
    "index_topk": 8,
    # recurrent and convolutional layers
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "mamba_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size"), 16),
    # small tables beside the embeddings
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "d_rel", "router_hidden_size"), 8),
    "vocab_size_per_layer_input": VOCAB,
    "unpadded_vocab_size": VOCAB,
    "hidden_size_global": 32,
    # how far
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), CONTEXT
    ),
    **dict.fromkeys(
        ("model_max_length", "max_target_positions", "original_max_position_embeddings"), CONTEXT
    ),
    **dict.fromkeys(
        ("sliding_window", "window_size", "attention_window_size", "sliding_window_size"), WINDOW
    ),
    **dict.fromkeys(("attention_chunk_size", "local_attention"), WINDOW),
    **dict.fromkeys(("rel_extent",), 32),
    # nothing is forced, and nothing is drawn at random
    **dict.fromkeys(("forced_eos_token_id", "forced_bos_token_id")),
    **dict.fromkeys(("attention_dropout", "dropout", "hidden_dropout_prob", "hidden_dropout"), 0.0),
    **dict.fromkeys(("attention_probs_dropout_prob", "activation_dropout", "embd_pdrop", "attn_pdrop"), 0.0),
    **dict.fromkeys(("resid_pdrop", "emb_pdrop", "layerdrop", "decoder_layerdrop", "residual_dropout"), 0.0),
    **dict.fromkeys(("router_jitter_noise", "input_jitter_noise", "embedding_dropout", "mlp_dropout"), 0.0),
    **dict.fromkeys(("resid_dropout", "embed_dropout", "dropout_p"), 0.0),
}
# Fields that name each layer's kind.
LAYER_KINDS = ("layer_types", "layers_block_type", "block_types")

# Where a config says None, these stay: the type has none of it.
OPTIONAL = ("sliding_window", "window_size", "attention_chunk_size", "q_lora_rank", "n_inner", "d_inner")

_ENCODER = {"is_decoder": True}  # causal only where the config says so
# positions count from the id of padding
_FROM_PAD = {"is_decoder": True, "max_position_embeddings": CONTEXT + PAD + 1}

_WINDOWED = {"layer_types": ["sliding_attention", "full_attention"]}
_CONVOLVED = {"layer_types": ["conv", "full_attention"]}

# What a type needs beyond its sizes.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "bert": _ENCODER,
    "bert-generation": _ENCODER,
    "big_bird": _ENCODER | {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "camembert": _FROM_PAD,
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": _WINDOWED
    | {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        }
    },
    "cwm": {"bos_token_id": EOS},
    "data2vec-text": _FROM_PAD,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"head_dim": 16, "num_key_value_heads": 1},
    # all of its context, as published: beyond it, equal tokens tie, and the width of a batch breaks the tie
    "doge": {"keep_window_size": CONTEXT},
    "dots1": _WINDOWED,
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_text": {
        "head_dim": 12,
        "per_layer_config": {
            1: {
                "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
                "head_dim": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
            }
        },
    },
    "dots3_note_vision_encoder": {"per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 32},
    "electra": _ENCODER,
    "ernie": _ENCODER,
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 8},
    "gemma4_text": {"per_layer_config": {"01": {"head_dim": 16}}},
    "gemma4_unified_text": {"per_layer_config": {"01": {"head_dim": 16}}},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "laguna": _WINDOWED,
    "lfm2": _CONVOLVED,
    "lfm2_moe": _CONVOLVED,
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "megatron-bert": _ENCODER,
    "mellum": _WINDOWED,
    "ministral": _WINDOWED,
    "modernbert-decoder": {"bos_token_id": EOS},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "phi4_multimodal_audio": {"nemo_conv_channels": 8, "ext_pw_out_channel": 32},
    "prophetnet": {"max_position_embeddings": CONTEXT + PAD + 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 8, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ngram_vocab_size_base": 64,
    },
    "rembert": _ENCODER,
    "roberta": _FROM_PAD,
    "roberta-prelayernorm": _FROM_PAD,
    "roc_bert": _ENCODER
    | {"shape_vocab_size": VOCAB, "pronunciation_vocab_size": VOCAB}
    | {"shape_embed_dim": 8, "pronunciation_embed_dim": 8},
    "roformer": _ENCODER,
    "xlm": {"causal": True},
    "xlm-roberta": _FROM_PAD,
    "xlm-roberta-xl": _FROM_PAD,
    "xlnet": {"attn_type": "uni"},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # its cache rounds widths up to 64
    "xmod": _FROM_PAD | {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# Published models of a type that read otherwise than its defaults: by the type's name and one for this.
VARIANTS: dict[str, dict[str, Any]] = {
    "falcon+alibi": {"alibi": True},
    "falcon+new": {"new_decoder_architecture": True},
    "gemma3n_text+shared": {
        "num_kv_shared_layers": 2, "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_text+experts": {"enable_moe_block": True},
    "gemma4_text+shared": {
        "num_kv_shared_layers": 2, "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "per_layer_config": {"01": {"head_dim": 16}, "03": {"head_dim": 16}},
    },
    "qwen2+windows": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
}  # fmt: skip

LEFT_OUT: dict[str, str] = {
    "cpmant": "it reads all that it is given both ways",
    "emu3": "saved, it is of a type (emu3_text_model) that AutoModelForCausalLM does not open",
    "gemma3n": "its vision part needs timm and pillow; the text part is gemma3n_text",
    "gemma4_assistant": "a draft model: it reads the keys and values of the model that it drafts for",
    "gemma4_unified_assistant": "a draft model: it reads the keys and values of the model that it drafts for",
    "mllama": "saved, it is of a type (mllama_text_model) that AutoModelForCausalLM does not open",
    "musicgen": "makes codes of sounds, several at a position; it has no text vocabulary of its own",
    "musicgen_melody": "makes codes of sounds, several at a position; it has no text vocabulary of its own",
    "reformer": "it sorts the tokens of a row by their hashes, so that later ones change earlier ones",
}


def kinds() -> list[str]:
    """Every model type that is tried, in order; behind them the variants."""
    return [*(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in LEFT_OUT), *VARIANTS]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then `SPECIAL`; EOS is `<|end|>`, and there is a pad of its own and no BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=SPECIAL[0], pad_token=SPECIAL[1], clean_up_tokenization_spaces=False
    )


def settings(kind: str) -> dict[str, Any]:
    """Keyword arguments of a type's config class that make it tiny."""
    base = kind.partition("+")[0]
    return IDS | _shrunk(AutoConfig.for_model(base).to_dict(), base) | VARIANTS.get(kind, {})


def config(kind: str, **more: Any) -> PreTrainedConfig:
    """A type's tiny config."""
    return AutoConfig.for_model(kind.partition("+")[0], **settings(kind) | more)


def build(kind: str, seed: int = 0, **more: Any) -> Any:
    """A type's tiny model with seeded weights, in evaluation mode; more: fields of its config."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(kind, **more), dtype=torch.float32).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:  # norms, biases, sinks, rates of decay: near what they begin with
                parameter.add_(torch.randn_like(parameter), alpha=STD)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, STD)
            else:  # convolutions and stacks of experts
                parameter.normal_(0.0, 2 * STD if parameter.shape[-1] <= 8 else STD)
    model.tie_weights()
    return model


def _shrunk(fields: Mapping[str, Any], kind: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict) and "model_type" in value:
            part = str(value["model_type"])
            ids = IDS if "vocab_size" in value else {}
            given[name] = ids | _shrunk(value, part) | {"model_type": part}
        elif name in SIZES and not (value is None and name in OPTIONAL):
            given[name] = SIZES[name]
    if "qk_rope_head_dim" in given:  # latent attention: each head has its own keys
        given.pop("head_dim", None)
        given["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name in LAYER_KINDS:
        if isinstance(value := fields.get(name), Sequence) and len(value) > 1:
            given |= _one_of_each(fields, name)
    return given | OWN.get(kind, {})


def _one_of_each(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Each kind of layer once, the kinds of feed-forward beside them, and the depth that follows."""
    chosen = list(dict.fromkeys(fields[name]))
    chosen = chosen if len(chosen) > 1 else chosen * 2
    given: dict[str, Any] = {name: chosen, "num_hidden_layers": len(chosen)}
    feed_forward = fields.get("mlp_layer_types")
    if isinstance(feed_forward, Sequence) and feed_forward:
        both = list(dict.fromkeys(feed_forward))
        given["mlp_layer_types"] = (both * len(chosen))[: len(chosen)]
    return given
