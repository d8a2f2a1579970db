"""What was measured of a teacher flows in, the smallest targets that serve its students flow out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from distill.config import TargetsConfig
from distill.teacher.measure import Measured

Typical = Callable[[TargetsConfig], dict[str, float]]  # column -> bytes for a target whose beginning is new
OnDisk = Callable[[dict[str, float]], float]  # those -> bytes of all shards for each target
WITHIN = 0.03  # total variation that a choice may be behind the best one, at each temperature


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to keep a distribution. ``hidden_bytes`` 0: the tail is a bucket."""

    top_k: int
    hidden_bytes: int
    bytes_per_target: float  # of all columns
    distances: dict[float, float]  # temperature -> total variation


def choices(measured: Measured, targets: TargetsConfig, *, typical: Typical, on_disk: OnDisk) -> list[Choice]:
    """Every measured k and size of the hidden state, with its bytes: typical ones, scaled to what was measured."""
    by_choice: dict[tuple[int, int], dict[float, float]] = {}
    for item in measured.distances:
        if item.kind != "renormalised":
            by_choice.setdefault((item.top_k, item.hidden_bytes), {})[item.temperature] = item.total_variation
    found = []
    for (top_k, size), distances in by_choice.items():
        other = targets.model_copy(update={"top_k": top_k, "hidden_bytes": size})
        total = on_disk(scaled_bytes(measured, targets, other, typical=typical))
        found.append(Choice(top_k=top_k, hidden_bytes=size, bytes_per_target=total, distances=distances))
    return sorted(found, key=lambda choice: choice.bytes_per_target)


def scaled_bytes(
    measured: Measured, targets: TargetsConfig, other: TargetsConfig, *, typical: Typical
) -> dict[str, float]:
    """Column -> bytes for a target of ``other``, by what those of ``targets`` took."""
    before, wanted, seen = typical(targets), typical(other), joined_hidden(measured.bytes_per_token)
    return {name: size * (seen[name] / before[name] if name in before else 1.0) for name, size in wanted.items()}


def joined_hidden(sizes: dict[str, float]) -> dict[str, float]:
    """The same with all widths of the hidden state under the one name ``hidden``."""
    hidden = sum(size for name, size in sizes.items() if name.startswith("hidden_"))
    others = {name: size for name, size in sizes.items() if not name.startswith("hidden_")}
    return {**others, "hidden": hidden} if hidden else others


def best_choice(found: list[Choice]) -> tuple[Choice, tuple[str, ...]]:
    """The smallest that is within ``WITHIN`` of the best at every temperature, and why. ``found`` is by size."""
    temperatures = list(found[0].distances)
    best = {T: min(choice.distances[T] for choice in found) for T in temperatures}
    chosen = next(c for c in found if all(c.distances[T] <= best[T] + WITHIN for T in temperatures))
    return chosen, tuple(_reasons(found, chosen, best))


def _reasons(found: list[Choice], chosen: Choice, best: dict[float, float]) -> Iterator[str]:
    reached = ", ".join(f"{chosen.distances[T]:.3f} at T={T:g} (best {best[T]:.3f})" for T in best)
    yield (
        f"top_k {chosen.top_k} and {_tail(chosen)}: the smallest of {len(found)} choices whose total variation to the "
        f"teacher is within {WITHIN} of the best at every temperature: {reached}; "
        f"{chosen.bytes_per_target:.0f} bytes for a target"
    )
    smaller = found[: found.index(chosen)]
    if smaller:
        nearest = min(smaller, key=lambda c: max(c.distances[T] - best[T] for T in best))
        worst = max(best, key=lambda T: nearest.distances[T] - best[T])
        yield (
            f"the nearest smaller one, top_k {nearest.top_k} and {_tail(nearest)} with {nearest.bytes_per_target:.0f} "
            f"bytes, is at {nearest.distances[worst]:.3f} at T={worst:g}"
        )


def _tail(choice: Choice) -> str:
    return f"hidden_bytes {choice.hidden_bytes}" if choice.hidden_bytes else "hidden_bytes 0 (tail: bucket)"
