"""Protects checkpoints: whole or absent, every byte verified, the newest valid one found, best and last replaced."""

import random
import shutil

import pytest

from distill.errors import CorruptionError, StorageError
from distill.student import checkpoint
from distill.student.checkpoint import Best, State

CONTENT = {"model/weights.safetensors": b"weights" * 50, "model/config.json": b"{}", "trainer.safetensors": b"m" * 99}


def state_at(step, **changes):
    values = {"stage": 1, "step": step, "position": 8 * step, "finished": False, "settings": {"seed": 42}}
    return State.model_validate({**values, **changes})


def fill(folder):
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def stage(tmp_path):
    """A stage's folder with checkpoints of the steps 1, 2 and 10."""
    for step in (1, 2, 10):
        checkpoint.write_checkpoint(checkpoint.step_folder(tmp_path, step), state_at(step), fill)
    return tmp_path


def test_what_is_written_is_read(stage):
    state = checkpoint.read_checkpoint(stage / "checkpoints" / "step-10")
    assert (state.step, state.position, set(state.files)) == (10, 80, set(CONTENT))
    folder, newest, problems = checkpoint.newest_checkpoint(stage)
    assert (folder.name, newest, problems) == ("step-10", state, [])


def test_no_checkpoint_is_not_an_error(tmp_path):
    assert checkpoint.newest_checkpoint(tmp_path / "nothing") is None


def test_a_flipped_bit_anywhere_is_refused(stage):
    folder = stage / "checkpoints" / "step-10"
    draw = random.Random(0)
    for name in [*CONTENT, "state.json"]:
        path = folder / name
        clean = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(clean)
            damaged[draw.randrange(len(clean))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(CorruptionError, match="step-10"):
                checkpoint.read_checkpoint(folder)
        path.write_bytes(clean)
    checkpoint.read_checkpoint(folder)


@pytest.mark.parametrize("name", ["model/config.json", "state.json"])
def test_a_missing_file_is_refused(stage, name):
    folder = stage / "checkpoints" / "step-10"
    (folder / name).unlink()
    with pytest.raises(CorruptionError, match=name):
        checkpoint.read_checkpoint(folder)


def test_a_file_that_does_not_belong_is_refused(stage):
    """A loader might take it: pickled weights beside safetensors, for example."""
    folder = stage / "checkpoints" / "step-10"
    (folder / "model" / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CorruptionError, match=r"pytorch_model\.bin"):
        checkpoint.read_checkpoint(folder)


def test_the_newest_valid_one_counts(stage):
    (stage / "checkpoints" / "step-10" / "trainer.safetensors").write_bytes(b"torn")
    folder, state, problems = checkpoint.newest_checkpoint(stage)
    assert (folder.name, state.step, len(problems)) == ("step-2", 2, 1)
    assert "step-10" in problems[0]


def test_all_damaged_is_an_error_and_not_a_new_beginning(stage):
    for path in stage.rglob("trainer.safetensors"):
        path.write_bytes(b"torn")
    with pytest.raises(CorruptionError, match="step-1/trainer"):
        checkpoint.newest_checkpoint(stage)


def test_best_has_no_optimizer_and_outlives_the_step_it_came_from(stage):
    source = stage / "checkpoints" / "step-1"
    state = checkpoint.read_checkpoint(source)
    checkpoint.publish(source, stage / "best", state, leave_out="trainer.safetensors")
    checkpoint.publish(source, stage / "last", state)
    checkpoint.tidy(stage)
    assert sorted(path.name for path in (stage / "checkpoints").iterdir()) == ["step-10", "step-2"]
    assert set(checkpoint.read_checkpoint(stage / "best").files) == set(CONTENT) - {"trainer.safetensors"}
    assert set(checkpoint.read_checkpoint(stage / "last").files) == set(CONTENT)


def test_publishing_replaces_the_folder_whole(stage):
    for step in (1, 2):
        source = stage / "checkpoints" / f"step-{step}"
        checkpoint.publish(source, stage / "last", checkpoint.read_checkpoint(source))
    assert checkpoint.read_checkpoint(stage / "last").step == 2
    assert [path.name for path in stage.iterdir() if path.name.startswith(".")] == []


def test_a_kill_between_the_two_renames_is_mended(stage):
    """The old folder was moved out of the way, the new one is whole but has no name yet."""
    source = stage / "checkpoints" / "step-1"
    checkpoint.publish(source, stage / "last", checkpoint.read_checkpoint(source))
    shutil.copytree(stage / "checkpoints" / "step-2", stage / ".last.new")
    (stage / "last").rename(stage / ".last.old")
    checkpoint.settle(stage)
    assert checkpoint.read_checkpoint(stage / "last").step == 2
    assert [path.name for path in stage.iterdir() if path.name.startswith(".")] == []


def test_half_written_folders_are_swept_away(stage):
    (stage / "checkpoints" / ".step-11.new").mkdir()
    (stage / "checkpoints" / ".step-11.new" / "trainer.safetensors").write_bytes(b"half")
    checkpoint.settle(stage)
    assert checkpoint.newest_checkpoint(stage)[1].step == 10
    assert not list((stage / "checkpoints").glob(".*"))


def test_a_full_disk_leaves_the_older_checkpoint(stage):
    def full(folder):
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        checkpoint.write_checkpoint(
            stage / "checkpoints" / "step-10", state_at(10, best=Best(step=1, objective=1)), full
        )
    assert checkpoint.read_checkpoint(stage / "checkpoints" / "step-10").best is None
