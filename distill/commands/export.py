"""``distill export``."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from distill.commands.options import Json, checkpoint, print_json
from distill.errors import UsageError

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def command(
    student: Annotated[
        Path, typer.Argument(metavar="STUDENT", help="Stage of a run, whose best checkpoint is meant, or a checkpoint.")
    ],
    *,
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
    dtype: Annotated[str, typer.Option(help="auto (that of the base), float32, bfloat16 or float16.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that the student's folder brings.")] = False,
    as_json: Json = False,
) -> None:
    """Merge a trained student into a plain transformers folder, with its tokenizer, and check its logits.

    Example: distill export run/stage3 --out qwen7b-medical
    """
    from distill.student.export import export_student

    if dtype not in _DTYPES:
        raise UsageError(f"--dtype takes {', '.join(_DTYPES)}, got '{dtype}'.")
    exported = export_student(
        Path(checkpoint(str(student))), out, dtype=cast(Any, dtype), trust_remote_code=trust_remote_code
    )
    if as_json:
        print_json(exported.as_dict())
        return
    merged = f"the adapter merged into {exported.base}" if exported.merged_adapter else "all weights as trained"
    print(
        f"{exported.folder}: {exported.num_parameters:,} parameters in {exported.dtype}, {merged}; its logits differ "
        f"by {exported.logit_error:.2g} (relative) from the checkpoint's."
    )
