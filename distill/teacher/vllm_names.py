"""The private names of vLLM that capture relies on: an installed vLLM, or a wheel, flows in, what has moved flows out.

vLLM promises none of these names. They are looked up in its sources, before anything of it is imported, so that a new
release fails at the start with the name that moved and not in the middle of a run. The same check reads wheels of other
releases without installing them:

    python -m distill.teacher.vllm_names vllm-0.33.0-….whl
"""

import ast
import sys
import zipfile
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

from distill.errors import UsageError

# File below the package -> class or "" for the module -> names: methods, fields, attributes set on self, or exports.
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "entrypoints/llm.py": {"LLM": ("collective_rpc",)},
    "v1/engine/llm_engine.py": {"LLMEngine": ("add_request", "step", "vllm_config", "engine_core", "model_config")},
    "sampling_params.py": {
        "": ("RequestOutputKind",),
        "SamplingParams": ("stop_token_ids", "ignore_eos", "output_kind", "extra_args", "seed", "detokenize"),
    },
    "v1/core/sched/output.py": {
        "NewRequestData": ("req_id", "num_computed_tokens", "sampling_params"),
        "CachedRequestData": ("req_ids", "num_computed_tokens"),
        "SchedulerOutput": ("scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens"),
    },
    "v1/worker/gpu_worker.py": {"Worker": ("load_model", "execute_model", "model_runner")},
    "v1/worker/cpu_worker.py": {"CPUWorker": ("init_device",)},
    "v1/worker/gpu_model_runner.py": {
        "GPUModelRunner": ("execute_model_state", "input_batch", "get_model"),
        "ExecuteModelState": ("hidden_states",),
    },
    "v1/worker/gpu/model_runner.py": {
        "GPUModelRunner": ("execute_model_state", "get_model"),
        "ExecuteModelState": ("hidden_states", "input_batch"),
    },
    "v1/worker/gpu/input_batch.py": {"InputBatch": ("req_ids",)},
    "model_executor/layers/logits_processor.py": {"LogitsProcessor": ("scale", "soft_cap")},
    "model_executor/layers/vocab_parallel_embedding.py": {
        "VocabParallelEmbeddingShardIndices": ("org_vocab_start_index", "num_org_elements"),
        "VocabParallelEmbedding": ("shard_indices",),
    },
    "distributed/parallel_state.py": {"": ("get_tp_group", "get_pp_group")},
    "distributed/communication_op.py": {"": ("tensor_model_parallel_all_gather",)},
}
# What inner layers and attention heads need beside these.
INNER_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "v1/worker/gpu_model_runner.py": {
        "GPUModelRunner": ("use_aux_hidden_state_outputs",),
        "ExecuteModelState": ("aux_hidden_states",),
    },
    "v1/worker/gpu/model_runner.py": {
        "GPUModelRunner": ("use_aux_hidden_state_outputs",),
        "ExecuteModelState": ("aux_hidden_states",),
    },
    "model_executor/models/interfaces.py": {
        "": ("supports_eagle3",),
        "SupportsEagle3": ("set_aux_hidden_state_layers",),
    },
    "model_executor/layers/linear.py": {"LinearBase": ("quant_method",), "QKVParallelLinear": ("num_kv_heads",)},
    "distributed/communication_op.py": {"": ("tensor_model_parallel_all_reduce",)},
}


def moved_names(
    read: Callable[[str], str | None], names: dict[str, dict[str, tuple[str, ...]]] | None = None
) -> list[str]:
    """What of ``names`` is not there, as ``file: Class.name``. ``read`` gives a file's source, or None."""
    moved = []
    for file, owners in (NAMES if names is None else names).items():
        source = read(file)
        if source is None:
            moved.append(f"{file}: the file")
            continue
        tree = ast.parse(source)
        for owner, members in owners.items():
            found = _names_of(tree, owner)
            if found is None:
                moved.append(f"{file}: {owner}")
            else:
                moved += [f"{file}: {owner + '.' if owner else ''}{name}" for name in members if name not in found]
    return moved


def check_installed(version: str, *, inner: bool = False) -> None:
    """Raises UsageError that names what has moved in the vLLM that is installed; ``inner``: also for inner layers."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    read = _reader_of(Path(spec.origin).parent)
    if moved := moved_names(read):
        raise UsageError(
            f"vllm {version} has moved what capture relies on: {'; '.join(moved)}. Install a release that "
            "docs/vllm.md lists as supported, or use --engine transformers."
        )
    if inner and (moved := moved_names(read, INNER_NAMES)):
        raise UsageError(
            f"vllm {version} has moved what inner layers rely on: {'; '.join(moved)}. Keep no layers and no heads, "
            "install a release that docs/vllm.md lists as supported, or use --engine transformers."
        )


def _reader_of(folder: Path) -> Callable[[str], str | None]:
    def read(file: str) -> str | None:
        path = folder / file
        return path.read_text(encoding="utf-8") if path.is_file() else None

    return read


def _wheel_reader(wheel: zipfile.ZipFile) -> Callable[[str], str | None]:
    files = set(wheel.namelist())

    def read(file: str) -> str | None:
        name = f"vllm/{file}"
        return wheel.read(name).decode() if name in files else None

    return read


def _names_of(tree: ast.Module, owner: str) -> set[str] | None:
    """Names that a class of the module has, or the module itself; None where there is no such class."""
    if not owner:
        return set(_defined(tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            return {*_defined(node.body), *_set_on_self(node)}
    return None


def _defined(body: Iterable[ast.stmt]) -> Iterable[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _set_on_self(owner: ast.ClassDef) -> Iterable[str]:
    for node in ast.walk(owner):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets if isinstance(node, ast.Assign | ast.AnnAssign) else []:
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                yield target.attr


def main() -> None:
    """Checks wheels given on the command line; exits with 1 when a name has moved in one of them."""
    failed = False
    for path in sys.argv[1:]:
        with zipfile.ZipFile(path) as wheel:
            read = _wheel_reader(wheel)
            moved, inner = moved_names(read), moved_names(read, INNER_NAMES)
        print(f"{Path(path).name}: {'; '.join(moved) or 'every name is there'}")
        print(f"{Path(path).name}, for inner layers: {'; '.join(inner) or 'every name is there'}")
        failed |= bool(moved)
    sys.exit(failed)


if __name__ == "__main__":
    main()
