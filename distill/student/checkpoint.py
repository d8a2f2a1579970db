"""A trainer's state flows in, folders that survive a kill flow out; and back, every byte verified, nothing unpickled.

    RUN/stage1/checkpoints/step-200/   state.json  model/  trainer.safetensors  feature.safetensors
    RUN/stage1/last/                   the same files, hard links to the newest step
    RUN/stage1/best/                   the same without trainer.safetensors, from the best evaluated step

A folder is written under another name, synced and renamed, so that it is whole or not there. ``state.json`` carries its
own checksum and the SHA-256 of every other file.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue
from safetensors import SafetensorError

from distill.cache import document, storage
from distill.cache.identity import file_hash
from distill.errors import CorruptionError, StorageError
from distill.student.figures import Evaluation

MODEL = "model"
OPTIMIZER = "trainer.safetensors"
FEATURE = "feature.safetensors"
STATE = "state.json"
_KEPT = 2  # newest step checkpoints; two, since the newest may turn out damaged
_MOST = 2**53  # steps or sequences; what JSON's readers agree on
_FIX = "Delete the folder to go on from an older checkpoint, or restore it from a copy."


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Best(_Model):
    """The evaluated step with the lowest held-out objective so far."""

    step: int = Field(ge=0, le=_MOST)
    objective: float


class Reweighting(_Model):
    """Sampling weights that hold from ``position`` on, until the next ones; see sampling.py."""

    position: int = Field(ge=0, le=_MOST)  # sequences consumed
    weights: dict[str, float]


class FileRecord(_Model):
    """What a file of a checkpoint must be."""

    sha256: str
    num_bytes: int


def _stays_in_run(base: str) -> str:
    below = PurePosixPath(base.removeprefix("run:"))
    if base.startswith("run:") and (below.is_absolute() or ".." in below.parts):
        raise ValueError("leads out of the run's folder")
    return base


class State(_Model):
    """``state.json``: where a stage stands, and what its checkpoint consists of."""

    format: Literal["distill-checkpoint"] = "distill-checkpoint"
    version: Literal[1] = 1
    stage: int
    step: int = Field(ge=0, le=_MOST)  # optimizer steps done
    position: int = Field(ge=0, le=_MOST)  # sequences consumed
    finished: bool
    best: Best | None = None
    evaluation: Evaluation | None = None  # the newest at this step or before
    settings: dict[str, JsonValue]  # what must be equal to go on; see stage.settings_of
    base: Annotated[str, AfterValidator(_stays_in_run)] | None = None  # of an adapter: see origin.py
    base_weights: str | None = None  # their hash: see adapter.py
    sampling: tuple[Reweighting, ...] = ()  # an input to the order of the examples
    balance: dict[str, float] | None = None  # smoothed gradient norms of the losses; see balance.py
    scaler: dict[str, int | float] | None = None
    files: dict[str, FileRecord] = {}


def step_folder(stage_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return stage_folder / "checkpoints" / f"step-{step}"


def write_checkpoint(folder: Path, state: State, fill: Callable[[Path], None]) -> State:
    """Make ``folder`` the checkpoint that ``fill`` writes into the folder it is given; the state with its files.

    Raises StorageError when the disk refuses; what was at ``folder`` is then still there.
    """
    with _storage_errors(folder):
        aside = _aside(folder)
        fill(aside)
        files: dict[str, FileRecord] = {}
        for path in _files(aside):
            storage.sync(path)
            name = path.relative_to(aside).as_posix()
            files[name] = FileRecord(sha256=file_hash(path), num_bytes=path.stat().st_size)
        complete = state.model_copy(update={"files": files})
        _finish(aside, folder, complete)
    return complete


def publish(source: Path, target: Path, state: State, *, leave_out: str | None = None) -> None:
    """Make ``target`` a checkpoint with the files of ``source``, hard-linked where the disk can, else copied.

    ``state`` is that of ``source``, with its files. Raises StorageError when the disk refuses.
    """
    files = {name: record for name, record in state.files.items() if name != leave_out}
    with _storage_errors(target):
        aside = _aside(target)
        for name in files:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source / name, aside / name)
        _finish(aside, target, state.model_copy(update={"files": files}))


def bring_up(folder: Path, source: Path, state: State) -> None:
    """Bring ``last/`` and ``best/`` of a stage's ``folder`` up to its checkpoint ``source``; see ``publish``."""
    last, best = folder / "last", folder / "best"
    if not _stands_at(last, state.step):
        publish(source, last, state)
    is_best = state.best.step == state.step if state.best else state.finished
    if is_best and not _stands_at(best, state.step):
        publish(source, best, state, leave_out=OPTIMIZER)


