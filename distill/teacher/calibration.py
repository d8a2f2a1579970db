"""The fitted projection: randomly drawn prompts and a loaded teacher flow in, a projection and its proof flow out.

Before the first unit the teacher reads a sample of the training rows. Their final hidden states decide which
directions the projection keeps (``distill.cache.projection``). A few positions of *other* rows keep the teacher's
whole distribution, so that anybody can measure later how close the rebuilt targets come to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from distill.cache.projection import Projection, fit_projection
from distill.errors import DataError
from distill.records import Prompt, Targets
from distill.teacher.engine import Engine

# Positions whose whole distribution is kept (float16), and the most that one sequence gives.
NUM_FIDELITY = 128
_PER_SEQUENCE = 8
TOKENS_PER_DIMENSION = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Drawn training sequences: those that prove the projection and those that fit it share nothing."""

    fidelity: Sequence[Prompt]
    fit: Sequence[Prompt]


def split_sample(prompts: Sequence[Prompt]) -> Sample:
    """Gives every eighth sequence, up to what ``NUM_FIDELITY`` positions need, to the proof and the rest to the fit.

    Raises DataError when fewer than two sequences were drawn.
    """
    if len(prompts) < 2:
        raise DataError(
            f"The projection is fitted to the training rows, and only {len(prompts)} of them can be used. Give more "
            "data, or keep no hidden states with --hidden-bytes 0."
        )
    num = min(NUM_FIDELITY // _PER_SEQUENCE, max(1, len(prompts) // 8))
    return Sample(fidelity=prompts[:num], fit=prompts[num:])


def fit(engine: Engine, prompts: Sequence[Prompt], *, hidden_bytes: int) -> Projection:
    """Fits the projection to the trained positions of ``prompts`` with ``hidden_bytes`` bytes for each position."""
    fitted = fit_projection(engine.moments(prompts), gram_DD=engine.head_gram(), hidden_bytes=hidden_bytes)
    # Logits are B c + b. A softmax does not see a constant, but a soft cap does, so there the mean row stays in.
    basis_VR = engine.head_times(fitted.up_DR)
    bias_V = engine.head_times(fitted.mean_D[:, None])[:, 0] + engine.head_bias()
    if engine.soft_cap is None:
        basis_VR -= basis_VR.mean(axis=0)
        bias_V -= bias_V.mean()
    return Projection(
        mean_D=fitted.mean_D.astype(np.float32),
        down_RD=fitted.down_RD.astype(np.float32),
        basis_VR=basis_VR.astype(np.float16),
        bias_V=bias_V.astype(np.float32),
        variance_R=fitted.variance_R.astype(np.float32),
        widths=fitted.widths,
        logit_scale=engine.logit_scale,
        soft_cap=engine.soft_cap,
        explained=fitted.explained,
    )


def fidelity(engine: Engine, prompts: Sequence[Prompt], *, seed: int) -> dict[str, NDArray[np.generic]]:
    """What ``fidelity.safetensors`` holds: at random trained positions, targets beside the whole distribution.

    ``logprobs`` [N, V] float16 at T=1, and the targets of the same positions by the names of ``Targets``, hidden
    coordinates as ``hidden_<bits>``.
    """
    random = np.random.default_rng(seed)
    captured = dict(engine.capture(prompts))
    parts: list[dict[str, NDArray[np.generic]]] = []
    for ordinal, hidden_ND in sorted(engine.hidden_states(prompts)):
        trained = np.flatnonzero(prompts[ordinal].loss_mask)
        picked = random.choice(trained, size=min(_PER_SEQUENCE, len(trained)), replace=False)
        part = _at(captured[ordinal], picked)
        part["logprobs"] = engine.head_logprobs(hidden_ND[picked]).astype(np.float16)
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _at(targets: Targets, positions: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
    arrays = {field.name: getattr(targets, field.name) for field in fields(Targets) if field.name != "hidden"}
    arrays |= {f"hidden_{bits}": values for bits, values in targets.hidden.items()}
    return {name: values[positions] for name, values in arrays.items()}
