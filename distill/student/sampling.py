"""Held-out losses of groups flow in, which walk supplies each further sequence flows out.

A group is a domain, or the rows with one value of a metadata key. Evaluations give groups weights; the weights are
recorded in the checkpoint and, with the schedule of the shares, are all that the order depends on.

``N`` sequences, ``C`` cells: what is walked by itself, a domain or one domain's rows of one group.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.cache.reader import CacheReader
from distill.config import ShareConfig, StageConfig
from distill.errors import DataError, UsageError
from distill.student.batch import group_of
from distill.student.checkpoint import Reweighting
from distill.student.figures import Evaluation
from distill.student.mixture import BLOCK, follow, scheduled_shares
from distill.student.order import UnitRows

_SMOOTHING = 0.5  # part of the former weight in the new one
_MOST_CELLS = 255  # each keeps a window of shards in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Train rows that one walk goes through. ``group`` is None where the domain is the group."""

    domain: str
    group: str | None
    units: tuple[UnitRows, ...]

    @property
    def weight_name(self) -> str:
        """The group whose weight counts."""
        return self.domain if self.group is None else self.group


def cells_of(reader: CacheReader, domains: Iterable[str], stage: StageConfig) -> tuple[Cell, ...]:
    """The cells of a stage: its domains, or their groups where ``sampling_by`` names a metadata key.

    That key is then read for every train row. Raises UsageError when sampling has fewer than two groups, or too many.
    """
    by_key = stage.sampling == "evaluation" and stage.sampling_by != "domain"
    cells = [
        cell
        for domain in domains
        for cell in (_groups(reader, domain, stage.sampling_by) if by_key else [_whole(reader, domain)])
    ]
    names = sorted({cell.weight_name for cell in cells})
    if stage.sampling == "evaluation" and not (len(names) > 1 and len(cells) <= _MOST_CELLS):
        raise UsageError(
            f"sampling: evaluation needs at least two groups to choose between and {_MOST_CELLS} at most, but "
            f"sampling_by: {stage.sampling_by} tells {len(names)} apart ({', '.join(names[:3])}). Set sampling_by to "
            "domain where the stage has several, or to a metadata key with few values; or set sampling to uniform."
        )
    return tuple(cells)


def _whole(reader: CacheReader, domain: str) -> Cell:
    units = [UnitRows(unit=commit.unit, num_rows=commit.num_rows.train) for commit in reader.units(domain)]
    return Cell(domain=domain, group=None, units=tuple(units))


def _groups(reader: CacheReader, domain: str, key: str) -> list[Cell]:
    units: dict[str, list[UnitRows]] = {}
    for commit in reader.units(domain):
        column = reader.read_unit(commit, columns=["metadata"])["metadata"][: commit.num_rows.train]
        for group, num_rows in Counter(group_of(dict(row), key) for row in column.to_pylist()).items():
            units.setdefault(group, []).append(UnitRows(unit=commit.unit, num_rows=num_rows))
    return [Cell(domain=domain, group=group, units=tuple(units[group])) for group in sorted(units)]


class Sampler:
    """Fills ``assigned`` (the number of the cell of each sequence, [N]) piece by piece, as weights become known."""

    def __init__(
        self,
        shares: Mapping[str, ShareConfig],
        cells: Sequence[Cell],
        stage: StageConfig,
        *,
        assigned: NDArray[np.uint16],
    ) -> None:
        self._shares, self._cells, self._stage, self._assigned = shares, cells, stage, assigned
        self._deficits = [0.0] * len(cells)

    def next_weights(self, evaluation: Evaluation | None, former: Sequence[Reweighting]) -> dict[str, float]:
        """The weight of each group after an evaluation; 1 is the mean.

            w ← s w + (1 - s) L_g / mean(L),    s = 0.5, and 0 the first time

        with L_g the stage's weighted loss on the group's held-out rows. A group without any counts as the mean. Raises
        DataError when no group has held-out rows.
        """
        by_group = {} if evaluation is None else evaluation.groups or evaluation.domains
        names = list(dict.fromkeys(cell.weight_name for cell in self._cells))
        losses = {name: max(0.0, by_group[name].objective(self._stage)) for name in names if name in by_group}
        if not losses:
            raise DataError(
                "sampling: evaluation has no held-out row with a trained token within max_length in any group, so "
                "nothing says which comes more often. Raise max_length, make the cache with --eval or an eval_fraction "
                "above 0, or set sampling to uniform."
            )
        mean = sum(losses.values()) / len(losses)
        relative = {name: losses[name] / mean if name in losses and mean > 0 else 1.0 for name in names}
        if not former:
            return relative
        old = former[-1].weights
        return {name: _SMOOTHING * old[name] + (1 - _SMOOTHING) * relative[name] for name in names}

    def apply(self, reweighting: Reweighting) -> None:
        """Assign the sequences from ``position`` up to the next evaluation. Call it once for each, in their order."""
        length = self._stage.eval_every * self._stage.batch_size
        last = min(reweighting.position + length, len(self._assigned))
        for start in range(reweighting.position, last, BLOCK):
            stop = min(start + BLOCK, last)
            shares_NC = self._cell_shares(np.arange(start, stop) / len(self._assigned), reweighting.weights)
            self._assigned[start:stop], self._deficits = follow(shares_NC, self._deficits)

    def _cell_shares(self, progress_N: NDArray[np.float64], weights: Mapping[str, float]) -> NDArray[np.float64]:
        """The share of each cell: [N, C], rows sum to 1.

            share_c = φ n_c + (1 - φ) n_c w_c / Σ n w · Σ n,    φ = sampling_floor

        n_c is the cell's own share: its domain's scheduled share times its part of the domain's rows. The sums are over
        all cells where groups are domains, else over the cells of the same domain, whose scheduled share so remains.
        """
        domains = list(self._shares)
        shares_ND = scheduled_shares(self._shares, progress_N)
        rows_C = np.array([sum(unit.num_rows for unit in cell.units) for cell in self._cells], dtype=np.float64)
        domain_C = np.array([domains.index(cell.domain) for cell in self._cells])
        own_NC = shares_ND[:, domain_C] * (rows_C / np.bincount(domain_C, rows_C)[domain_C])
        weighted_NC = own_NC * np.array([weights[cell.weight_name] for cell in self._cells])
        by_domain = self._stage.sampling_by != "domain"
        for block in [domain_C == number for number in range(len(domains))] if by_domain else [domain_C >= 0]:
            sums_N = weighted_NC[:, block].sum(1)
            scale_N = np.divide(own_NC[:, block].sum(1), sums_N, out=np.zeros_like(sums_N), where=sums_N > 0)
            weighted_NC[:, block] *= scale_N[:, None]
        floor = self._stage.sampling_floor
        shares_NC: NDArray[np.float64] = floor * own_NC + (1 - floor) * weighted_NC
        return shares_NC
