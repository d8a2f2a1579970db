"""The list of vLLM's private names: right for what is installed, and it notices a name that moved."""

import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from distill.errors import UsageError
from distill.teacher import vllm_names
from distill.teacher.vllm_names import NAMES, check_installed, moved_names

pytest.importorskip("vllm", exc_type=ImportError)


def installed() -> dict[str, str]:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    return {file: (folder / file).read_text(encoding="utf-8") for file in NAMES}


def test_the_installed_release_has_every_name() -> None:
    assert moved_names(installed().get) == []
    check_installed("as installed")


def test_every_listed_name_is_missed_when_it_moves() -> None:
    sources = installed()
    for file, owners in NAMES.items():
        for owner, names in owners.items():
            for name in names:
                changed = {**sources, file: sources[file].replace(name, f"moved_{name}")}
                assert f"{file}: {owner + '.' if owner else ''}{name}" in moved_names(changed.get)


def test_a_file_that_is_gone_is_named() -> None:
    file = next(iter(NAMES))
    assert moved_names({**installed(), file: None}.get) == [f"{file}: the file"]


def test_an_installed_release_that_moved_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vllm_names.NAMES, "v1/worker/gpu_worker.py", {"Worker": ("no_such_method",)})
    with pytest.raises(UsageError, match=r"gpu_worker\.py: Worker\.no_such_method"):
        check_installed("0.0")


def test_a_wheel_is_read_without_being_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = installed()
    for name, left_out in (("whole.whl", None), ("moved.whl", "entrypoints/llm.py")):
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            for file, source in sources.items():
                if file != left_out:
                    wheel.writestr(f"vllm/{file}", source)
    for name, code in (("whole.whl", 0), ("moved.whl", 1)):
        monkeypatch.setattr("sys.argv", ["vllm_names", str(tmp_path / name)])
        with pytest.raises(SystemExit) as caught:
            vllm_names.main()
        assert caught.value.code == code
