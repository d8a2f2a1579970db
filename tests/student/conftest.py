"""A tiny real teacher, a tiny student that shares its tokenizer, and caches filled from the teacher's forward pass."""

import contextlib
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.cache.identity import token_map_hash
from distill.cache.plan import Identity, Plan, Recorded, Source, plan_units
from distill.cache.projection import Moments, Projection, fit_projection
from distill.cache.writer import CacheWriter
from distill.config import TrainConfig
from distill.records import Prompt, SequenceTargets, Targets
from distill.student.metrics import Metrics

VOCAB, PADDED, LENGTH, TOP_K = 300, 320, 24, 16
ROWS, UNIT_ROWS = 48, 8  # of each domain; every sixth row is held out


@dataclass(frozen=True, kw_only=True)
class World:
    """Folders of the parts."""

    teacher: Path
    student: Path
    cache: Path


def save_tokenizer(folder: Path, words: list[str]) -> None:
    """A word-level tokenizer whose ids are the positions in ``words``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)


def words() -> list[str]:
    """The tokens, in order of their ids."""
    return ["<unk>", "<pad>", *(f"w{number}" for number in range(VOCAB - 2))]


def save_model(folder: Path, *, seed: int, common: float = 0.0, **changes: Any) -> Any:
    """A random Qwen3 with more head rows than tokens, and the tokenizer beside it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": PADDED,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": 1,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**{**settings, **changes})).eval()
    with torch.no_grad():
        # What all positions share favours some tokens everywhere, as in real text: a few steps can learn that.
        model.model.embed_tokens.weight.add_(common * torch.randn(model.config.hidden_size))
    model.save_pretrained(folder)
    save_tokenizer(folder, words())
    return model


@torch.no_grad()
def sampled(teacher: Any, num: int, seed: int) -> torch.Tensor:
    """Sequences that the teacher itself draws, so that cross-entropy has something to learn."""
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(2, VOCAB, (num, 1), generator=generator)
    for _ in range(LENGTH - 1):
        probs_BV = teacher(ids_BS).logits[:, -1, :VOCAB].softmax(-1)
        ids_BS = torch.cat([ids_BS, torch.multinomial(probs_BV, 1, generator=generator)], 1)
    return ids_BS


