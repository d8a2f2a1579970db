"""A teacher's configuration flows in, what it weighs and what a token costs it flow out; no weights are read.

The decoder that is counted is the one of Llama, Qwen, Mistral, Gemma, Granite and their mixtures of experts: grouped
attention and a gated feed-forward block.
"""

from dataclasses import dataclass
from typing import Any

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "int4": 0.5625}  # int4: with scales, groups of 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """Sizes of a teacher, in parameters. ``active`` are those of the layers that one token passes through."""

    hidden_size: int
    intermediate_size: int  # of the widest feed-forward block that a token passes through
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_rows: int  # of the LM head, padding included
    layers: int
    active: int
    embedding: int
    head: int  # 0 where it is tied to the embedding

    @property
    def total(self) -> int:
        """All parameters."""
        return self.layers + self.embedding + self.head

    @property
    def kv_values(self) -> int:
        """Numbers that a token leaves in the KV cache."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def body_flops(self, context: float) -> float:
        """FLOPs of the layers for a token that attends to ``context`` positions on average (a product counts 2)."""
        return 2.0 * self.active + 4.0 * self.num_layers * self.num_heads * self.head_dim * context

    def head_flops(self, vocab_size: int) -> float:
        """FLOPs of the LM head at one position; capture runs it over the real vocabulary."""
        return 2.0 * self.hidden_size * vocab_size

    def projection_flops(self, rank: float) -> float:
        """FLOPs of projecting one final hidden state."""
        return 2.0 * self.hidden_size * rank


def anatomy(model: Any) -> Anatomy | None:
    """The sizes of a language model by its configuration (of transformers); None for one that is built otherwise."""
    text = model.get_text_config()
    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if any(getattr(text, name, None) is None for name in wanted) or getattr(text, "kv_lora_rank", None):
        return None
    dim, num_heads = int(text.hidden_size), int(text.num_attention_heads)
    num_kv_heads = int(getattr(text, "num_key_value_heads", None) or num_heads)
    head_dim = int(getattr(text, "head_dim", None) or dim // num_heads)
    attention = 2 * dim * head_dim * (num_heads + num_kv_heads)
    blocks = [_feed_forward(text, layer) for layer in range(int(text.num_hidden_layers))]
    rows = int(text.vocab_size)
    return Anatomy(
        hidden_size=dim,
        intermediate_size=max(active for _, active in blocks) // (3 * dim),
        num_layers=len(blocks),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_rows=rows,
        layers=sum(attention + 2 * dim + whole for whole, _ in blocks),
        active=sum(attention + 2 * dim + active for _, active in blocks),
        embedding=rows * dim,
        head=0 if getattr(text, "tie_word_embeddings", False) else rows * dim,
    )


def _feed_forward(text: Any, layer: int) -> tuple[int, int]:
    """Parameters of a layer's feed-forward block: all, and those that a token passes through."""
    dim = int(text.hidden_size)
    num_experts = int(_first(text, "num_experts", "num_local_experts", "n_routed_experts"))
    is_dense = (
        num_experts == 0
        or layer < int(_first(text, "first_k_dense_replace"))
        or layer in (getattr(text, "mlp_only_layers", None) or ())
        or (layer + 1) % int(_first(text, "decoder_sparse_step") or 1) != 0
    )
    if is_dense:
        dense = 3 * dim * int(text.intermediate_size)
        return dense, dense
    width = int(_first(text, "moe_intermediate_size") or text.intermediate_size)
    shared = int(_first(text, "shared_expert_intermediate_size") or width * _first(text, "n_shared_experts"))
    always = dim * num_experts + 3 * dim * shared
    num_active = int(_first(text, "num_experts_per_tok") or 1)
    return always + 3 * dim * width * num_experts, always + 3 * dim * width * num_active


def _first(text: Any, *names: str) -> int:
    """The first of these fields that the configuration has and that is not 0; else 0."""
    return next((int(value) for name in names if (value := getattr(text, name, None))), 0)
