"""A configuration flows in, what is known of teacher and data without weights flows out: errors, most of all."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.config import CacheConfig
from distill.data.prompts import PromptMaker, prompts_of
from distill.data.sources import Source, open_sources
from distill.data.tokenizer import load_tokenizer, token_map
from distill.errors import UsageError
from distill.records import Prompt, Question, Reject
from distill.teacher.engine import engine_name
from distill.teacher.heads import check_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """Teacher and data that fit each other. Nothing is written and no weights are loaded."""

    config: CacheConfig  # dtype is no longer "auto"
    folder: Path  # the teacher's, on this machine
    model: Any  # the teacher's configuration, as transformers reads it
    tokenizer: Any
    vocab_size: int  # real vocabulary, without the head's padding
    engine: str
    sources: Sequence[Source]
    maker: PromptMaker


def examine(config: CacheConfig, *, folder: Path) -> Examined:
    """Looks at the teacher in ``folder`` and at the data. Raises UsageError, DataError or StorageError."""
    model = _read_config(folder, config)
    dtype = config.dtype if config.dtype != "auto" else str(model.dtype or "float32").removeprefix("torch.")
    config = config.model_copy(update={"dtype": dtype})
    tokenizer = load_tokenizer(str(folder), revision=None, trust_remote_code=config.trust_remote_code)
    vocab_size = max(token_map(tokenizer).values()) + 1
    _check_vocabulary(config, vocab_size=vocab_size, head_rows=model.get_text_config().vocab_size)
    _check_length(config, model.get_text_config())
    check_layers(model.get_text_config(), config.targets)
    engine = engine_name(config)
    sources = open_sources(config)
    maker = PromptMaker(tokenizer, config=config)
    for source in sources:
        maker.check(source)
    return Examined(
        config=config,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        engine=engine,
        sources=sources,
        maker=maker,
    )


def model_config(folder: Path, config: CacheConfig) -> Any:
    """The configuration of the teacher's language model. Raises UsageError when it cannot be read."""
    return _read_config(folder, config).get_text_config()


def draw(sources: Sequence[Source], *, maker: PromptMaker, wanted: int, seed: int) -> list[Prompt]:
    """Random training sequences, until they hold ``wanted`` trained targets or there are no more."""
    drawn: list[Prompt] = []
    trained = 0
    for item in train_rows(sources, maker=maker, seed=seed):
        if isinstance(item, Prompt):
            drawn.append(item)
            trained += int(item.loss_mask.sum())
        if trained >= wanted:
            break
    return drawn


def train_rows(sources: Sequence[Source], *, maker: PromptMaker, seed: int) -> Iterator[Prompt | Question]:
    """What the training rows of all sources are, in random order."""
    sources = [source for source in sources if source.split != "eval"]
    bounds = np.cumsum([len(source) for source in sources])
    num_rows = int(bounds[-1]) if sources else 0
    seen = set[int]()
    random = np.random.default_rng(seed)
    while len(seen) < num_rows:
        row = int(random.integers(num_rows))
        if row in seen:
            continue
        seen.add(row)
        index = int(np.searchsorted(bounds, row, side="right"))
        start = row - int(bounds[index - 1] if index else 0)
        for item in prompts_of(sources[index], start=start, stop=start + 1, maker=maker):
            if not isinstance(item, Reject) and item.split == "train":
                yield item


def local_model(name: str, revision: str | None, *, weights: bool = True) -> Path:
    """The folder of a model: ``name`` itself, or the hub's snapshot of it (downloaded unless the hub is offline).

    Without ``weights`` its configuration and tokenizer suffice, and nothing else is downloaded. Raises UsageError when
    there is neither.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UsageError(f"{name} has no config.json, so it is not a model folder. Give the folder that holds it.")
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = ["*.json", "*.jinja", "*.txt", "*.model", "*.py", *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UsageError(
            f"The model '{name}' is neither a folder here nor to be had from the hub ({error}). Give the path of a "
            "folder with config.json, tokenizer and *.safetensors, or download it first where the hub is reachable."
        ) from error


def _read_config(folder: Path, config: CacheConfig) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UsageError(f"transformers cannot read the teacher's {folder / 'config.json'}: {error}") from error


def _check_vocabulary(config: CacheConfig, *, vocab_size: int, head_rows: int) -> None:
    if vocab_size > head_rows:
        raise UsageError(
            f"The tokenizer of {config.teacher} has ids up to {vocab_size - 1}, its LM head only {head_rows} rows: "
            "they do not belong together. Use the tokenizer that was published with these weights."
        )
    if config.targets.top_k >= vocab_size:
        raise UsageError(
            f"top_k is {config.targets.top_k}, but the vocabulary of {config.teacher} has {vocab_size} tokens. Choose "
            f"--top-k between 1 and {vocab_size - 1}; 64 serves most students."
        )


def _check_length(config: CacheConfig, model: Any) -> None:
    """Beyond its positions a teacher speaks nonsense, and not every engine objects."""
    scaling = float((getattr(model, "rope_parameters", None) or {}).get("factor") or 1.0)
    limit = int(scaling * getattr(model, "max_position_embeddings", config.max_length))
    if config.max_length > limit:
        raise UsageError(
            f"max_length is {config.max_length}, but {config.teacher} was made for at most {limit} positions. Choose "
            f"--max-length {limit} or less; --overlong says what becomes of longer rows."
        )