def fitted(teacher: Any, hidden_ND: np.ndarray, hidden_bytes: int) -> Projection:
    """The projection of the teacher's final states to ``hidden_bytes`` bytes."""
    head_VD = teacher.lm_head.weight.detach().double().numpy()[:VOCAB]
    centred_VD = head_VD - head_VD.mean(0)
    moments = Moments(count=len(hidden_ND), sum_D=hidden_ND.sum(0), outer_DD=hidden_ND.T @ hidden_ND)
    fit = fit_projection(moments, gram_DD=centred_VD.T @ centred_VD, hidden_bytes=hidden_bytes)
    return Projection(
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


def targets_of(
    logits_NV: torch.Tensor, hidden_ND: np.ndarray, projection: Projection | None, temperatures: tuple[float, ...]
) -> Targets:
    """What a cache keeps of positions with these logits and hidden states."""
    logprobs_NV = logits_NV[:, :VOCAB].double().log_softmax(1)
    topk = logprobs_NV.topk(TOP_K)
    log_z = torch.stack([(logprobs_NV / T).logsumexp(1) for T in temperatures], 1)
    rest_NV = logprobs_NV.scatter(1, topk.indices, -torch.inf)
    log_tail = torch.stack([(rest_NV / T).logsumexp(1) for T in temperatures], 1) - log_z
    hidden = {}
    if projection is not None:
        hidden = projection.quantise((hidden_ND - projection.mean_D) @ projection.down_RD.T)
    return Targets(
        topk_ids=topk.indices.numpy().astype(np.int32),
        topk_logprobs=topk.values.float().numpy(),
        log_z=log_z.float().numpy(),
        log_tail=log_tail.clamp(min=-100).float().numpy(),
        hidden=hidden,
        entropy=-(logprobs_NV.exp() * logprobs_NV).sum(1).float().numpy(),
    )


def metadata_of(domain: str, row: int) -> dict[str, str]:
    """Medical rows have a department, by runs of six, so that each has rows held out; general ones have none."""
    return {"department": ("cardiology", "neurology")[row // 6 % 2]} if domain == "medical" else {}


def _plan(*, hidden_bytes: int, temperatures: tuple[float, ...]) -> Plan:
    sources = [Source(domain=d, path=f"{d}.jsonl", sha256="0" * 64, num_rows=ROWS) for d in ("general", "medical")]
    identity = Identity(
        teacher_weights="a" * 64,
        token_map=token_map_hash({word: number for number, word in enumerate(words())}),
        chat_template="c" * 64,
        vocab_size=VOCAB,
        mask_policy="assistant",
        overlong="truncate",
        max_length=LENGTH,
        dtype="float32",
        quantisation=None,
        head_dtype="float32",
        top_k=TOP_K,
        temperatures=temperatures,
        hidden_bytes=hidden_bytes,
        trust_remote_code=False,
    )
    units = tuple(plan_units(sources, UNIT_ROWS))
    recorded = Recorded(teacher="tiny", engine="transformers", engine_version="0")
    return Plan(identity=identity, recorded=recorded, sources=tuple(sources), eval_fraction=0.1, units=units)


def _prompt(domain: str, row: int, ids_S: torch.Tensor) -> Prompt:
    return Prompt(
        sequence_id=f"{domain}-{row}",
        prompt_id=f"{domain}-{row}",
        domain=domain,
        split="eval" if row % 6 == 5 else "train",
        source=f"{domain}.jsonl:{row}",
        metadata=metadata_of(domain, row),
        prompt="",
        response="",
        input_ids=ids_S.numpy().astype(np.int32),
        loss_mask=np.arange(LENGTH - 1) >= 7,
    )


def _cut_short(prompt: Prompt) -> Prompt:
    """Of the answer's last tokens up to twelve do not train."""
    num_tokens = 3 * int(prompt.sequence_id.rpartition("-")[2]) % 13
    return replace(prompt, loss_mask=prompt.loss_mask & (np.arange(LENGTH - 1) < LENGTH - 1 - num_tokens))


def build_cache(
    root: Path,
    teacher: Any,
    *,
    hidden_bytes: int = 24,
    temperatures: tuple[float, ...] = (4.0, 2.0, 1.0),
    files: Mapping[str, bytes] | None = None,
    change: Callable[[Prompt], Prompt] = lambda prompt: prompt,
) -> Path:
    """A sealed cache of the domains general and medical. The first eight tokens of a row are its prompt.

    ``files`` are put beside its own. ``change`` makes other prompts of the rows.
    """
    plan = _plan(hidden_bytes=hidden_bytes, temperatures=temperatures)
    writer = CacheWriter.open(root, plan)
    for name, data in (files or {}).items():
        writer.put_once(name, data)
    ids = {source.domain: sampled(teacher, ROWS, seed) for seed, source in enumerate(plan.sources)}
    with torch.no_grad():
        states = {domain: teacher.model(ids_BS).last_hidden_state for domain, ids_BS in ids.items()}
        logits = {domain: teacher.lm_head(states_BSD) for domain, states_BSD in states.items()}
    projection = None
    if hidden_bytes:
        flat_ND = torch.cat([states_BSD.flatten(0, 1) for states_BSD in states.values()]).double().numpy()
        projection = fitted(teacher, flat_ND, hidden_bytes)
        writer.put_once("projection.safetensors", projection.to_bytes())
    save_tokenizer(root / "teacher", words())
    for unit in plan.units:
        rows = [
            SequenceTargets(
                prompt=change(_prompt(unit.domain, row, ids[unit.domain][row])),
                targets=targets_of(
                    logits[unit.domain][row, :-1],
                    states[unit.domain][row, :-1].double().numpy(),
                    projection,
                    temperatures,
                ),
            )
            for row in range(unit.start, unit.stop)
        ]
        writer.commit(unit, rows, rejects=[], num_input_rows=unit.num_input_rows)
    assert writer.seal() is not None
    return root


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Teacher, student and cache: V=300 of 320 head rows, k=16, T = 4, 2, 1, hidden states in 24 bytes."""
    root = tmp_path_factory.mktemp("world")
    teacher = save_model(root / "teacher", seed=0, common=1.0, initializer_range=0.4, tie_word_embeddings=False)
    save_model(root / "student", seed=1, num_hidden_layers=4)
    return World(teacher=root / "teacher", student=root / "student", cache=build_cache(root / "cache", teacher))


@pytest.fixture(scope="session")
def bare_cache(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows without hidden states, and only T = 2."""
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(world.teacher, dtype=torch.float32)
    return build_cache(tmp_path_factory.mktemp("bare") / "cache", teacher, hidden_bytes=0, temperatures=(2.0,))


@pytest.fixture(scope="session")
def changed_cache(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The same rows with changed prompts; see ``build_cache``."""
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(world.teacher, dtype=torch.float32)
    return lambda change: build_cache(tmp_path_factory.mktemp("changed") / "cache", teacher, change=change)


@pytest.fixture(scope="session")
def uneven_cache(changed_cache: Callable[..., Path]) -> Path:
    """The same rows, of which 4 to 16 tokens train."""
    return changed_cache(_cut_short)


@pytest.fixture
def configured(world: World, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A configuration for short full fine-tuning; ``stage`` changes stage 1, other keywords the rest."""

    def configure(*, stage: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
        brief = {"max_steps": 8, "batch_size": 8, "eval_every": 4, "learning_rate": 3e-3}
        values: dict[str, Any] = {
            "cache": str(world.cache),
            "student": str(world.student),
            "out": str(tmp_path / "run"),
            "tune": "full",
            "device": "cpu",
            "micro_batch_tokens": 100,
            "head_chunk": 32,
            "samples": 0,
            "stages": {1: {**brief, **(stage or {})}, 2: brief, 3: brief},
            **changes,
        }
        return TrainConfig.model_validate(values)

    return configure


@contextlib.contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Meanwhile no file of this process can grow beyond ``num_bytes``, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def stop_at(monkeypatch: pytest.MonkeyPatch, *, step: int) -> None:
    """From now on a signal comes when a trainer has written what it measured at ``step``."""
    log = Metrics.log

    def with_signal(self: Metrics, kind: Any, at: int, values: dict[str, Any]) -> None:
        log(self, kind, at, values)
        if (kind, at) == ("train", step):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Metrics, "log", with_signal)


def logged(run: Path, kind: str, stage: int = 1) -> list[dict[str, Any]]:
    """The lines of a kind in a stage's metrics.jsonl."""
    text = (run / f"stage{stage}" / "metrics.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def without_times(run: Path, stage: int = 1) -> list[dict[str, Any]]:
    """All lines of a stage's metrics.jsonl, without the figures of the clock."""
    text = (run / f"stage{stage}" / "metrics.jsonl").read_text(encoding="utf-8")
    timed = ("time", "tokens_per_second", "waiting")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in text.splitlines()]


def captured_cache(world: World, root: Path, *, num_rows: int, calibration_tokens: int, **targets: Any) -> Path:
    """A cache of the tiny teacher, as capture makes it, with what ``targets`` ask for besides the usual."""
    from distill.config import CacheConfig, TargetsConfig
    from distill.teacher.job import cache_teacher

    random = np.random.default_rng(0)
    rows = [random.integers(0, 290, random.integers(16, 25)) for _ in range(num_rows)]
    lines = [json.dumps({"text": " ".join(f"w{number}" for number in row)}) for row in rows]
    (root / "general.jsonl").write_text("\n".join(lines))
    config = CacheConfig(
        teacher=str(world.teacher),
        data={"general": (str(root / "general.jsonl"),)},
        eval_fraction=0.2,
        out=str(root / "cache"),
        engine="transformers",
        dtype="float32",
        targets=TargetsConfig(top_k=16, hidden_bytes=24, **targets),
        max_length=24,
        unit_rows=8,
        calibration_tokens=calibration_tokens,
    )
    cache_teacher(config, quiet=True)
    return root / "cache"


@pytest.fixture(scope="session")
def inner_cache(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With states of both the teacher's layers, and queries and keys of some of their heads."""
    root = tmp_path_factory.mktemp("inner-states")
    kept = {"layers": (0, 1), "layer_bytes": 12, "heads": {0: (0, 3), 1: (1,)}}
    return captured_cache(world, root, num_rows=32, calibration_tokens=300, **kept)
