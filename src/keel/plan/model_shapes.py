"""The shapes of transformers: what their parameters, activations and key–value caches are counted from.

A shape comes from a transformers configuration, or from `KNOWN`, a table of common models by hub id, so that
a model that is not on this machine can be planned with. Nothing here loads or builds a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from keel.accel.batch_layout import window_of
from keel.accel.modules import dropout_rates

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Head = Literal["lm", "score", "none"]
ENCODERS = ("bert", "roberta", "distilbert")
FAMILIES = (
    "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox", *ENCODERS,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Linear:
    """One matrix of a block, as peft names it. `reads`: which of the block's tensors is its input."""

    name: str
    inputs: int
    outputs: int
    bias: bool
    reads: Literal["attention", "attended", "mlp", "middle"]

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + self.outputs * self.bias


@dataclass(frozen=True, slots=True)
class Shape:
    """A transformer's sizes. `kind` is the `model_type` of transformers; of one that is not among `FAMILIES`
    the block is taken to be a Llama's (`known` is False), and counts are estimates."""

    kind: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int | None = None  # longest sequence in tokens
    tied: bool = False  # whether the head is the embedding matrix
    positions: int = 0  # rows of learned position embeddings; 0 for rotary ones
    types: int = 0  # rows of token-type embeddings
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: bool = False
    dropout: bool = False  # on the residual branches
    gelu_by_parts: bool = False  # GPT-2's `gelu_new`, written out in elementary operations
    known: bool = True
    window: int | None = None  # tokens that a position sees at most
    draws: bool = False  # whether anything is dropped at random in training, there or elsewhere
    silu: bool = True  # the nonlinearity of a gated MLP

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together, which is that of the values."""
        return self.kv_heads * self.head_dim

    @property
    def is_encoder(self) -> bool:
        return self.kind in ENCODERS

    @property
    def layer_norm(self) -> bool:
        """LayerNorm with a bias; else RMSNorm."""
        return self.kind in ("gpt2", "gpt_neox", *ENCODERS)

    @property
    def qk_norm(self) -> bool:
        return self.kind == "qwen3"

    @property
    def norms(self) -> int:
        """Normalisations in a block."""
        return 4 if self.kind == "gemma2" else 2

    @property
    def gated(self) -> bool:
        return not self.layer_norm

    @property
    def plain_silu(self) -> bool:
        """Whether its MLP is down(silu(gate(x)) · up(x)), by three matrices without biases."""
        return self.known and self.silu and not self.mlp_bias and len(self.linears()) == 7

    @property
    def linear(self) -> bool:
        """Whether its matrices are torch's linear layers: GPT-2 has others."""
        return self.known and self.kind != "gpt2"

    def linears(self) -> tuple[Linear, ...]:
        """The matrices of one block."""
        h, i, q, k = self.hidden, self.intermediate, self.queries, self.keys
        b, o, m = self.qkv_bias, self.out_bias, self.mlp_bias
        names = {
            "gpt2": ("c_attn", "c_proj", "c_fc", "c_proj"),
            "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
            "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
            "distilbert": ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
            "bert": ("query", "key", "value", "dense", "dense", "dense"),
            "roberta": ("query", "key", "value", "dense", "dense", "dense"),
        }.get(self.kind, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
        if len(names) == 4:
            attention = [Linear(names[0], h, q + 2 * k, b, "attention")]
        else:
            widths = zip(names, (q, k, k), strict=False)
            attention = [Linear(name, h, width, b, "attention") for name, width in widths]
        out, *first, last = names[len(attention) :]
        width = 2 * i if self.gated and len(first) == 1 else i
        return (
            *attention,
            Linear(out, q, h, o, "attended"),
            *(Linear(name, h, width, m, "mlp") for name in first),
            Linear(last, i, h, m, "middle"),
        )

    def parameters(self, head: Head = "lm", labels: int = 1) -> int:
        """Parameters, tied ones once. head "lm": of a language model (an encoder's masked one); "score": of a
        sequence classifier with `labels` outputs; "none": of the backbone, without an encoder's pooler."""
        h = self.hidden
        norm = h * (2 if self.layer_norm else 1)
        block = sum(linear.parameters for linear in self.linears()) + self.norms * norm
        block += 2 * self.head_dim * self.qk_norm
        total = (
            (self.vocab + self.positions + self.types) * h + self.layers * block + norm
        )  # the last, or BERT's first
        if head == "score":
            return total + (h * h + h + labels * (h + 1) if self.is_encoder else labels * h)
        if head == "lm":
            return total + (
                h * h + h + norm + self.vocab if self.is_encoder else 0 if self.tied else self.vocab * h
            )
        return total

    def adapter_parameters(self, r: int, targets: str | Sequence[str] = "all-linear") -> int:
        """Parameters of LoRA adapters of rank `r` on the blocks' matrices that `targets` names (heads have
        none)."""
        return self.layers * sum(r * (x.inputs + x.outputs) for x in targeted(self, targets))


def targeted(shape: Shape, targets: str | Sequence[str]) -> tuple[Linear, ...]:
    """The matrices of a block that get an adapter."""
    every = shape.linears()
    if targets == "all-linear":
        return every
    wanted = [targets] if isinstance(targets, str) else targets
    return tuple(x for x in every if any(name.split(".")[-1] == x.name for name in wanted))


def of_config(config: PreTrainedConfig) -> Shape | None:
    """The shape of a transformers configuration; None where it names no hidden size, layers and heads."""
    config = config.get_text_config()
    kind = config.model_type
    hidden, layers, heads = (_of(config, *names) for names in (
        ("hidden_size", "n_embd", "dim", "d_model"), ("num_hidden_layers", "n_layer", "n_layers"),
        ("num_attention_heads", "n_head", "n_heads"),
    ))  # fmt: skip
    if not (hidden and layers and heads):
        return None
    plain = kind in ("gpt2", *ENCODERS)
    bias = plain or bool(getattr(config, "attention_bias", kind == "gpt_neox"))
    context = _of(config, "max_position_embeddings", "n_positions")
    learned = kind in ("gpt2", *ENCODERS)
    return Shape(
        kind=kind, hidden=hidden, layers=layers, heads=heads, vocab=config.vocab_size, context=context,
        intermediate=_of(config, "intermediate_size", "n_inner", "hidden_dim", "ffn_dim") or 4 * hidden,
        kv_heads=_of(config, "num_key_value_heads") or heads,
        head_dim=_of(config, "head_dim") or hidden // heads,
        tied=plain or bool(getattr(config, "tie_word_embeddings", False)),
        positions=context or 0 if learned else 0,
        types=getattr(config, "type_vocab_size", 0) if kind in ("bert", "roberta") else 0,
        qkv_bias=bias or kind == "qwen2", out_bias=bias,
        mlp_bias=plain or kind == "gpt_neox" or bool(getattr(config, "mlp_bias", False)),
        attention_dropout=_rate(config, "attn_pdrop", "attention_dropout", "attention_probs_dropout_prob"),
        dropout=_rate(config, "resid_pdrop", "hidden_dropout", "hidden_dropout_prob", "dropout"),
        gelu_by_parts=getattr(config, "activation_function", "") == "gelu_new",
        known=kind in FAMILIES, window=window_of(config), draws=bool(dropout_rates(config)),
        silu=getattr(config, "hidden_act", "") == "silu",
    )  # fmt: skip


def _of(config: PreTrainedConfig, *names: str) -> int:
    """The first of these settings that is a number; 0 where none is."""
    return next((v for name in names if isinstance(v := getattr(config, name, None), int)), 0)


def _rate(config: PreTrainedConfig, *names: str) -> bool:
    return any((getattr(config, name, 0) or 0) > 0 for name in names)


# ---------------------------------------------------------------- common models, by hub id


def _gpt2(hidden: int, layers: int, heads: int) -> Shape:
    return Shape(
        "gpt2",
        hidden,
        4 * hidden,
        layers,
        heads,
        heads,
        hidden // heads,
        50257,
        1024,
        True,
        1024,
        0,
        True,
        True,
        True,
        True,
        True,
        True,
        draws=True,
    )


def _llama(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    context: int,
    *,
    kind: str = "llama",
    tied: bool = False,
    head_dim: int = 0,
    qkv_bias: bool = False,
    window: int | None = None,
) -> Shape:
    width = head_dim or hidden // heads
    return Shape(
        kind,
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        width,
        vocab,
        context,
        tied,
        qkv_bias=qkv_bias,
        window=window,
    )


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocab: int, *, tied: bool = False
) -> Shape:
    return _llama(
        hidden, intermediate, layers, heads, kv, vocab, 32768, kind="qwen2", tied=tied, qkv_bias=True
    )


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool = False) -> Shape:
    return _llama(
        hidden, intermediate, layers, heads, 8, 151936, 40960, kind="qwen3", tied=tied, head_dim=128
    )


