"""A cache with its exact teacher and a student flow in, the student's distance to the teacher after training flows out.

Every target goes through the project's own fused loss: ``full`` is a tail without a top-k, ``renormalised`` a top-k
with a tail of no mass. These two exist here only, to be compared with. Legend: ``N`` tokens, ``V`` real vocabulary.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.exact_teacher import ExactTeacher
from distill.cache.projection import Projection
from distill.cache.reader import CacheReader
from distill.config import ShareConfig, TrainConfig
from distill.records import Split
from distill.student.batch import DistillBatch, Example, collate, example_of
from distill.student.losses.fused import HeadTargets, chunks_of_logits, fused_head_losses
from distill.student.losses.kl import TeacherTargets
from distill.student.losses.sampled import SampledTargets
from distill.student.losses.tail import TailModel
from distill.student.mixture import assign_domains
from distill.student.model import Origin, Student, load_student
from distill.student.optimizer import learning_rate_factor
from distill.student.order import permutation
from distill.student.precision import Precision

Target = Literal["renormalised", "bucket", "low_rank", "low_rank_256", "low_rank_256_few", "sampled", "ce", "full"]
MEASURED = (4.0, 2.0, 1.0)
_CHUNK = 128  # tokens whose logits exist at the same time


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A cached sequence, and the teacher's exact final states at its trained positions."""

    example: Example
    entropy: NDArray[np.float32]  # [n]
    states: NDArray[np.float32]  # [n, D]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Steps at one temperature: a whole run, or one stage of a curriculum."""

    temperature: float
    kl_weight: float
    ce_weight: float
    shares: Mapping[str, ShareConfig]
    learning_rate: float
    steps: int


