"""Protects training on several caches: the same figures as on one cache of all the data, an order that does not depend
on how the caches are named, and the refusals of caches that do not belong together.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distill.cache import document
from distill.cache.join import adopt_projection, open_caches
from distill.cache.plan import Plan, Source, plan_units
from distill.cache.projection import Projection
from distill.cache.reader import CacheReader
from distill.cache.writer import CacheWriter
from distill.config import TrainConfig
from distill.errors import IdentityError, UsageError
from distill.records import SequenceTargets
from distill.student.evaluate import evaluate_model
from distill.student.stage import plan_stage, settings_of
from distill.student.stream import TrainStream
from distill.student.trainer import train_stage
from tests.student.conftest import World, save_tokenizer, words

Configure = Callable[..., TrainConfig]


def write_part(root: Path, whole: CacheReader, domain: str, *, projection: bytes | None = None, unit_rows: int) -> Path:
    """A sealed cache of one domain's rows, in units of another size; with the projection of ``whole`` or its own."""
    rows: list[SequenceTargets] = []
    for commit in whole.units(domain):
        both = [row for split in ("train", "eval") for row in whole.sequences(commit, split)]
        rows += sorted(both, key=lambda row: int(row.prompt.source.rpartition(":")[2]))
    source = Source(domain=domain, path=f"{domain}.jsonl", sha256=domain.encode().hex().ljust(64, "0"), num_rows=48)
    plan = Plan(
        identity=whole.identity,
        recorded=whole.recorded,
        sources=(source,),
        eval_fraction=0.1,
        units=tuple(plan_units([source], unit_rows)),
    )
    writer = CacheWriter.open(root, plan)
    if projection is None:
        adopt_projection(writer, whole.root)
    else:
        writer.put_once("projection.safetensors", projection)
    save_tokenizer(root / "teacher", words())
    for unit in plan.units:
        writer.commit(unit, rows[unit.start : unit.stop], rejects=[], num_input_rows=unit.num_input_rows)
    assert writer.seal() is not None
    return root


def other_projection(whole: CacheReader) -> bytes:
    """Same widths, another basis."""
    projection = whole.projection
    assert projection is not None
    fields = {name: getattr(projection, name) for name in Projection.__dataclass_fields__}
    return Projection(**{**fields, "bias_V": fields["bias_V"] + np.float32(1)}).to_bytes()


@pytest.fixture(scope="module")
def parts(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The rows of ``world.cache`` as two caches with one projection."""
    root, whole = tmp_path_factory.mktemp("parts"), CacheReader.open(world.cache)
    general = write_part(root / "general", whole, "general", unit_rows=8)
    return str(general), str(write_part(root / "medical", whole, "medical", unit_rows=6))


def test_all_rows_of_all_caches_are_there(world: World, parts: tuple[str, str]) -> None:
    joined, whole = open_caches(parts), CacheReader.open(world.cache)
    assert (joined.sealed, joined.num_units, sorted(joined.domains)) == (True, 6 + 8, ["general", "medical"])
    assert joined.projection_bytes() == whole.projection_bytes()
    for split in ("train", "eval"):
        assert joined.num_rows("medical", split) == whole.num_rows("medical", split)
        ours, theirs = (
            {row.prompt.sequence_id: row for commit in cache.commits for row in cache.sequences(commit, split)}
            for cache in (joined, whole)
        )
        assert ours.keys() == theirs.keys()
        for name, row in ours.items():
            np.testing.assert_array_equal(row.targets.topk_logprobs, theirs[name].targets.topk_logprobs)


def test_the_order_does_not_depend_on_names_and_places(configured: Configure, parts: tuple[str, str]) -> None:
    config = configured()
    streams, settings = [], []
    for paths in (parts, parts[::-1]):
        reader = open_caches(paths)
        plan = plan_stage(config, 2, reader)
        with TrainStream(reader, plan.orders, plan.assigned, max_length=64) as stream:
            streams.append([example.input_ids.tobytes() for batch in stream.steps(0, 8) for example in batch])
        settings.append(settings_of(config, plan, reader, "student"))
    assert streams[0] == streams[1]
    assert settings[0] == settings[1]


def test_two_caches_train_and_evaluate_as_one(configured: Configure, world: World, parts: tuple[str, str]) -> None:
    config = configured(cache=list(parts), stage={"max_steps": 2, "eval_every": 2})
    result = train_stage(config, 1, quiet=True)
    assert not result.already_finished
    swapped = config.model_copy(update={"cache": parts[::-1]})
    assert train_stage(swapped, 1, quiet=True).already_finished
    joined, whole = (evaluate_model(configured(cache=cache), result.best) for cache in (list(parts), str(world.cache)))
    assert joined.overall.num_tokens == whole.overall.num_tokens
    for temperature, value in whole.overall.kl.items():
        assert joined.overall.kl[temperature] == pytest.approx(value, rel=1e-5)


def test_other_projections_serve_the_bucket_tail_only(
    configured: Configure, world: World, parts: tuple[str, str], tmp_path: Path
) -> None:
    whole = CacheReader.open(world.cache)
    other = write_part(tmp_path / "other", whole, "medical", projection=other_projection(whole), unit_rows=8)
    cache = [parts[0], str(other)]
    with pytest.raises(IdentityError, match=r"different projections .*--projection-from .*general.*tail to bucket"):
        train_stage(configured(cache=cache), 1, quiet=True)
    with pytest.raises(IdentityError, match="different projections"):
        train_stage(configured(cache=cache, stage={"tail": "bucket", "weights": {"feature": 1}}), 1, quiet=True)
    stage = {"tail": "bucket", "max_steps": 1, "eval_every": 1}
    assert train_stage(configured(cache=cache, stage=stage), 1, quiet=True).num_steps == 1


def test_caches_that_do_not_belong_together_are_refused(world: World, bare_cache: Path, parts: tuple[str, str]) -> None:
    with pytest.raises(IdentityError, match=r"different identities.*hidden_bytes: cache 24, asked 0"):
        open_caches([world.cache, bare_cache])
    with pytest.raises(UsageError, match="hold the same data"):
        open_caches([parts[0], parts[1], parts[0]])


def test_a_projection_is_adopted_by_caches_of_the_same_identity_only(
    world: World, bare_cache: Path, parts: tuple[str, str], tmp_path: Path
) -> None:
    plan = document.load(Plan, Path(parts[0]), "plan.json", fix="")
    begun = CacheWriter.open(tmp_path / "begun", plan)
    begun.put_once("projection.safetensors", other_projection(CacheReader.open(world.cache)))
    with pytest.raises(IdentityError, match="begun with another projection"):
        adopt_projection(begun, world.cache)
    with pytest.raises(IdentityError, match=r"another identity.*hidden_bytes: cache 0, asked 24"):
        adopt_projection(CacheWriter.open(tmp_path / "other", plan), bare_cache)
    bare = document.load(Plan, bare_cache, "plan.json", fix="")
    with pytest.raises(UsageError, match="hidden_bytes 0"):
        adopt_projection(CacheWriter.open(tmp_path / "bare", bare), world.cache)
