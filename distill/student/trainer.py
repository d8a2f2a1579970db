"""A configuration and the number of a stage flow in, a trained student in ``RUN/stage<N>`` flows out.

    cache -> TrainStream -> Learner -> metrics.jsonl, checkpoints/step-N/, last/, best/

Running the same stage again goes on from the newest valid checkpoint; a finished one is recognised. Under torchrun
every rank runs all of this; the first one alone writes and speaks.
"""

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue

from distill.cache.join import open_caches
from distill.cache.reader import CacheReader
from distill.config import TrainConfig
from distill.errors import DataError, RetryError
from distill.interrupt import Interrupt
from distill.progress import Ticker
from distill.student import checkpoint
from distill.student.adapter import weights_of
from distill.student.batch import Example
from distill.student.beginning import first_origin, start_name
from distill.student.checkpoint import Best, Reweighting, State
from distill.student.evaluate import Evaluator, held_out_examples
from distill.student.figures import Evaluation
from distill.student.learner import Learner, Snapshot, StepFigures, derived_seed
from distill.student.metrics import Metrics
from distill.student.model import Origin, load_student
from distill.student.objective import TeacherView
from distill.student.origin import origin_of_checkpoint, recorded_base, settings_of_adapter
from distill.student.precision import Precision, resolve_precision
from distill.student.quantised import refuse_unusable
from distill.student.ranks import Ranks
from distill.student.result import StageResult, write_config
from distill.student.samples import Interview, answers_table
from distill.student.sampling import Sampler
from distill.student.spotlight import Spotlight, write_views
from distill.student.stage import (
    StagePlan,
    plan_stage,
    refuse_other_settings,
    servable_stage,
    settings_of,
    stage_folder,
)
from distill.student.stream import TrainStream
from distill.student.tokenizer import matching_tokenizer
from distill.student.trackers import refuse_missing

_ENOUGH = 1000  # sequences without a trained token among which another with one is not to be hoped for


def train_stage(config: TrainConfig, number: int, *, start: Path | None = None, quiet: bool = False) -> StageResult:
    """Train stage ``number`` of a run, or go on with it, and return what it came to.

    ``start`` is a checkpoint, model or adapter to begin from; without it stage 1 begins from ``config.student`` and a
    later stage from the best checkpoint of the one before. All that can be refused is refused before a model loads:
    UsageError for options, IdentityError for a tokenizer, temperature or target that the cache does not have,
    DataError for missing rows or stages, CorruptionError for damaged files. Raises RetryError after a signal to stop.
    """
    ranks = Ranks.joined(config.device)
    with ranks.together():
        return _train_stage(config, number, start=start, quiet=quiet or not ranks.is_first, ranks=ranks)


def _train_stage(config: TrainConfig, number: int, *, start: Path | None, quiet: bool, ranks: Ranks) -> StageResult:
    refuse_unusable(config)
    refuse_missing(config)
    reader = open_caches(config.caches, allow_incomplete=config.allow_incomplete)
    plan = plan_stage(config, number, reader)
    folder = stage_folder(config, number)
    precision = resolve_precision(ranks.device(config.device), config.precision)
    resolved = config.model_copy(update={"device": str(precision.device), "precision": precision.name})
    name = start_name(number, start)
    settings = settings_of(resolved, plan, reader, start=name)
    found = ranks.first(lambda: _stands(folder, settings))
    notes: list[str] = []
    if found is not None:
        resumed, state, notes = found
        if state.finished:
            return StageResult.read(folder, already_finished=True, notes=notes)
        origin = origin_of_checkpoint(resumed, state)
    else:
        resumed, state = None, State(stage=number, step=0, position=0, finished=False, settings=settings)
        origin = ranks.first(lambda: first_origin(config, number, start, reader))
    tokenizer = matching_tokenizer(origin.base, reader, trust_remote_code=config.trust_remote_code)
    if config.tune == "lora" and origin.adapter and (made := settings_of_adapter(origin.adapter)):
        resolved = resolved.model_copy(update={"lora": made})
    ranks.first(lambda: write_config(folder, resolved, plan=plan, reader=reader, start=name))
    run = _Run(config, plan, reader, state=state, quiet=quiet, ranks=ranks)
    run.load(origin, tokenizer, precision=precision, resumed=resumed, start=start)
    for note in [*notes, *run.notes]:
        _say(note, quiet=quiet)
    run.train()
    return StageResult.read(folder, already_finished=False, notes=[*notes, *run.notes])


