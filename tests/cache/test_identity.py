"""Hashes tell apart what a vocabulary's size does not, and differences read as sentences."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from distill.cache.identity import data_differences, differences, model_files_hash, text_hash, token_map_hash
from distill.errors import UsageError


def test_token_map_hash_sees_a_swap_and_ignores_order() -> None:
    assert token_map_hash({"a": 0, "b": 1}) == token_map_hash({"b": 1, "a": 0})
    assert token_map_hash({"a": 0, "b": 1}) != token_map_hash({"a": 1, "b": 0})
    assert token_map_hash({"\udc80": 0}) != token_map_hash({"\udc81": 0})


def test_text_hash_is_sha256_of_utf8() -> None:
    assert text_hash("你好") == hashlib.sha256("你好".encode()).hexdigest()


def test_model_hash_depends_on_names_and_contents(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, bytes]) -> str:
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
        return model_files_hash(tmp_path / name)

    first = folder("a", {"x.safetensors": b"1", "y.safetensors": b"2", "config.json": b"{}"})
    assert first == folder("b", {"x.safetensors": b"1", "y.safetensors": b"2", "pytorch_model.bin": b"pickle"})
    assert first != folder("c", {"x.safetensors": b"2", "y.safetensors": b"1"})
    assert first != folder("d", {"x.safetensors": b"1", "z.safetensors": b"2"})


def test_model_hash_takes_the_hash_that_a_hub_blob_is_named_after(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    for folder in ("blobs", "snapshot", "plain"):
        (tmp_path / folder).mkdir()
    (tmp_path / "blobs" / digest).write_bytes(b"weights")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(f"../blobs/{digest}")
    (tmp_path / "plain" / "model.safetensors").write_bytes(b"weights")
    assert model_files_hash(tmp_path / "snapshot") == model_files_hash(tmp_path / "plain")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no weights"):
        model_files_hash(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UsageError, match=r"only pickled weights \(pytorch_model\.bin\).*safe_serialization"):
        model_files_hash(tmp_path)


def test_differences_name_field_cache_and_asked(teacher: Any, identity_of: Any) -> None:
    ours = identity_of(teacher)
    theirs = identity_of(teacher, top_k=4, temperatures=(1.0,), teacher_weights="f" * 64, quantisation="awq")
    assert differences(ours, ours) == []
    assert differences(ours, theirs) == [
        "teacher_weights: cache aaaaaaaaaaaa…, asked ffffffffffff…",
        "quantisation: cache none, asked awq",
        "top_k: cache 8, asked 4",
        "temperatures: cache 4, 2, 1, asked 1",
    ]


def test_moved_data_is_the_same_data_and_changed_data_is_not(teacher: Any, plan_of: Any) -> None:
    plan = plan_of(teacher, rows={"general": 10})
    source = plan.sources[0]

    def changed(**changes: object) -> Any:
        return plan.model_copy(update={"sources": (source.model_copy(update=changes),)})

    assert data_differences(plan, changed(path="/elsewhere/general.jsonl")) == []
    assert data_differences(plan, changed(num_rows=11)) == ["num_rows of general.jsonl: cache 10, asked 11"]
    assert "sha256 of general.jsonl" in data_differences(plan, changed(sha256="e" * 64))[0]
    assert data_differences(plan, plan_of(teacher, rows={"general": 10}, unit_rows=5)) == ["units: cache 3, asked 2"]
    assert (
        data_differences(plan, plan_of(teacher, rows={"general": 10, "medical": 1}))[0] == "sources: cache 1, asked 2"
    )


def test_a_vocabulary_no_larger_than_the_top_k_is_refused(teacher: Any, identity_of: Any) -> None:
    with pytest.raises(ValidationError, match="top_k 200 must be smaller"):
        identity_of(teacher, top_k=200)
