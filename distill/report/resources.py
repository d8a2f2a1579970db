"""A teacher's sizes and a machine flow in; memory, FLOPs, time and cost of a capture flow out."""

from dataclasses import dataclass
from typing import Any

from distill.config import CacheConfig
from distill.report.anatomy import BYTES, Anatomy
from distill.report.plan_record import Cost, Flops, Memory, Weights

_UTILISATION = 0.9  # of a GPU's memory: what vllm takes, unless gpu_memory_utilization says otherwise
_BATCH_TOKENS = {"vllm": 8192, "transformers": 4096}  # of one step, by default
_MOST_BATCH_TOKENS, _FEWEST_BATCH_TOKENS = 1 << 14, 1 << 10
_MOST_GPUS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the user says of the machine that will run the teacher. All but ``num_gpus`` may be left out."""

    gpu_memory: float | None = None  # bytes of one GPU
    gpu_flops: float | None = None  # peak FLOP/s of one GPU
    utilisation: float = 0.4  # share of the peak that is reached
    num_gpus: int = 1
    tokens_per_s: float | None = None  # of all GPUs together
    price: float | None = None  # of one GPU for an hour


def memory_of(
    sizes: Anatomy, *, config: CacheConfig, engine: str, vocab_size: int, dtype: str, machine: Machine
) -> Memory:
    """Working memory of the capture, and the fewest GPUs that hold it in each precision."""
    from distill.teacher.chunks import chunk_rows

    head_rows = chunk_rows(vocab_size, is_cuda=True)
    head_bytes = 8 * head_rows * vocab_size
    batch_tokens = _batch_tokens(config, engine)
    kv_tokens = batch_tokens + config.max_length if engine == "vllm" else 0
    kv_bytes = int(kv_tokens * sizes.kv_values * BYTES[config.dtype])
    activations = activation_bytes(sizes, batch_tokens, config.dtype)
    weights = []
    for name in BYTES:
        num_bytes = weight_bytes(sizes, name)
        tensor_parallel = None
        if machine.gpu_memory is not None:
            room = _room(config, machine.gpu_memory) - head_bytes
            tensor_parallel = fewest_gpus(sizes, shared=num_bytes + kv_bytes + activations, room=room)
        weights.append(Weights(dtype=name, num_bytes=num_bytes, tensor_parallel_size=tensor_parallel))
    return Memory(
        num_parameters=sizes.total,
        num_active_parameters=sizes.active,
        weights=tuple(weights),
        dtype=dtype,
        batch_tokens=batch_tokens,
        head_rows=head_rows,
        head_bytes=head_bytes,
        activation_bytes=activations,
        kv_tokens=kv_tokens,
        kv_bytes=kv_bytes,
    )


def held_dtype(model: Any, dtype: str) -> str:
    """The precision of ``BYTES`` in which a teacher's layers are held, by its configuration."""
    quantisation = dict(getattr(model, "quantization_config", None) or {})
    if not quantisation:
        return dtype
    bits = quantisation.get("bits") or quantisation.get("w_bit") or (4 if quantisation.get("load_in_4bit") else 8)
    return "int4" if int(bits) <= 4 else "fp8"


def weight_bytes(sizes: Anatomy, dtype: str) -> int:
    """Bytes of the weights; quantised teachers keep embedding and LM head in two bytes."""
    outside = max(BYTES[dtype], 2.0) if BYTES[dtype] < 2 else BYTES[dtype]
    return int(sizes.layers * BYTES[dtype] + (sizes.embedding + sizes.head) * outside)


def activation_bytes(sizes: Anatomy, batch_tokens: int, dtype: str) -> int:
    """Of one layer at a time: gate and up, queries, keys and values, and a few hidden states."""
    heads = (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim
    return int(batch_tokens * (2 * sizes.intermediate_size + heads + 4 * sizes.hidden_size) * BYTES[dtype])


def fewest_gpus(sizes: Anatomy, *, shared: float, room: float) -> int | None:
    """The smallest power of two that divides the heads and leaves each GPU its part of ``shared`` bytes within
    ``room``; None beyond 64 GPUs.
    """
    counts = (2**power for power in range(_MOST_GPUS.bit_length()))
    return next((n for n in counts if sizes.num_heads % n == 0 and shared / n <= room), None)


def largest_batch(sizes: Anatomy, memory: Memory, *, config: CacheConfig, gpu_memory: float) -> int | None:
    """The largest power of two of tokens in a step, up to 16,384, that the fewest GPUs still hold; else None."""
    num_gpus = next(w.tensor_parallel_size for w in memory.weights if w.dtype == memory.dtype)
    if num_gpus is None:
        return None
    room = num_gpus * (_room(config, gpu_memory) - memory.head_bytes) - weight_bytes(sizes, memory.dtype)
    tokens = _MOST_BATCH_TOKENS
    while tokens >= _FEWEST_BATCH_TOKENS:
        kv_tokens = tokens + config.max_length if memory.kv_tokens else 0
        kv_bytes = kv_tokens * sizes.kv_values * BYTES[config.dtype]
        if kv_bytes + activation_bytes(sizes, tokens, config.dtype) <= room:
            return tokens
        tokens //= 2
    return None


def flops_of(sizes: Anatomy, *, vocab_size: int, rank: float, context: float) -> Flops:
    """FLOPs of a target at a mean of ``context`` attended positions."""
    parts = (sizes.body_flops(context), sizes.head_flops(vocab_size), sizes.projection_flops(rank))
    return Flops(body=parts[0], head=parts[1], projection=parts[2], total=sum(parts))


def cost_of(num_tokens: float, *, flops: Flops | None, measured: float | None, machine: Machine) -> Cost | None:
    """Time and price at the rate that was given, else derived from FLOP/s, else measured; None without any."""
    if machine.tokens_per_s is not None:
        rate, source = machine.tokens_per_s, "given"
    elif machine.gpu_flops is not None and flops is not None:
        rate, source = machine.num_gpus * machine.gpu_flops * machine.utilisation / flops.total, "derived"
    elif measured is not None:
        rate, source = measured, "measured"
    else:
        return None
    hours = num_tokens / rate / 3600
    gpu_hours = hours * machine.num_gpus
    return Cost(
        num_tokens=round(num_tokens),
        tokens_per_s=rate,
        source=source,
        num_gpus=machine.num_gpus,
        hours=hours,
        gpu_hours=gpu_hours,
        price=None if machine.price is None else gpu_hours * machine.price,
    )


def _batch_tokens(config: CacheConfig, engine: str) -> int:
    option = "max_num_batched_tokens" if engine == "vllm" else "batch_tokens"
    return int(config.engine_options.get(option, _BATCH_TOKENS[engine]))


def _room(config: CacheConfig, gpu_memory: float) -> float:
    return gpu_memory * float(config.engine_options.get("gpu_memory_utilization", _UTILISATION))
