"""``distill init``."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from distill.commands.options import Json, print_json
from distill.errors import StorageError, UsageError

PRESETS = ("qwen72b-to-7b", "qwen3-32b-to-4b", "tiny-cpu")


def command(
    *,
    preset: Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}.")] = PRESETS[0],
    out: Annotated[Path | None, typer.Option(help="The file; by default the preset's name in this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Write a commented configuration to begin with.

    Example: distill init --preset tiny-cpu --out job.yaml
    """
    path = write_preset(preset, out)
    if as_json:
        print_json({"path": str(path), "preset": preset})
        return
    print(f"{path}: name your data in it, then run `distill cache-teacher --config {path}`.")


def write_preset(preset: str, out: Path | None) -> Path:
    """Write the preset to ``out``; its own comments name that file. Returns the path.

    Raises UsageError for a preset that is not there and for a file that is, StorageError when the disk refuses.
    """
    if preset not in PRESETS:
        raise UsageError(f"there is no preset '{preset}'. Give --preset one of {', '.join(PRESETS)}.")
    path = out or Path(f"{preset}.yaml")
    text = files("distill").joinpath("presets", f"{preset}.yaml").read_text(encoding="utf-8")
    if path.exists():
        raise UsageError(f"{path} exists, and may hold your own changes. Name another file with --out.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text.replace(f"{preset}.yaml", str(path)))
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}. Name another file with --out.") from error
    return path