def _stands_at(folder: Path, step: int) -> bool:
    """Whether ``folder`` is the checkpoint of a step, whole: bytes of a damaged one may also be those of its links."""
    try:
        return read_state(folder).step == step and read_checkpoint(folder).step == step
    except CorruptionError:  # missing as well
        return False


def read_state(folder: Path) -> State:
    """What a checkpoint says of itself; its other files are not looked at. Raises CorruptionError as below."""
    path = folder / STATE
    storage.refuse_strange(path)
    try:
        return document.parse(State, storage.read(path), path=path, fix=_FIX)
    except FileNotFoundError as error:
        raise CorruptionError(f"{folder} has no {STATE}, so it is no checkpoint. {_FIX}") from error


def read_checkpoint(folder: Path) -> State:
    """The state of a checkpoint whose every file is what was written. Raises CorruptionError, which names the file."""
    for item in folder.rglob("*"):
        storage.refuse_strange(item)
    state = read_state(folder)
    found = {item.relative_to(folder).as_posix(): item for item in _files(folder) if item != folder / STATE}
    if set(found) != set(state.files):
        wrong = sorted(set(found) ^ set(state.files))
        raise CorruptionError(f"{folder} should not have, or lacks, {', '.join(map(repr, wrong))}. {_FIX}")
    for name, record in state.files.items():
        item = found[name]
        if item.stat().st_size != record.num_bytes or file_hash(item) != record.sha256:
            raise CorruptionError(f"{item} is not the file that was saved. {_FIX}")
    return state


def newest_checkpoint(stage_folder: Path) -> tuple[Path, State, list[str]] | None:
    """The newest valid step checkpoint and what is wrong with newer ones, or None where a stage has none at all.

    Raises CorruptionError when there are checkpoints and all are damaged: beginning anew would throw work away.
    """
    problems: list[str] = []
    error: CorruptionError | None = None
    for folder in reversed(_steps(stage_folder)):
        try:
            return folder, read_checkpoint(folder), problems
        except CorruptionError as damage:
            error = damage
            problems.append(str(damage))
    if error is not None:
        raise error
    return None


def tidy(stage_folder: Path) -> None:
    """Delete all but the newest step checkpoints."""
    for folder in _steps(stage_folder)[:-_KEPT]:
        shutil.rmtree(folder, ignore_errors=True)


def settle(stage_folder: Path) -> None:
    """Finish or undo what a killed process left half done."""
    for folder in (stage_folder, stage_folder / "checkpoints"):
        for old in folder.glob(".*.old"):
            target = folder / old.name.removeprefix(".").removesuffix(".old")
            if not target.exists():
                # The old folder makes room only once the new one is whole.
                (_new(target) if _new(target).exists() else old).rename(target)
            shutil.rmtree(old, ignore_errors=True)
        for new in folder.glob(".*.new"):
            shutil.rmtree(new, ignore_errors=True)


def _steps(stage_folder: Path) -> list[Path]:
    """Step checkpoints, oldest first."""
    names = [path for path in (stage_folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(names, key=lambda path: int(path.name.removeprefix("step-")))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def _new(target: Path) -> Path:
    return target.with_name(f".{target.name}.new")


def _aside(target: Path) -> Path:
    """An empty folder beside ``target``."""
    aside = _new(target)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def _finish(aside: Path, target: Path, state: State) -> None:
    """Write the state into ``aside``, sync, and give it its name."""
    content = document.render(state)
    storage.write(aside / STATE, lambda file: file.write(content), need=len(content))
    for folder in {path.parent for path in _files(aside)}:
        storage.sync(folder)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    storage.sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        storage.sync(target)


@contextlib.contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"cannot write the checkpoint {folder}: {error}. Older checkpoints are whole. Free space or correct the "
            "rights, then run the same command again."
        ) from error
