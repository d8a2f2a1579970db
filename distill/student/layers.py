"""A student and some cached rows flow in; the layers that the teacher's answers can least do without flow out.

Greedy: the KL to the cached targets is measured with each remaining layer left out, the layer that hurts least goes for
good, and so on until few enough are left. Layers below the one left out compute what they computed before, so their
output is kept, and a try costs only the layers above it. ``B`` sequences, ``S`` padded length, ``D`` hidden size.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.cache.reader import CacheReader
from distill.config import TrainConfig
from distill.errors import DataError
from distill.student.batch import DistillBatch, Example, collate, example_of, micro_batches
from distill.student.losses.fused import HeadTargets, fused_head_losses
from distill.student.model import Student, causal_of, load_student
from distill.student.objective import TeacherView
from distill.student.origin import origin_of
from distill.student.precision import resolve_precision
from distill.student.shrink import layers_of


def chosen_layers(config: TrainConfig, reader: CacheReader) -> list[int]:
    """The numbers of ``config.student_layers`` layers of ``config.student``, rising, chosen by loss.

    The loss is KL(teacher ‖ student) at stage 1's temperature, over ``config.layer_positions`` trained positions of
    train rows, the same number of each domain of the cache. Raises UsageError when no list of layers is found,
    DataError when the cache has no train rows, IdentityError when it lacks the temperature.
    """
    assert config.student_layers is not None, "asked for where layers are left out"
    temperature = reader.temperatures[reader.temperature_index(config.stage(1).temperature)]
    examples = _examples(reader, config)
    precision = resolve_precision(config.device, config.precision)
    origin = origin_of(config.student)
    student = load_student(config, origin, precision=precision, vocab_size=reader.identity.vocab_size, training=False)
    view = TeacherView.of(reader, precision)
    batches = [
        collate(batch, view.projection).to(precision.device)
        for batch in micro_batches(examples, config.micro_batch_tokens)
    ]
    loss = _Loss(student, view, temperature=temperature, chunk=config.head_chunk)
    return least_missed(student, batches, loss, num=config.student_layers)


def least_missed(
    student: Student, batches: Sequence[DistillBatch], loss: Callable[[DistillBatch], float], *, num: int
) -> list[int]:
    """The ``num`` layers that are left when the one whose absence raises the summed ``loss`` least goes, by turns."""
    layers = _Layers(layers_of(causal_of(student.model), num))
    with torch.no_grad():
        while len(layers.kept) > num:
            harm = dict.fromkeys(layers.kept, 0.0)
            for batch in batches:
                inputs = layers.inputs(partial(loss, batch))
                for layer in layers.kept:
                    with layers.without(layer, inputs[layer]):
                        harm[layer] += loss(batch)
            layers.kept.remove(min(layers.kept, key=lambda layer: harm[layer]))
    return layers.kept


class _Layers:
    """The layers of a decoder, of which those in ``kept`` are left; the others are passed over in every run."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.kept = list(range(len(layers)))
        self._layers = layers
        self._in_tuple = False  # whether this kind of layer gives its states in a tuple

    def inputs(self, run: Callable[[], object]) -> dict[int, Tensor]:
        """What flows into each kept layer in a run, [B, S, D]."""
        inputs: dict[int, Tensor] = {}

        def look(number: int) -> Callable[..., None]:
            def hook(_layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
                inputs[number] = given[0] if given else named["hidden_states"]
                self._in_tuple = isinstance(output, tuple)

            return hook

        handles = [self._layers[n].register_forward_hook(look(n), with_kwargs=True) for n in self.kept]
        try:
            with self._passed_over(dict.fromkeys(self._gone)):
                run()
        finally:
            for handle in handles:
                handle.remove()
        return inputs

    def without(self, layer: int, states_BSD: Tensor) -> contextlib.AbstractContextManager[None]:
        """Meanwhile ``layer`` is passed over as well, and those below it: it gives out ``states_BSD``, its input."""
        return self._passed_over({**dict.fromkeys([*self._gone, *range(layer)]), layer: states_BSD})

    @property
    def _gone(self) -> list[int]:
        return [number for number in range(len(self._layers)) if number not in self.kept]

    @contextlib.contextmanager
    def _passed_over(self, stubs: Mapping[int, Tensor | None]) -> Iterator[None]:
        """Meanwhile each named layer gives out the tensor, or its own input where that is None."""

        def stub(value: Tensor | None) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
                given = hidden_states if value is None else value
                return (given,) if self._in_tuple else given

            return forward

        for number, value in stubs.items():
            self._layers[number].forward = stub(value)
        try:
            yield
        finally:
            for number in stubs:
                del self._layers[number].forward


class _Loss:
    """KL summed over the trained tokens of a batch, in nats, times T²."""

    def __init__(self, student: Student, view: TeacherView, *, temperature: float, chunk: int) -> None:
        self._student, self._view, self._temperature, self._chunk = student, view, temperature, chunk

    def __call__(self, batch: DistillBatch) -> float:
        targets = HeadTargets(
            teacher=batch.teacher(self._temperature, self._view.temperatures.index(self._temperature)),
            labels=batch.labels,
            coords=batch.coords,
            tail=None if batch.levels is None else self._view.tail,
        )
        hidden_ND = self._student.hidden(batch)
        head = self._student.head()
        losses = fused_head_losses(hidden_ND, head, targets, kl_weight=1.0, ce_weight=0.0, chunk=self._chunk)
        return float(losses.kl)


def _examples(reader: CacheReader, config: TrainConfig) -> list[Example]:
    """Train rows of all domains, until the positions are together."""
    wanted = -(-config.layer_positions // len(reader.domains))
    examples: list[Example] = []
    for domain in reader.domains:
        found = 0
        for example in _rows(reader, domain, config.max_length):
            examples.append(example)
            found += example.num_trained
            if found >= wanted:
                break
    if not examples:
        raise DataError(
            f"{reader.where} has no train row with a trained token, so nothing tells which layers the student needs. "
            "Add data to it, or set layer_choice to even."
        )
    return examples


def _rows(reader: CacheReader, domain: str, max_length: int) -> Iterator[Example]:
    for commit in reader.units(domain):
        if commit.num_rows.train:
            examples = (example_of(row, max_length) for row in reader.sequences(commit, "train"))
            yield from (example for example in examples if example.num_trained)
