"""Sources of a cache to be made flow in, what is in them flows out: rows, tokens, rejects, and bytes known already.

Rows are tokenised as in capture and thrown away. What does not depend on the teacher's numbers (texts, ids, masks,
footers) is written by the cache's own writer into memory, so that its size is no estimate.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow.parquet as pq

from distill.cache.schema import Layout
from distill.cache.shard import row_groups, write_rows
from distill.cache.sizes import column_bytes, num_distinct
from distill.config import CacheConfig
from distill.data.prompts import PromptMaker, prompts_of
from distill.data.sources import Source
from distill.progress import Ticker
from distill.records import Prompt, Question, Reject, SequenceTargets, Split, Targets

KNOWN = (
    *("sequence_id", "prompt_id", "domain", "split", "source", "metadata", "prompt", "response"),
    *("input_ids", "loss_mask"),
)
_NUMBER = re.compile(r"\d[\d,.]*")


@dataclass(slots=True, kw_only=True)
class Tally:
    """Sums over the sequences of one split of one domain; where rows were sampled, what all would sum to."""

    num_rows: float = 0
    num_tokens: float = 0
    num_targets: float = 0
    num_trained: float = 0


@dataclass(slots=True, kw_only=True)
class Workload:
    """What the rows amount to, by those that were read: each stands for ``weight`` rows of its source.

    ``variance`` is that of the number of targets, 0 where every row was read.
    """

    num_input_rows: int = 0
    num_read: int = 0
    num_units: int = 0
    tallies: dict[tuple[str, Split], Tally] = field(default_factory=dict)
    rejects: dict[tuple[str, str], float] = field(default_factory=dict)  # domain, reason with its numbers as N
    num_distinct: float = 0.0  # targets with a beginning that their page has not seen
    num_attended: float = 0.0  # positions looked at by all positions
    num_questions: float = 0.0  # sequences whose answers the teacher has yet to write
    bytes: dict[str, float] = field(default_factory=dict)  # column, or "footers" -> bytes, of KNOWN alone
    variance: float = 0.0

    @property
    def num_targets(self) -> float:
        """Targets of all domains and splits."""
        return sum(tally.num_targets for tally in self.tallies.values())


def count(
    sources: Sequence[Source], *, maker: PromptMaker, config: CacheConfig, sample: int | None, quiet: bool
) -> Workload:
    """Reads every row of ``sources``, or ``sample`` random ones of all."""
    load = Workload(num_input_rows=sum(len(source) for source in sources))
    random = np.random.default_rng(config.seed)
    with Ticker("plan", total=min(sample or load.num_input_rows, load.num_input_rows), quiet=quiet) as ticker:
        for source in sources:
            load.num_units += -(-len(source) // config.unit_rows)
            share = len(source) if sample is None else -(-sample * len(source) // load.num_input_rows)
            rows: Sequence[int] = range(len(source))
            if share < len(source):
                rows = sorted(random.choice(len(source), share, replace=False).tolist())
            part = _Part(source=source, weight=len(source) / max(len(rows), 1), maker=maker, config=config)
            for start in range(0, len(rows), config.unit_rows):
                unit = rows[start : start + config.unit_rows]
                _add_unit(load, part, unit)
                load.num_read += len(unit)
                ticker.update(load.num_read, targets=round(load.num_targets))
            load.variance += part.variance()
    return load


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The rows of one source, and the targets that each has."""

    source: Source
    weight: float
    maker: PromptMaker
    config: CacheConfig
    per_row: list[int] = field(default_factory=list)

    def variance(self) -> float:
        """Of the source's number of targets, drawn without putting back."""
        num = len(self.per_row)
        if num < 2 or num == len(self.source):
            return 0.0
        unseen = 1 - num / len(self.source)
        return len(self.source) ** 2 * unseen * float(np.var(self.per_row, ddof=1)) / num


def _add_unit(load: Workload, part: _Part, rows: Sequence[int]) -> None:
    kept: list[Prompt] = []
    for row in rows:
        part.per_row.append(0)
        for item in prompts_of(part.source, start=row, stop=row + 1, maker=part.maker):
            if isinstance(item, Reject):
                key = item.domain, _NUMBER.sub("N", item.reason)
                load.rejects[key] = load.rejects.get(key, 0.0) + part.weight
                continue
            load.num_questions += part.weight * isinstance(item, Question)
            kept.append(_longest(item, part) if isinstance(item, Question) else item)
            part.per_row[-1] += kept[-1].num_targets
    for prompt in kept:
        tally = load.tallies.setdefault((prompt.domain, prompt.split), Tally())
        tally.num_rows += part.weight
        tally.num_tokens += part.weight * len(prompt.input_ids)
        tally.num_targets += part.weight * prompt.num_targets
        tally.num_trained += part.weight * int(prompt.loss_mask.sum())
        load.num_attended += part.weight * prompt.num_targets * (prompt.num_targets + 1) / 2
    ordered = [prompt for split in ("train", "eval") for prompt in kept if prompt.split == split]
    _add_bytes(load, part, ordered)


def _longest(question: Question, part: _Part) -> Prompt:
    """The longest sequence that a question may become; its answer repeats the question's words."""
    assert part.config.generate is not None
    room = part.config.max_length - len(question.input_ids)
    num = max(1, min(part.config.generate.max_tokens, room))
    return part.maker.answered(question, np.resize(question.input_ids, num))


def _add_bytes(load: Workload, part: _Part, ordered: Sequence[Prompt]) -> None:
    """Writes a unit's shard with nothing in the teacher's columns."""
    if not ordered:
        return
    targets = part.config.targets
    widths = tuple((bits, 0) for bits in (8, 6, 4, 2)) if targets.hidden_bytes else ()
    layout = Layout(top_k=0, temperatures=(), widths=widths)
    rows = [SequenceTargets(prompt=prompt, targets=_nothing(prompt.num_targets, layout)) for prompt in ordered]
    file = io.BytesIO()
    write_rows(file, rows, layout)
    sizes = column_bytes(pq.read_metadata(file))
    known = {name: sizes[name] for name in KNOWN} | {"footers": file.getbuffer().nbytes - sum(sizes.values())}
    for name, size in known.items():
        load.bytes[name] = load.bytes.get(name, 0.0) + part.weight * size
    for group in row_groups(rows):
        distinct = num_distinct([row.prompt.input_ids for row in group], top_k=targets.top_k)
        load.num_distinct += part.weight * distinct


def _nothing(num: int, layout: Layout) -> Targets:
    return Targets(
        topk_ids=np.zeros((num, 0), np.int32),
        topk_logprobs=np.zeros((num, 0), np.float32),
        log_z=np.zeros((num, 0), np.float32),
        log_tail=np.zeros((num, 0), np.float32),
        hidden={bits: np.zeros((num, 0), np.int8) for bits, _ in layout.widths},
        entropy=np.zeros(num, np.float32),
    )
