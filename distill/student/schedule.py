"""A stage and how far it is flow in, the temperature and the weights of its losses at that time flow out."""

import numpy as np

from distill.config import StageConfig, TemperatureSteps, WeightsConfig
from distill.student.mixture import share_at


def temperature_at(stage: StageConfig, progress: float) -> float:
    """The temperature at a progress in [0, 1): the last one whose beginning is not after it."""
    steps = stage.temperature_steps
    return stage.temperature if steps is None else steps.values[sum(start <= progress for start in starts_of(steps))]


def starts_of(steps: TemperatureSteps) -> tuple[float, ...]:
    """The progress at which the second temperature begins, the third, and so on: equal parts unless ``at`` says."""
    num = len(steps.values)
    return tuple(part / num for part in range(1, num)) if steps.at is None else steps.at


def weights_at(stage: StageConfig, progress: float) -> WeightsConfig:
    """The weights at a progress in [0, 1), each by its own schedule where it has one."""
    scheduled = {name: float(share_at(item, np.array([progress]))[0]) for name, item in stage.weight_schedules.items()}
    return stage.weights.model_copy(update=scheduled)
