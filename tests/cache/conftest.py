"""A tiny teacher made of random matrices, and caches that it filled: real targets of a real softmax over V ids."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from distill.cache.plan import Identity, Plan, Recorded, Source, Unit, plan_units
from distill.cache.projection import Moments, Projection, fit_projection
from distill.cache.writer import CacheWriter
from distill.records import Prompt, SequenceTargets, Targets

TEMPERATURES = (4.0, 2.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyTeacher:
    """A head [V, D] over hidden states whose covariance falls off as a trained model's does."""

    head_VD: NDArray[np.float64]
    mixing_DD: NDArray[np.float64]
    mean_D: NDArray[np.float64]
    top_k: int
    projection: Projection | None

    def hidden(self, rng: np.random.Generator, num: int) -> NDArray[np.float64]:
        """Final hidden states of ``num`` positions."""
        return rng.standard_normal((num, len(self.mean_D))) @ self.mixing_DD + self.mean_D

    def logprobs(self, hidden_ND: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log-probabilities at temperature 1."""
        logits_NV = hidden_ND @ self.head_VD.T
        return logits_NV - log_sum_exp(logits_NV)[:, None]

    def targets(self, hidden_ND: NDArray[np.float64]) -> Targets:
        """What a cache keeps of positions with these hidden states."""
        logprobs_NV = self.logprobs(hidden_ND)
        ids_NV = np.argsort(-logprobs_NV, axis=1, kind="stable")
        topk_ids_NK, rest_NV = ids_NV[:, : self.top_k], ids_NV[:, self.top_k :]
        rest_logprobs = np.take_along_axis(logprobs_NV, rest_NV, axis=1)
        log_z = np.stack([log_sum_exp(logprobs_NV / T) for T in TEMPERATURES], axis=1)
        log_tail = np.stack([log_sum_exp(rest_logprobs / T) for T in TEMPERATURES], axis=1) - log_z
        hidden = {}
        if self.projection is not None:
            hidden = self.projection.quantise((hidden_ND - self.projection.mean_D) @ self.projection.down_RD.T)
        return Targets(
            topk_ids=topk_ids_NK.astype(np.int32),
            topk_logprobs=np.take_along_axis(logprobs_NV, topk_ids_NK, axis=1).astype(np.float32),
            log_z=log_z.astype(np.float32),
            log_tail=log_tail.astype(np.float32),
            hidden=hidden,
            entropy=-(np.exp(logprobs_NV) * logprobs_NV).sum(axis=1).astype(np.float32),
        )

    def sequence(
        self, seed: int, *, length: int = 12, domain: str = "general", split: str = "train", source: str | None = None
    ) -> SequenceTargets:
        """A whole row with ``length`` random tokens."""
        rng = np.random.default_rng(seed)
        input_ids = rng.integers(0, len(self.head_VD), length).astype(np.int32)
        prompt = Prompt(
            sequence_id=f"sequence-{seed}",
            prompt_id=f"prompt-{seed}",
            domain=domain,
            split=split,
            source=source or f"{domain}.jsonl:{seed}",
            metadata={"department": "cardiology"} if seed % 2 else {},
            prompt=f"Question {seed}?",
            response=f"答案 {seed}.",
            input_ids=input_ids,
            loss_mask=np.arange(length - 1) >= length // 2,
        )
        return SequenceTargets(prompt=prompt, targets=self.targets(self.hidden(rng, length - 1)))


def log_sum_exp(values_NV: NDArray[np.float64]) -> NDArray[np.float64]:
    """log Σ exp over the last axis."""
    top = values_NV.max(axis=1, keepdims=True)
    return np.log(np.exp(values_NV - top).sum(axis=1)) + top[:, 0]


def make_teacher(*, dim: int = 32, vocab: int = 200, top_k: int = 8, hidden_bytes: int = 8) -> TinyTeacher:
    """A teacher with random weights and the projection fitted to it."""
    rng = np.random.default_rng(0)
    head_VD = rng.standard_normal((vocab, dim)) * 0.5 + rng.standard_normal(dim)
    scales_D = 3.0 * np.arange(1, dim + 1) ** -0.7
    rotation_DD = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    teacher = TinyTeacher(
        head_VD=head_VD,
        mixing_DD=scales_D[:, None] * rotation_DD,
        mean_D=rng.standard_normal(dim),
        top_k=top_k,
        projection=None,
    )
    if hidden_bytes == 0:
        return teacher
    hidden_ND = teacher.hidden(rng, 40 * dim)
    moments = Moments(count=len(hidden_ND), sum_D=hidden_ND.sum(0), outer_DD=hidden_ND.T @ hidden_ND)
    centred_VD = head_VD - head_VD.mean(0)
    fit = fit_projection(moments, gram_DD=centred_VD.T @ centred_VD, hidden_bytes=hidden_bytes)
    projection = Projection(
        mean_D=fit.mean_D.astype(np.float32),
        down_RD=fit.down_RD.astype(np.float32),
        basis_VR=(centred_VD @ fit.up_DR).astype(np.float16),
        bias_V=(centred_VD @ fit.mean_D).astype(np.float32),
        variance_R=fit.variance_R.astype(np.float32),
        widths=fit.widths,
        logit_scale=1.0,
        soft_cap=None,
        explained=fit.explained,
    )
    return TinyTeacher(
        head_VD=head_VD, mixing_DD=teacher.mixing_DD, mean_D=teacher.mean_D, top_k=top_k, projection=projection
    )


def identity_of(teacher: TinyTeacher, **changes: object) -> Identity:
    """The identity of a cache that ``teacher`` fills."""
    values: dict[str, object] = {
        "teacher_weights": "a" * 64,
        "token_map": "b" * 64,
        "chat_template": "c" * 64,
        "vocab_size": len(teacher.head_VD),
        "mask_policy": "assistant",
        "overlong": "truncate",
        "max_length": 64,
        "dtype": "float32",
        "quantisation": None,
        "head_dtype": "float32",
        "top_k": teacher.top_k,
        "temperatures": TEMPERATURES,
        "hidden_bytes": 0 if teacher.projection is None else 8,
        "trust_remote_code": False,
    }
    return Identity.model_validate({**values, **changes})


def plan_of(teacher: TinyTeacher, *, rows: dict[str, int], unit_rows: int = 4, **changes: object) -> Plan:
    """A plan with one source for each domain of ``rows``."""
    sources = [
        Source(domain=domain, path=f"{domain}.jsonl", sha256=f"{index:064x}", num_rows=num_rows)
        for index, (domain, num_rows) in enumerate(rows.items())
    ]
    return Plan(
        identity=identity_of(teacher, **changes),
        recorded=Recorded(teacher="tiny", engine="random", engine_version="1"),
        sources=tuple(sources),
        eval_fraction=0.25,
        units=tuple(plan_units(sources, unit_rows)),
    )


def rows_of(teacher: TinyTeacher, unit: Unit) -> list[SequenceTargets]:
    """The rows of a unit; every fourth is for evaluation."""
    return [
        teacher.sequence(
            1000 * unit.source + number,
            length=6 + number % 5,
            domain=unit.domain,
            split="eval" if number % 4 == 3 else "train",
        )
        for number in range(unit.start, unit.stop)
    ]


def fill(root: Path, teacher: TinyTeacher, plan: Plan, *, num_units: int | None = None) -> CacheWriter:
    """Begin a cache and commit its first ``num_units`` units, or all, and seal it then."""
    writer = CacheWriter.open(root, plan)
    if teacher.projection is not None:
        writer.put_once("projection.safetensors", teacher.projection.to_bytes())
    for unit in writer.missing_units()[:num_units]:
        writer.commit(unit, rows_of(teacher, unit), rejects=[], num_input_rows=unit.num_input_rows)
    writer.seal()
    return writer


@pytest.fixture(scope="session")
def teacher() -> TinyTeacher:
    """V=200, D=32, k=8, hidden states in 8 bytes."""
    return make_teacher()


@pytest.fixture
def plan(teacher: TinyTeacher) -> Plan:
    """Ten general and six medical rows in units of four: five units."""
    return plan_of(teacher, rows={"general": 10, "medical": 6})


@pytest.fixture
def cache(tmp_path: Path, teacher: TinyTeacher, plan: Plan) -> Path:
    """A sealed cache."""
    fill(tmp_path / "cache", teacher, plan)
    return tmp_path / "cache"


@pytest.fixture
def filler(teacher: TinyTeacher, plan: Plan) -> Callable[[Path, int | None], CacheWriter]:
    """Fills a folder with the first n units of the plan."""
    return lambda root, num_units: fill(root, teacher, plan, num_units=num_units)


@pytest.fixture(scope="session", name="make_teacher")
def make_teacher_fixture() -> Callable[..., TinyTeacher]:
    """The function of that name."""
    return make_teacher


@pytest.fixture(scope="session", name="identity_of")
def identity_of_fixture() -> Callable[..., Identity]:
    """The function of that name."""
    return identity_of


@pytest.fixture(scope="session", name="plan_of")
def plan_of_fixture() -> Callable[..., Plan]:
    """The function of that name."""
    return plan_of


@pytest.fixture(scope="session", name="rows_of")
def rows_of_fixture() -> Callable[..., list[SequenceTargets]]:
    """The function of that name."""
    return rows_of


@pytest.fixture(scope="session", name="fill")
def fill_fixture() -> Callable[..., CacheWriter]:
    """The function of that name."""
    return fill
