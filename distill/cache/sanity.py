"""One row flows in, the reason why it must not be stored flows out, or None.

Nothing that is NaN, infinite, unsorted, out of range or inconsistent reaches a shard: such a row becomes a reject.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.cache.codec import ROUNDING, sampled_starts
from distill.cache.plan import Identity
from distill.cache.schema import Layout
from distill.records import Prompt, SequenceTargets, Targets

_ABOVE_ZERO = 1e-3  # a log-probability may exceed 0 by rounding
_MASS = 1e-2  # how far the masses of top-k and tail may be from 1 together


def problem(row: SequenceTargets, *, identity: Identity, layout: Layout) -> str | None:
    """Why a row must not be stored, in words for a person, or None when it is sane."""
    return (
        _shape_problem(row, layout)
        or _prompt_problem(row.prompt, identity)
        or next((reason for wrong, reason in _value_checks(row.targets, identity) if wrong), None)
        or _mass_problem(row.targets, identity.temperatures)
    )


def _shape_problem(row: SequenceTargets, layout: Layout) -> str | None:
    num, targets = row.prompt.num_targets, row.targets
    if set(targets.hidden) != {bits for bits, _ in layout.widths}:
        return f"hidden states of {sorted(targets.hidden)} bits, not of {sorted(bits for bits, _ in layout.widths)}"
    if set(targets.layers) != {name for name, _ in layout.layer_columns}:
        return f"inner layers {sorted(targets.layers)}, not {sorted(name for name, _ in layout.layer_columns)}"
    if (targets.sampled_counts is not None) != bool(layout.num_samples):
        return f"{'no' if layout.num_samples else 'unasked for'} sampled ids"
    shapes: list[tuple[str, NDArray[Any], tuple[int, ...]]] = [
        ("loss_mask", row.prompt.loss_mask, (num,)),
        ("topk_ids", targets.topk_ids, (num, layout.top_k)),
        ("topk_logprobs", targets.topk_logprobs, (num, layout.top_k)),
        ("log_z", targets.log_z, (num, len(layout.temperatures))),
        ("log_tail", targets.log_tail, (num, len(layout.temperatures))),
        ("entropy", targets.entropy, (num,)),
        *((f"hidden_{bits}", targets.hidden[bits], (num, count)) for bits, count in layout.widths),
        *((name, targets.layers[name], (num, count)) for name, count in layout.layer_columns),
    ]
    return next(
        (f"{name} of shape {array.shape}, not {shape}" for name, array, shape in shapes if array.shape != shape), None
    )


def _prompt_problem(prompt: Prompt, identity: Identity) -> str | None:
    if not 2 <= len(prompt.input_ids) <= identity.max_length:
        return f"{len(prompt.input_ids)} tokens, not 2 to {identity.max_length}"
    if prompt.input_ids.min() < 0 or prompt.input_ids.max() >= identity.vocab_size:
        return f"input_ids outside the vocabulary of {identity.vocab_size}"
    try:
        "".join([prompt.prompt, prompt.response, prompt.source, *prompt.metadata, *prompt.metadata.values()]).encode()
    except UnicodeEncodeError:
        return "text that is not valid Unicode"
    return None


def _value_checks(targets: Targets, identity: Identity) -> Iterator[tuple[bool, str]]:
    for name in ROUNDING:
        yield not np.isfinite(getattr(targets, name)).all(), f"NaN or infinity in {name}"
    ids, logprobs = targets.topk_ids, targets.topk_logprobs
    yield ids.min() < 0 or ids.max() >= identity.vocab_size, f"topk_ids outside the vocabulary of {identity.vocab_size}"
    yield bool((logprobs[:, 1:] > logprobs[:, :-1]).any()), "topk_logprobs that are not sorted"
    yield logprobs[:, 0].max() > _ABOVE_ZERO, "topk_logprobs above 0"
    yield targets.log_tail.max() > _ABOVE_ZERO, "log_tail above 0"
    yield targets.entropy.min() < -_ABOVE_ZERO, "entropy below 0"
    for bits, values in targets.hidden.items():
        half = 2 ** (bits - 1)
        yield values.min() < -half or values.max() >= half, f"hidden_{bits} outside {bits} bits"
    for name, inner in targets.layers.items():
        yield not np.isfinite(inner).all(), f"NaN or infinity in {name}"
    yield from _sampled_checks(targets, identity)
    sorted_ids = np.sort(ids, axis=1)
    yield bool((sorted_ids[:, 1:] == sorted_ids[:, :-1]).any()), "the same id twice in topk_ids"


def _sampled_checks(targets: Targets, identity: Identity) -> Iterator[tuple[bool, str]]:
    ids, counts = targets.sampled_ids, targets.sampled_counts
    if ids is None or counts is None:
        return
    yield len(ids) != len(counts), f"{len(ids)} sampled_ids with {len(counts)} counts"
    starts = sampled_starts(counts, identity.num_samples)
    yield len(starts) != len(targets.topk_ids), f"sampled_counts that are not {identity.num_samples} at each position"
    outside = bool(len(ids)) and (ids.min() < 0 or ids.max() >= identity.vocab_size)
    yield bool(outside), f"sampled_ids outside the vocabulary of {identity.vocab_size}"


def _mass_problem(targets: Targets, temperatures: tuple[float, ...]) -> str | None:
    """At every temperature top-k and tail make up the whole: a stale or shifted array does not fit the others."""
    for index, temperature in enumerate(temperatures):
        cached = np.exp(targets.topk_logprobs * np.float32(1 / temperature) - targets.log_z[:, index, None]).sum(axis=1)
        error = float(np.abs(cached + np.exp(targets.log_tail[:, index]) - 1).max())
        if not error <= _MASS:
            return f"top-k and tail that sum to 1 ± {error:.3g} at temperature {temperature:g}"
    return None
