"""A cache that version 1 wrote stays readable. ``golden/`` is never written anew: if this fails, the code is wrong."""

import shutil
from pathlib import Path

import numpy as np

from distill.cache import document
from distill.cache.frames import open_frame
from distill.cache.plan import Plan
from distill.cache.reader import CacheReader
from distill.cache.writer import CacheWriter

GOLDEN = Path(__file__).with_name("golden")


def test_counts_identity_and_projection() -> None:
    reader = CacheReader.open(GOLDEN)
    assert reader.domains == ("general", "医学")
    assert (reader.num_rows("general", "train"), reader.num_rows(split="eval"), reader.num_rows()) == (2, 1, 5)
    assert [commit.num_rejects for commit in reader.commits] == [1, 0]
    assert reader.identity.temperatures == (4.0, 2.0, 1.0)
    assert reader.projection is not None
    assert reader.projection.widths == ((4, 4), (2, 4))
    assert (reader.projection.layers, reader.projection.attention) == ({}, {})
    assert reader.projection.sha256 == "5410482d975f954e55e91a004281d515bf6baa10b2c3e08e0adeed9dbb51e923"


def test_literal_values_of_a_row() -> None:
    reader = CacheReader.open(GOLDEN)
    row = reader.sequences(reader.commits[0], "eval")[0]
    prompt, targets = row.prompt, row.targets
    assert (prompt.sequence_id, prompt.prompt_id, prompt.domain, prompt.split) == (
        "sequence-3",
        "prompt-3",
        "general",
        "eval",
    )
    assert (prompt.source, prompt.metadata) == ("general.jsonl:3", {"department": "cardiology"})
    assert (prompt.prompt, prompt.response) == ("Question 3?", "答案 3.")
    assert prompt.input_ids.tolist() == [40, 4, 8, 11, 9, 40, 43, 29, 1]
    assert prompt.loss_mask.tolist() == [False] * 4 + [True] * 4
    assert targets.topk_ids[0].tolist() == [29, 35, 6, 1]
    assert targets.topk_logprobs[0].tolist() == [-0.05859375, -3.265625, -4.740234375, -5.97265625]
    assert targets.log_z[0].tolist() == [1.69171142578125, 0.51947021484375, 0.0]
    assert targets.log_tail[0].tolist() == [-0.447265625, -1.51171875, -4.921875]
    assert targets.entropy[:3].tolist() == [0.2900390625, 0.578125, 0.79296875]
    assert {bits: values[0].tolist() for bits, values in targets.hidden.items()} == {
        4: [0, -5, 3, 6],
        2: [1, -1, -1, -2],
    }


def test_tail_logits_of_a_row() -> None:
    reader = CacheReader.open(GOLDEN)
    row = reader.sequences(reader.commits[0], "eval")[0]
    assert reader.projection is not None
    logits = reader.projection.tail_logits(reader.projection.dequantise(row.targets.hidden))
    np.testing.assert_allclose(logits[0, :3], [-1.7386075, 4.225015, 1.3964785], rtol=1e-5)


def test_the_data_frame() -> None:
    frame = open_frame(GOLDEN)
    assert frame["source"].tolist() == [
        "general.jsonl:1",
        "general.jsonl:2",
        "general.jsonl:3",
        "医学.jsonl:1000",
        "医学.jsonl:1001",
    ]


def test_sealing_it_again_gives_the_same_manifest(tmp_path: Path) -> None:
    cache = shutil.copytree(GOLDEN, tmp_path / "cache")
    (cache / "manifest.json").unlink()
    path = cache / "plan.json"
    CacheWriter.open(cache, document.parse(Plan, path.read_bytes(), path=path, fix="")).seal()
    assert (cache / "manifest.json").read_bytes() == (GOLDEN / "manifest.json").read_bytes()