class Lab:
    """Rows and models that all runs share."""

    def __init__(
        self,
        cache: Path,
        student: Path,
        *,
        batch_size: int,
        num_samples: int,
        few: int,
        measured_rows: int,
        precision: Precision,
    ) -> None:
        self.reader = CacheReader.open(cache)
        self.exact = ExactTeacher.open(cache)
        self.batch_size, self.num_samples, self.few = batch_size, num_samples, few
        self._student, self._precision = student, precision
        self.train = {domain: self._rows(domain, "train") for domain in self.reader.domains}
        self.held_out = [row for domain in self.reader.domains for row in self._rows(domain, "eval")[:measured_rows]]
        wide = Projection.from_bytes((cache / "projection-256.safetensors").read_bytes())
        self.projections = {
            "low_rank": Projection.from_bytes((cache / "projection-128.safetensors").read_bytes()),
            "low_rank_256": wide,
            "low_rank_256_few": wide,
        }
        self._tails = {name: self._tail(projection) for name, projection in self.projections.items()}
        head_DV = self.exact.head_VD.T
        self._tails["full"] = TailModel(
            basis=head_DV, bias=torch.zeros(head_DV.shape[1]), logit_scale=1.0, soft_cap=None
        )

    def _tail(self, projection: Projection) -> TailModel:
        return TailModel.of(projection, device=self._precision.device, dtype=self._precision.compute_dtype)

    def _rows(self, domain: str, split: Split) -> list[Row]:
        rows = []
        for commit in self.reader.units(domain):
            for sequence in self.reader.sequences(commit, split):
                example = example_of(sequence, len(sequence.prompt.input_ids))
                states = self.exact.states[sequence.prompt.sequence_id]
                entropy = sequence.targets.entropy[example.positions]
                rows.append(Row(example=example, entropy=entropy, states=states))
        return rows

    def run(self, target: Target, phases: Sequence[Phase], *, seed: int) -> dict[str, Any]:
        """Train a student on ``target`` and measure it."""
        torch.manual_seed(seed)
        student = self._load()
        began, num_tokens = time.process_time(), 0
        for number, phase in enumerate(phases):
            num_tokens += self._train(student, target, phase, seed=seed, number=number)
        seconds = time.process_time() - began
        figures = self.measure(student)
        return {**figures, "trained_tokens": num_tokens, "train_cpu_seconds": round(seconds, 1)}

    def _load(self) -> Student:
        """The pruned teacher; embedding and head, which are one matrix, stay the teacher's in every run."""
        config = TrainConfig(cache="", student=str(self._student), out="", tune="full")
        student = load_student(
            config,
            Origin(base=str(self._student)),
            precision=self._precision,
            vocab_size=self.reader.identity.vocab_size,
            training=True,
        )
        student.model.get_input_embeddings().weight.requires_grad_(False)
        student.model.get_output_embeddings().weight.requires_grad_(False)
        return student

    def _train(self, student: Student, target: Target, phase: Phase, *, seed: int, number: int) -> int:
        parameters = [value for _, value in student.trainable()]
        optimizer = torch.optim.AdamW(parameters, lr=phase.learning_rate, weight_decay=0.0)
        generator = torch.Generator().manual_seed(seed)
        total = 0
        for step, rows in enumerate(self._steps(phase, seed=seed, number=number)):
            for group in optimizer.param_groups:
                factor = learning_rate_factor(step, num_steps=phase.steps, warmup=0.1)
                group["lr"] = phase.learning_rate * factor
            batch = collate([row.example for row in rows], None)
            losses = fused_head_losses(
                student.hidden(batch),
                student.head(),
                self.targets(target, phase.temperature, batch, rows, generator),
                kl_weight=0.0 if target == "ce" else phase.kl_weight,
                ce_weight=1.0 if target == "ce" else phase.ce_weight,
                chunk=_CHUNK,
            )
            (losses.weighted / batch.num_trained).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += batch.num_trained
        return total

    def _steps(self, phase: Phase, *, seed: int, number: int) -> Iterator[list[Row]]:
        """Rows of each step; the same for every target."""
        assigned_N = assign_domains(phase.shares, phase.steps * self.batch_size)
        walks = []
        for domain in phase.shares:
            rows = self.train[domain]
            epochs = -(-len(assigned_N) // len(rows))
            orders = [permutation(len(rows), seed, number, domain, epoch) for epoch in range(epochs)]
            walks.append(iter(np.concatenate(orders).tolist()))
        domains = list(phase.shares)
        for start in range(0, len(assigned_N), self.batch_size):
            drawn = assigned_N[start : start + self.batch_size]
            yield [self.train[domains[index]][next(walks[index])] for index in drawn]

    def targets(
        self, target: Target, temperature: float, batch: DistillBatch, rows: Sequence[Row], generator: torch.Generator
    ) -> HeadTargets:
        """What the loss compares a batch with."""
        teacher: TeacherTargets | SampledTargets
        teacher = batch.teacher(temperature, self.reader.temperature_index(temperature))
        coords, tail = None, self._tails.get(target)
        if target == "renormalised":
            log_p_NK = (batch.topk_logprobs / temperature).log_softmax(1)
            teacher = TeacherTargets(
                topk_ids=batch.topk_ids.long(),
                topk_log_p=log_p_NK,
                log_tail=torch.full((batch.num_trained,), -100.0),
                temperature=temperature,
            )
        elif target == "full":
            coords = states_of(rows)
            teacher = TeacherTargets(
                topk_ids=batch.topk_ids[:, :0].long(),
                topk_log_p=batch.topk_logprobs[:, :0],
                log_tail=torch.zeros(batch.num_trained),
                temperature=temperature,
            )
        elif target in self.projections:
            teacher = first_ids(teacher, self.few) if target == "low_rank_256_few" else teacher
            coords = self._coords(states_of(rows), self.projections[target])
        elif target == "sampled":
            entropy_N = torch.from_numpy(np.concatenate([row.entropy for row in rows]))
            ids_J, counts_J = draw(self.exact.logits(states_of(rows)), self.num_samples, generator)
            teacher = SampledTargets.of(ids_J, counts_J, entropy_N)
        return HeadTargets(teacher=teacher, labels=batch.labels, coords=coords, tail=tail)

    @staticmethod
    def _coords(states_ND: Tensor, projection: Projection) -> Tensor:
        """What a cache with this projection keeps."""
        coords_NR = (states_ND.numpy() - projection.mean_D) @ projection.down_RD.T
        return torch.from_numpy(projection.dequantise(projection.quantise(coords_NR)))

    @torch.no_grad()
    def measure(self, student: Student) -> dict[str, Any]:
        """Held-out KL to the exact teacher at each temperature (without T²), cross-entropy and top-1 agreement."""
        student.model.eval()
        sums = dict.fromkeys([*(f"kl_at_{T:g}" for T in MEASURED), "ce", "top1"], 0.0)
        num_tokens = 0
        for start in range(0, len(self.held_out), 8):
            rows = self.held_out[start : start + 8]
            batch = collate([row.example for row in rows], None)
            states_ND, head = states_of(rows), student.head()
            num_tokens += batch.num_trained
            for first, last, z_NV in chunks_of_logits(student.hidden(batch), head, head.matrix(), chunk=_CHUNK):
                exact_NV = self.exact.logits(states_ND[first:last])
                for temperature in MEASURED:
                    log_q_NV, log_p_NV = (z_NV / temperature).log_softmax(1), (exact_NV / temperature).log_softmax(1)
                    sums[f"kl_at_{temperature:g}"] += float((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum())
                sums["ce"] += float(torch.nn.functional.cross_entropy(z_NV, batch.labels[first:last], reduction="sum"))
                sums["top1"] += float((z_NV.argmax(1) == exact_NV.argmax(1)).sum())
        return {**{name: round(value / num_tokens, 5) for name, value in sums.items()}, "held_out_tokens": num_tokens}


def first_ids(teacher: TeacherTargets, num: int) -> TeacherTargets:
    """What a cache with fewer ids at a position keeps: the mass of the others goes to the tail."""
    others_NK = teacher.topk_log_p[:, num:]
    return TeacherTargets(
        topk_ids=teacher.topk_ids[:, :num],
        topk_log_p=teacher.topk_log_p[:, :num],
        log_tail=torch.logaddexp(teacher.log_tail, others_NK.logsumexp(1)),
        temperature=teacher.temperature,
    )


def states_of(rows: Sequence[Row]) -> Tensor:
    """The teacher's final states at the rows' trained positions, [N, D]."""
    return torch.from_numpy(np.concatenate([row.states for row in rows]))


def draw(logits_NV: Tensor, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``num`` draws at each position as a cache keeps them: different ids position by position, and their counts."""
    drawn_ND = torch.multinomial(logits_NV.softmax(1), num, replacement=True, generator=generator)
    pairs = [row.unique(return_counts=True) for row in drawn_ND]
    return torch.cat([ids for ids, _ in pairs]), torch.cat([counts for _, counts in pairs])
