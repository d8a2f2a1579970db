"""A cache's configuration flows in, the number of GPUs that one engine of it spans flows out."""

from distill.config import CacheConfig
from distill.errors import UsageError


def gpus_of_engine(config: CacheConfig) -> int:
    """tensor_parallel_size times pipeline_parallel_size; 0 for transformers on a CPU.

    Raises UsageError when either is not a whole number.
    """
    options = config.engine_options
    if config.engine == "transformers" and str(options.get("device", "cuda")).startswith("cpu"):
        return 0
    sizes = [options.get(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise UsageError(f"engine_options: tensor_parallel_size and pipeline_parallel_size must be whole, got {sizes}.")
    return int(sizes[0]) * int(sizes[1])