def _stands(folder: Path, settings: dict[str, JsonValue]) -> tuple[Path, State, list[str]] | None:
    """The checkpoint to go on from, once what a killed process left is settled."""
    checkpoint.settle(folder)
    found = checkpoint.newest_checkpoint(folder)
    if found is not None:
        resumed, state, _ = found
        refuse_other_settings(folder, state, settings)
        checkpoint.bring_up(folder, resumed, state)
    return found


def check_stages(config: TrainConfig, numbers: Sequence[int]) -> None:
    """Raise what ``train_stage`` would raise for a stage of ``numbers`` that its cache cannot serve, before the first.

    A stage that is refused after days of another helps nobody.
    """
    if not numbers:
        return
    reader = open_caches(config.caches, allow_incomplete=config.allow_incomplete)
    for number in numbers:
        servable_stage(config, number, reader)


class _Run:
    """A stage under way: ``state`` is where it stands."""

    def __init__(
        self, config: TrainConfig, plan: StagePlan, reader: CacheReader, *, state: State, quiet: bool, ranks: Ranks
    ) -> None:
        self._config, self._plan, self._reader, self._quiet, self._ranks = config, plan, reader, quiet, ranks
        self._folder = stage_folder(config, plan.number)
        self._state = state
        self._metrics: Metrics | None = None  # of the first rank, while it trains
        self._is_new = state.step == 0
        self._num_taken = self._num_untrained = 0  # sequences, and those without a trained token, since it was loaded
        self.notes: list[str] = []

    def load(
        self, origin: Origin, tokenizer: Any, *, precision: Precision, resumed: Path | None, start: Path | None
    ) -> None:
        """Load the student and all that trains it; from ``resumed`` where there is such a checkpoint."""
        config, plan = self._config, self._plan
        torch.manual_seed(derived_seed(config.seed, plan.number, "lora"))
        student = load_student(
            config,
            origin,
            precision=precision,
            vocab_size=self._reader.identity.vocab_size,
            training=True,
            ranks=self._ranks,
        )
        view = TeacherView.of(self._reader, precision)
        self._tokenizer = tokenizer
        if config.tune == "lora":
            weights = origin.base_weights or self._ranks.first(lambda: weights_of(origin.base))
            base = recorded_base(origin.base, Path(config.out))
            self._state = self._state.model_copy(update={"base": base, "base_weights": weights})
        self._learner = Learner(student, view, config, plan, self._ranks)
        if resumed is not None:
            self._learner.restore(resumed, self._state)
        else:
            self._learner.restore_adapter(start or stage_folder(config, plan.number - 1) / "best")
        served = [T for T in (plan.stage.temperature, 1.0) if T in self._reader.temperatures]
        self._evaluator = Evaluator(
            student,
            view,
            config,
            temperatures=tuple(dict.fromkeys(served)),
            stage=plan.stage,
            ranks=self._ranks,
        )
        self._interview = Interview.of(config, student, tokenizer, reader=self._reader, domains=plan.domains)
        self._spotlight = Spotlight(config, student, tokenizer, reader=self._reader, domains=plan.domains)
        self._held_out = self._read_held_out()
        if plan.sampler is not None:
            for reweighting in self._state.sampling:
                plan.sampler.apply(reweighting)

    def train(self) -> None:
        """Take the steps that are left."""
        plan, state = self._plan, self._state
        stream = TrainStream(self._reader, plan.orders, plan.assigned, max_length=self._config.max_length)
        ticker = Ticker(f"stage {plan.number}", total=plan.num_steps, start=state.step, quiet=self._quiet)
        with stream, self._logging(), ticker, Interrupt() as interrupt:
            if state.step == 0:
                self._evaluate()
                self._ask(ticker)
            before = time.monotonic()
            for step, examples in enumerate(stream.steps(state.position, plan.stage.batch_size), state.step + 1):
                self._take(step, examples, ticker, since=before)
                due = step % plan.stage.eval_every == 0 or self._state.finished
                if due:
                    self._refuse_nothing()
                    self._evaluate()
                    self._ask(ticker)
                stop = self._ranks.any(interrupt.name is not None)
                if due or stop:
                    self._save()
                if stop and not self._state.finished:
                    raise RetryError(
                        f"stopped by {interrupt.name or 'a signal to another process'} at step {step} of "
                        f"{plan.num_steps}; everything is saved. Run the same command again to go on."
                    )
                before = time.monotonic()
        if self._num_untrained:
            self.notes.append(
                f"{self._num_untrained:,} of {self._num_taken:,} sequences taught nothing: no trained token of theirs "
                f"is within max_length {self._config.max_length}."
            )
            _say(self.notes[-1], quiet=self._quiet)

    def _refuse_nothing(self) -> None:
        """Raise DataError where a stage has seen enough of its sequences, and none had a trained token.

        What a resumed one saw before it stopped is not known.
        """
        enough = self._state.finished or self._num_taken >= _ENOUGH
        if self._is_new and enough and self._num_untrained == self._num_taken:
            raise DataError(
                f"none of the {self._num_taken:,} sequences up to step {self._state.step} of stage {self._plan.number} "
                f"has a trained token within max_length {self._config.max_length}, so there is nothing to learn from. "
                "Raise max_length to that of the cache, or make a cache with longer answers or shorter prompts."
            )

    def _take(self, step: int, examples: list[Example], ticker: Ticker, *, since: float) -> None:
        """One step, whose examples have been waited for ``since`` then; its line."""
        stage = self._plan.stage
        waited = time.monotonic() - since
        figures = self._learner.step(examples, step - 1)
        self._num_taken += len(examples)
        self._num_untrained += sum(not example.num_trained for example in examples)
        self._state = self._state.model_copy(
            update={"step": step, "position": step * stage.batch_size, "finished": step == self._plan.num_steps}
        )
        seconds = time.monotonic() - since
        rate, waiting = figures.num_tokens / seconds, waited / seconds
        self._log("train", self._train_line(figures, rate, waiting))
        loss = figures.losses.get("total", 0.0)
        ticker.update(step, loss=loss, tokens_per_s=rate, waiting=f"{waiting:.0%}", **self._held_out_facts())

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        """Keep metrics meanwhile, on the first rank."""
        if not self._ranks.is_first:
            yield
            return
        step, number = self._state.step, self._plan.number
        with Metrics(self._folder, step=step, config=self._config, number=number) as self._metrics:
            yield

    def _log(self, kind: str, values: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.log(kind, self._state.step, {"time": time.time(), **values})

    def _train_line(self, figures: StepFigures, rate: float, waiting: float) -> dict[str, Any]:
        stage = self._plan.stage
        return {
            "losses": figures.losses,
            "lr": figures.learning_rate,
            "grad_norm": figures.grad_norm if math.isfinite(figures.grad_norm) else None,
            "tokens": figures.num_tokens,
            "tokens_per_second": rate,
            "waiting": waiting,  # share of the step's time in which it waited for its examples
            "shares": self._plan.shares(self._state.step),
            **({"weights": figures.weights} if stage.balance or stage.weight_schedules else {}),
            **({"domain_weights": figures.domain_weights} if figures.domain_weights else {}),
            **({"temperature": figures.temperature} if stage.temperature_steps else {}),
            **({"gradient_norms": figures.norms} if figures.norms else {}),
        }

    def _evaluate(self) -> None:
        evaluation = self._evaluator(self._held_out, self._learner.adapter, self._learner.attention)
        step, best = self._state.step, self._state.best
        if evaluation is not None:
            self._refuse_overflow(evaluation)
            objective = evaluation.objective(self._plan.stage)
            self._log("eval", {"objective": objective, **asdict(evaluation)})
        if self._plan.sampler is not None and not self._state.finished:
            self._reweigh(self._plan.sampler, evaluation)
        if evaluation is None:
            return
        if step > 0 and (best is None or objective < best.objective):
            best = Best(step=step, objective=objective)
        self._state = self._state.model_copy(update={"evaluation": evaluation, "best": best})

    def _refuse_overflow(self, evaluation: Evaluation) -> None:
        """Raise DataError for figures that neither choose a best checkpoint nor say what to sample."""
        wrong = [domain for domain, figures in evaluation.domains.items() if not figures.is_finite]
        if wrong:
            number, step = self._plan.number, self._state.step
            raise DataError(
                f"the held-out loss of {' and '.join(wrong)} is not finite at step {step} of stage {number}, so "
                "nothing tells which checkpoint is best. Earlier ones are whole. Use --precision bf16 or fp32, or a "
                f"lower stages.{number}.learning_rate, and train into another --out."
            )

    def _ask(self, ticker: Ticker) -> None:
        """Let the student answer and read a little, for people; its weights may be spread over all ranks."""
        answers, views = self._interview(), self._spotlight()
        if views and self._ranks.is_first:
            write_views(self._folder, views, step=self._state.step)
        if answers and self._metrics is not None:
            self._metrics.log_answers(self._state.step, answers)
            ticker.show(answers_table(answers, f"stage {self._plan.number}, step {self._state.step}"))

    def _reweigh(self, sampler: Sampler, evaluation: Evaluation | None) -> None:
        """Let an evaluation say which groups come more often from here on."""
        former = self._state.sampling
        weights = sampler.next_weights(evaluation, former)
        reweighting = Reweighting(position=self._state.position, weights=weights)
        sampler.apply(reweighting)
        self._log("sampling", {"weights": weights})
        self._state = self._state.model_copy(update={"sampling": (*former, reweighting)})

    def _save(self) -> None:
        state = self._state.model_copy(update={"balance": self._learner.norms, "scaler": self._learner.scaler_state()})
        snapshot = self._learner.snapshot()
        self._ranks.first(lambda: self._write(state, snapshot))

    def _write(self, state: State, snapshot: Snapshot) -> None:
        folder = checkpoint.step_folder(self._folder, state.step)
        complete = checkpoint.write_checkpoint(
            folder, state, lambda aside: self._learner.save(aside, self._tokenizer, snapshot)
        )
        checkpoint.bring_up(self._folder, folder, complete)
        checkpoint.tidy(self._folder)

    def _read_held_out(self) -> dict[str, list[Example]]:
        config, stage = self._config, self._plan.stage
        by_key = stage.sampling == "evaluation" and stage.sampling_by != "domain"
        group_by = stage.sampling_by if by_key else None
        held_out = {
            domain: list(
                held_out_examples(
                    self._reader, domain, max_length=config.max_length, rows=stage.eval_rows, group_by=group_by
                )
            )
            for domain in (self._reader.domains if stage.eval_domains == "all" else self._plan.domains)
        }
        empty = [domain for domain in self._plan.domains if not held_out[domain]]
        if empty:
            consequence = (
                "best/ will be the last step" if len(empty) == len(self._plan.domains) else "best/ is chosen without it"
            )
            self.notes.append(f"no held-out rows of {' and '.join(empty)} in {self._reader.where}: {consequence}.")
        return held_out

    def _held_out_facts(self) -> dict[str, float]:
        evaluation: Evaluation | None = self._state.evaluation
        return {} if evaluation is None else {"held_out": evaluation.objective(self._plan.stage)}


def _say(note: str, *, quiet: bool) -> None:
    if not quiet:
        print(f"Note: {note}", file=sys.stderr)
