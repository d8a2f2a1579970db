"""What a user can get wrong with ``cache-teacher``: one paragraph, the fix, the right exit code, nothing lost.

The teacher of these tests has a tokenizer and a configuration, and bytes that no library would load as weights: an
error about anything else proves that it was found before the weights were touched.
"""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from distill.cache.reader import CacheReader
from distill.config import CacheConfig
from distill.errors import DataError, DistillError, IdentityError, StorageError, UsageError
from distill.records import SequenceTargets
from distill.teacher.job import cache_teacher
from tests.conftest import qwen_tokenizer_folder
from tests.teacher.conftest import run_cli


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's folder whose weights cannot be loaded."""
    import numpy as np
    from transformers import Qwen3Config

    folder = tmp_path_factory.mktemp("shell")
    for path in qwen_tokenizer_folder().iterdir():
        shutil.copy(path, folder / path.name)
    Qwen3Config(vocab_size=151_936, hidden_size=64).save_pretrained(folder)
    save_file({"nothing": np.zeros(1)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"ask": f"{i}?", "answer": f"{i}!"}) + "\n" for i in range(8)))
    return path


def config(shell: Path, data: Path, /, **more: object) -> CacheConfig:
    values = {
        "teacher": str(shell),
        "data": {"general": (str(data),)},
        "out": str(data.parent / "cache"),
        "engine": "transformers",
        **more,
    }
    return CacheConfig.model_validate(values)


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"targets": {"top_k": 200_000}}, UsageError, "--top-k between 1 and"),
        ({"data": {"general": ("missing.jsonl",)}}, DataError, "missing.jsonl does not exist"),
        ({"columns": {"prompt": "question"}}, DataError, "question"),
        ({"max_length": 40_000}, UsageError, "--max-length 32768 or less"),
        ({"teacher": "/nowhere"}, UsageError, "neither a folder here nor"),
        ({"out": "gs://bucket/cache"}, UsageError, "local"),
        ({"out": "/proc/nothing/cache"}, StorageError, "/proc/nothing"),
    ],
)
def test_wrong_input_is_refused_before_the_teacher_loads(
    shell: Path, data: Path, more: dict[str, object], error: type[DistillError], says: str
) -> None:
    with pytest.raises(error, match=says):
        cache_teacher(config(shell, data, **more))


def test_a_teacher_without_safetensors_is_refused(shell: Path, data: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(shell, tmp_path / "bare")
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    with pytest.raises(UsageError, match="safetensors"):
        cache_teacher(config(bare, data))


def test_another_identity_is_refused_field_by_field(shell: Path, data: Path) -> None:
    first = config(shell, data)
    with pytest.raises(
        UsageError, match="lack or misshape"
    ):  # the plan is written, then the weights are found unusable
        cache_teacher(first)
    plan = (Path(first.out) / "plan.json").read_bytes()
    with pytest.raises(IdentityError) as caught:
        cache_teacher(config(shell, data, targets={"top_k": 32, "temperatures": (1.0,)}, max_length=77))
    assert all(field in str(caught.value) for field in ("top_k", "temperatures", "max_length"))
    assert "64" in str(caught.value)
    assert "32" in str(caught.value)
    data.write_text(data.read_text() + '{"ask": "more?", "answer": "yes"}\n')
    with pytest.raises(IdentityError, match="data"):
        cache_teacher(first)
    assert (Path(first.out) / "plan.json").read_bytes() == plan


def test_the_command_line_gives_a_paragraph_and_an_exit_code(shell: Path, data: Path, tmp_path: Path) -> None:
    common = ("cache-teacher", "--teacher", shell, "--out", tmp_path / "cache")
    wrong_key = tmp_path / "config.yaml"
    wrong_key.write_text("cache:\n  targets:\n    top_kk: 5\n")
    cases = [
        ((*common,), 2, "'data' is missing"),
        ((*common, "--data", f"general={data}", "--temperatures", "4,0"), 2, "greater than 0"),
        ((*common, "--data", f"general={data}", "--config", wrong_key), 2, "did you mean 'top_k'?"),
        ((*common, "--data", data), 2, "--data takes"),
        ((*common, "--data", "general=nothing.csv"), 3, "nothing.csv does not exist"),
        ((*common, "--data", f"general={data}", "--engine", "tgi"), 2, "engine"),
    ]
    for arguments, code, says in cases:
        done = run_cli(*arguments)
        assert done.returncode == code, done.stderr
        assert says in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("Error: ")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "cache").exists()


def test_an_interrupted_cache_goes_on_where_it_stopped(tiny_teacher: Path, data: Path) -> None:
    job = config(tiny_teacher, data, unit_rows=2, dtype="float32")
    full = cache_teacher(job, quiet=True)
    assert full.num_units_written == 4
    root = full.root
    before = rows(root)
    # As after a kill: two units, the manifest and the projection's proof are not there.
    proof = load_file(root / "fidelity.safetensors")
    (root / "fidelity.safetensors").unlink()
    (root / "manifest.json").unlink()
    for unit in ("00001", "00003"):
        (root / "commits" / f"{unit}.json").unlink()
    with pytest.raises(DataError, match="2 of 4 units"):
        CacheReader.open(root)
    again = cache_teacher(job, quiet=True)
    assert again.num_units_written == 2
    assert (load_file(root / "fidelity.safetensors")["topk_ids"] == proof["topk_ids"]).all()
    assert again.manifest is not None
    after = rows(root)
    assert after.keys() == before.keys()
    assert all((after[key].targets.topk_ids == before[key].targets.topk_ids).all() for key in before)


def rows(root: Path) -> dict[str, SequenceTargets]:
    cache = CacheReader.open(root)
    found = (row for commit in cache.commits for split in ("train", "eval") for row in cache.sequences(commit, split))
    return {row.prompt.source: row for row in found}