def _gemma2(hidden: int, intermediate: int, layers: int, heads: int, kv: int) -> Shape:
    return _llama(
        hidden,
        intermediate,
        layers,
        heads,
        kv,
        256000,
        8192,
        kind="gemma2",
        tied=True,
        head_dim=256,
        window=4096,
    )


def _pythia(hidden: int, layers: int, heads: int, vocab: int = 50304) -> Shape:
    width = hidden // heads
    return Shape(
        "gpt_neox",
        hidden,
        4 * hidden,
        layers,
        heads,
        heads,
        width,
        vocab,
        2048,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        draws=True,
    )


def _encoder(kind: str, layers: int, vocab: int, positions: int, types: int) -> Shape:
    return Shape(
        kind, 768, 3072, layers, 12, 12, 64, vocab, 512, True, positions, types, True, True, True, True, True,
        draws=True,
    )  # fmt: skip


KNOWN: dict[str, Shape] = {
    "openai-community/gpt2": _gpt2(768, 12, 12),
    "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
    "openai-community/gpt2-large": _gpt2(1280, 36, 20),
    "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
    "distilbert/distilgpt2": _gpt2(768, 6, 12),
    "meta-llama/Llama-2-7b-hf": _llama(4096, 11008, 32, 32, 32, 32000, 4096),
    "meta-llama/Llama-2-13b-hf": _llama(5120, 13824, 40, 40, 40, 32000, 4096),
    "meta-llama/Llama-2-70b-hf": _llama(8192, 28672, 80, 64, 8, 32000, 4096),
    "meta-llama/Meta-Llama-3-8B": _llama(4096, 14336, 32, 32, 8, 128256, 8192),
    "meta-llama/Meta-Llama-3-70B": _llama(8192, 28672, 80, 64, 8, 128256, 8192),
    "meta-llama/Llama-3.1-8B": _llama(4096, 14336, 32, 32, 8, 128256, 131072),
    "meta-llama/Llama-3.1-70B": _llama(8192, 28672, 80, 64, 8, 128256, 131072),
    "meta-llama/Llama-3.2-1B": _llama(2048, 8192, 16, 32, 8, 128256, 131072, tied=True),
    "meta-llama/Llama-3.2-3B": _llama(3072, 8192, 28, 24, 8, 128256, 131072, tied=True),
    "Qwen/Qwen2.5-0.5B": _qwen2(896, 4864, 24, 14, 2, 151936, tied=True),
    "Qwen/Qwen2.5-1.5B": _qwen2(1536, 8960, 28, 12, 2, 151936, tied=True),
    "Qwen/Qwen2.5-3B": _qwen2(2048, 11008, 36, 16, 2, 151936, tied=True),
    "Qwen/Qwen2.5-7B": _qwen2(3584, 18944, 28, 28, 4, 152064),
    "Qwen/Qwen2.5-14B": _qwen2(5120, 13824, 48, 40, 8, 152064),
    "Qwen/Qwen2.5-32B": _qwen2(5120, 27648, 64, 40, 8, 152064),
    "Qwen/Qwen2.5-72B": _qwen2(8192, 29568, 80, 64, 8, 152064),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64),
    "mistralai/Mistral-7B-v0.1": _llama(4096, 14336, 32, 32, 8, 32000, 32768, kind="mistral", window=4096),
    "google/gemma-2-2b": _gemma2(2304, 9216, 26, 8, 4),
    "google/gemma-2-9b": _gemma2(3584, 14336, 42, 16, 8),
    "microsoft/Phi-3-mini-4k-instruct": _llama(3072, 8192, 32, 32, 32, 32064, 4096, kind="phi3", window=2047),
    "HuggingFaceTB/SmolLM2-135M": _llama(576, 1536, 30, 9, 3, 49152, 8192, tied=True),
    "HuggingFaceTB/SmolLM2-360M": _llama(960, 2560, 32, 15, 5, 49152, 8192, tied=True),
    "HuggingFaceTB/SmolLM2-1.7B": _llama(2048, 8192, 24, 32, 32, 49152, 8192, tied=True),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _llama(2048, 5632, 22, 32, 4, 32000, 2048),
    "EleutherAI/pythia-14m": _pythia(128, 6, 4),
    "EleutherAI/pythia-70m": _pythia(512, 6, 8),
    "EleutherAI/pythia-160m": _pythia(768, 12, 12),
    "EleutherAI/pythia-410m": _pythia(1024, 24, 16),
    "EleutherAI/pythia-1b": _pythia(2048, 16, 8),
    "EleutherAI/pythia-1.4b": _pythia(2048, 24, 16),
    "EleutherAI/pythia-2.8b": _pythia(2560, 32, 32),
    "EleutherAI/pythia-6.9b": _pythia(4096, 32, 32, 50432),
    "EleutherAI/pythia-12b": _pythia(5120, 36, 40, 50688),
    "google-bert/bert-base-uncased": _encoder("bert", 12, 30522, 512, 2),
    "distilbert/distilbert-base-uncased": _encoder("distilbert", 6, 30522, 512, 0),
    "FacebookAI/roberta-base": _encoder("roberta", 12, 50265, 514, 1),
}  # fmt: skip
ALIASES = ("-instruct", "-chat", "-it", "-base", "-hf", "-deduped", "-v0.1", "-v0.2", "-v0.3", "-v1.0")


def known(name: str) -> Shape | None:
    """The shape of a hub id of the table. The owner may be left out (`gpt2`), and a tuned variant's suffix is
    ignored."""

    def bare(name: str) -> str:
        name = name.lower().rpartition("/")[2].removeprefix("meta-")
        while ending := next((e for e in ALIASES if name.endswith(e)), None):
            name = name.removesuffix(ending)
        return name

    return KNOWN.get(name) or next((shape for one, shape in KNOWN.items() if bare(one) == bare(name)), None)
