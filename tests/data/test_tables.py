"""A file's rows can be reached in any range and are never stale; hub data sets load from their cache offline."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.data.tables import open_file, open_hub
from distill.errors import DataError, StorageError

HUB_ROWS = {"train": 3, "test": 2}


def texts(path: Path) -> list[str]:
    table = open_file(path)
    return [row.fields["text"] for row in table.rows(0, len(table)) if row.fields is not None]


def test_any_range_of_rows(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl({"text": f"row {number}"} for number in range(200))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"text": "broken\n')
    table = open_file(path)
    assert len(table) == 201
    whole = list(table.rows(0, 201))
    assert [row.row for row in whole] == list(range(1, 202))
    assert whole[200].fields is None
    assert whole[200].problem is not None
    for start, stop in ((0, 1), (63, 65), (100, 201), (190, 500), (5, 5)):
        assert list(table.rows(start, stop)) == whole[start:stop]


def test_an_edited_file_is_not_stale(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl([{"text": "old"}])
    first = open_file(path)
    stamp = path.stat()
    path.write_text('{"text": "new"}\n', encoding="utf-8")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert path.stat().st_size == stamp.st_size
    assert texts(path) == ["new"]
    assert open_file(path).sha256 != first.sha256


def test_an_unchanged_file_is_read_once(write_jsonl: Callable[..., Path], disk_cache: Path) -> None:
    path = write_jsonl([{"text": "a"}])
    open_file(path)
    files = sorted(disk_cache.rglob("*.arrow"))
    stamps = [file.stat().st_mtime_ns for file in files]
    assert len(files) == 1
    assert texts(path) == ["a"]
    assert [file.stat().st_mtime_ns for file in sorted(disk_cache.rglob("*.arrow"))] == stamps


def test_a_file_that_grows_while_it_is_read_is_refused(
    write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    path = write_jsonl([{"text": "a"}])
    genuine = datasets.Dataset.from_generator

    def slow(*args: object, **kwargs: object) -> object:
        dataset = genuine(*args, **kwargs)
        with path.open("a", encoding="utf-8") as file:
            file.write('{"text": "b"}\n')
        return dataset

    monkeypatch.setattr(datasets.Dataset, "from_generator", slow)
    with pytest.raises(DataError, match="changed while it was read"):
        open_file(path)


def test_a_disk_cache_that_cannot_be_written(
    write_jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    (tmp_path / "occupied").write_text("a file where a folder should be")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "occupied")
    with pytest.raises(StorageError, match="HF_DATASETS_CACHE"):
        open_file(write_jsonl([{"text": "a"}]))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*gone\.csv: No such file"):
        open_file(tmp_path / "gone.csv")


@pytest.fixture
def hub_cache(disk_cache: Path) -> Path:
    """What the datasets library leaves in its cache after loading ``owner/medical-qa`` at revision c0ffee."""
    from datasets import DatasetInfo, Features, Value
    from datasets.arrow_writer import ArrowWriter
    from datasets.splits import SplitDict, SplitInfo

    folder = disk_cache / "owner___medical-qa" / "default" / "0.0.0" / "c0ffee"
    folder.mkdir(parents=True)
    features = Features({"question": Value("string"), "answer": Value("string"), "score": Value("float64")})
    splits = SplitDict(dataset_name="medical-qa")
    for split, count in HUB_ROWS.items():
        writer = ArrowWriter(path=str(folder / f"medical-qa-{split}.arrow"), features=features)
        for number in range(count):
            writer.write({"question": f"{split} {number}?", "answer": f"{number}\x00" if number == 2 else "yes"})
        num_examples, num_bytes = writer.finalize()
        splits.add(SplitInfo(split, num_bytes=num_bytes, num_examples=num_examples))
    info = DatasetInfo(features=features, dataset_name="medical-qa", config_name="default", splits=splits)
    info.write_to_directory(str(folder))
    content = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**content, "builder_name": "parquet", "version": "0.0.0"}))
    return disk_cache


@pytest.mark.usefixtures("hub_cache")
def test_hub_data_set() -> None:
    table = open_hub("owner/medical-qa")
    rows = list(table.rows(0, 10))
    assert len(table) == 3
    assert table.sha256 == "hub:c0ffee"
    assert rows[1].row == 1
    assert rows[1].fields == {"question": "train 1?", "answer": "yes", "score": None}
    assert rows[2].problem == "a NUL character"
    test_split = open_hub("owner/medical-qa:test")
    assert [row.fields and row.fields["question"] for row in test_split.rows(1, 2)] == ["test 1?"]


@pytest.mark.usefixtures("hub_cache")
def test_hub_data_set_without_that_split() -> None:
    with pytest.raises(DataError, match=r"no split 'val'.*train, test"):
        open_hub("owner/medical-qa:val")


def test_hub_data_set_that_cannot_be_had() -> None:
    with pytest.raises(DataError, match=r"cannot load the hub data set owner/none: .*HF_HUB_OFFLINE"):
        open_hub("owner/none")
