"""The fitted projection: randomly drawn prompts and a loaded teacher flow in, a projection and its proof flow out.

Before the first unit the teacher reads a sample of the training rows. Their final hidden states decide which
directions the projection keeps (``distill.cache.projection``). A few positions of *other* rows keep the teacher's
whole distribution, so that anybody can measure later how close the rebuilt targets come to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.cache.inner import InnerProjection, fit_inner, orthonormal
from distill.cache.projection import Projection, fit_projection
from distill.errors import DataError
from distill.records import Prompt, Targets
from distill.teacher.engine import Engine, first_trained

# Positions whose whole distribution is kept (float16), and the most that one sequence gives.
NUM_FIDELITY = 128
_PER_SEQUENCE = 8
TOKENS_PER_DIMENSION = 16
LAYER_TOKENS = 16_384  # that the quantisers of inner layers look at: their ranges need no more


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
            "data (`distill plan` with the same options says why rows are rejected), or keep no hidden states with "
            "--hidden-bytes 0."
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


def fit_layers(
    engine: Engine, prompts: Sequence[Prompt], *, layers: Sequence[int], layer_bytes: int
) -> dict[int, InnerProjection]:
    """Layer -> its projection, with the quantiser that the trained positions of ``prompts`` but the first ask for."""
    if not layers:
        return {}
    few, num = [], 0
    for prompt in prompts:
        if num < LAYER_TOKENS and prompt.num_targets > 1:
            few.append(prompt)
            num += prompt.num_targets - max(1, first_trained(prompt))
    if not few:
        raise DataError(
            "Inner layers are calibrated on sequences of three tokens or more, and none was drawn. Give more data, or "
            "keep no inner layers and no heads."
        )
    downs: dict[int, NDArray[np.float32]] = {}
    coords: dict[int, list[NDArray[np.float32]]] = {layer: [] for layer in sorted(layers)}
    for ordinal, states in engine.inner_states(few):
        start = max(1, first_trained(few[ordinal]))
        for layer, parts in coords.items():
            states_ND = states[layer]
            down_BD = downs.setdefault(layer, orthonormal(layer, dim=states_ND.shape[1], num=layer_bytes))
            parts.append(states_ND[start:] @ down_BD.T)
    return {layer: fit_inner(downs[layer], np.concatenate(parts)) for layer, parts in coords.items()}


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
    names = ("topk_ids", "topk_logprobs", "log_z", "log_tail", "entropy")
    arrays = {name: getattr(targets, name) for name in names}
    arrays |= {f"hidden_{bits}": values for bits, values in targets.hidden.items()}
    return {name: values[positions] for name, values in arrays.items()}
