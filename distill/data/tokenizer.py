"""A teacher's name flows in, its tokenizer and the facts of it that a cache's identity needs flow out."""

import json
import os
from pathlib import Path
from typing import Any

from distill.errors import UsageError


def load_tokenizer(teacher: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    """The fast tokenizer of a model folder or hub model, without its weights.

    Raises UsageError when it cannot be loaded, has no words of its own, or cannot tell which characters a token
    covers (a slow tokenizer), without which no loss mask can be made.
    """
    from transformers import AutoTokenizer

    if not Path(teacher).exists() and (Path(teacher).is_absolute() or teacher.startswith(".")):
        raise UsageError(f"the teacher's folder {teacher} does not exist. Correct --teacher.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(teacher, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises nearly everything, from KeyError to json's errors
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UsageError(f"cannot load the tokenizer of {teacher}: {reason}. {_hint(teacher)}") from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()):
        raise UsageError(
            f"the tokenizer of {teacher} has no words: its files (tokenizer.json) are missing. Copy them from the "
            "model's origin into the folder, or correct --teacher."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"the tokenizer of {teacher} is a slow one, which cannot say which characters a token covers. Use a "
            "teacher whose folder has a tokenizer.json."
        )
    return tokenizer


def token_map(tokenizer: Any) -> dict[str, int]:
    """Token -> id, added tokens included."""
    return {str(token): int(index) for token, index in tokenizer.get_vocab().items()}


def chat_template_text(tokenizer: Any) -> str:
    """The chat template's source, empty where there is none; several named templates as one JSON object."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return json.dumps(template, sort_keys=True, ensure_ascii=False)
    return template or ""


def _hint(teacher: str) -> str:
    if Path(teacher).exists():
        return "The folder must hold the model's tokenizer files, tokenizer.json among them."
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return (
            f"HF_HUB_OFFLINE is set, so {teacher} must be a folder or already be in the hub's cache: unset "
            "HF_HUB_OFFLINE, or download the model first."
        )
    return "Check the spelling and the connection, or give a model folder."
