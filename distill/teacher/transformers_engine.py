"""The transformers teacher: prompts flow in, targets flow out, on any device that torch knows.

Slower than vLLM, and the reference that vLLM's capture is tested against: the same weights, the same capture maths.
Sequences run in padded batches of at most ``batch_tokens`` tokens, shortest together.
"""

import gc
from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import islice
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError

from distill.cache.projection import Moments, Projection
from distill.config import CacheConfig
from distill.errors import UsageError
from distill.records import Prompt, Question, Targets
from distill.teacher import sampled
from distill.teacher.capture import Head, Projector, Spec, can_compile, statistics
from distill.teacher.chunks import Chunks
from distill.teacher.engine import Answer, FloatArray, Writing, first_trained, question_id, seed_of, targets_of
from distill.teacher.guard import Guard
from distill.teacher.heads import kept_heads
from distill.teacher.inner import InnerProjector, LayerInputs

_NOTHING = np.zeros(0, np.int32)
_Seen = tuple[int, Prompt, torch.Tensor, dict[int, torch.Tensor]]

_WINDOW = 64  # sequences sorted by length together


class TransformersEngine:
    """A teacher loaded by ``AutoModelForCausalLM``; ``engine_options`` go to ``from_pretrained``.

    Of the options, ``device`` (default: cuda where there is one) and ``batch_tokens`` (default 4096) are taken here.
    """

    batch_option = "batch_tokens"

    def __init__(self, config: CacheConfig, *, vocab_size: int) -> None:
        options = dict(config.engine_options)
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(options.pop("device", default))
        self.batch_tokens = int(options.pop("batch_tokens", 4096))
        try:
            transformers.utils.logging.disable_progress_bar()  # its bar ends up in log files
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                config.teacher,
                output_loading_info=True,
                revision=config.revision,
                dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
                trust_remote_code=config.trust_remote_code,
                use_safetensors=True,
                **options,
            )
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise UsageError(
                f"transformers cannot load the teacher {config.teacher}: {error}. Correct engine_options, or download "
                "the teacher again, whole."
            ) from error
        if missing := sorted([*loading["missing_keys"], *map(str, loading["mismatched_keys"])]):
            # transformers would go on with random numbers in their place.
            raise UsageError(
                f"The weights in {config.teacher} lack or misshape {len(missing)} tensors that its configuration asks "
                f"for, the first of them {missing[0]}. Download the teacher again, whole."
            )
        text_model = model.config.get_text_config()
        if getattr(text_model, "attn_logit_softcapping", None) and "attn_implementation" not in options:
            model.set_attn_implementation("eager")  # the others leave the cap out without a word
        self._model = model.to(self._device).eval()
        targets = config.targets
        self._spec = Spec(top_k=targets.top_k, temperatures=targets.temperatures, num_samples=targets.num_samples)
        self._head = _head_of(model, vocab_size, float32=config.head_dtype == "float32")
        _check_head(self._model, self._head, self._device)
        self._chunks = Chunks(vocab_size, self._device)
        self._chunks.measure()
        self._projector: Projector | None = None
        self._inner_projector: InnerProjector | None = None
        heads = kept_heads(text_model, targets)
        self._inputs = LayerInputs(model, layers=targets.layers, heads=heads)
        advice = "If memory ran out, lower engine_options.batch_tokens."
        self._guard = Guard("transformers", failures=RuntimeError, advice=advice, limit_s=config.stall_seconds)
        _beat_at_layers(model, self._guard)

    @property
    def soft_cap(self) -> float | None:
        return self._head.soft_cap

    @property
    def logit_scale(self) -> float:
        return self._head.scale

    def moments(self, prompts: Iterable[Prompt]) -> Moments:
        dim = int(self._model.config.get_text_config().hidden_size)
        count, sum_D, outer_DD = 0, np.zeros(dim), np.zeros((dim, dim))
        for _, prompt, hidden_ND, _ in self._forward(prompts):
            kept_ND = hidden_ND[first_trained(prompt) :].double().cpu().numpy()
            count += len(kept_ND)
            sum_D += kept_ND.sum(0)
            outer_DD += kept_ND.T @ kept_ND
        return Moments(count=count, sum_D=sum_D, outer_DD=outer_DD)

    def hidden_states(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        for ordinal, _, hidden_ND, _ in self._forward(prompts):
            yield ordinal, hidden_ND.float().cpu().numpy()

    def inner_states(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, dict[int, NDArray[np.float32]]]]:
        for ordinal, _, _, inputs in self._forward(prompts):
            yield ordinal, {layer: states_ND.float().cpu().numpy() for layer, states_ND in inputs.items()}

    def head_gram(self) -> NDArray[np.float64]:
        gram_DD, sum_D = self._head.gram()
        centred: NDArray[np.float64] = (gram_DD - torch.outer(sum_D, sum_D) / self._head.num_ids).cpu().numpy()
        return centred

    def head_times(self, matrix_DR: FloatArray) -> NDArray[np.float32]:
        matrix = torch.from_numpy(np.ascontiguousarray(matrix_DR, dtype=np.float32)).to(self._device)
        with torch.inference_mode():
            product: NDArray[np.float32] = self._head.times(matrix).cpu().numpy()
        return product

    def head_bias(self) -> NDArray[np.float32]:
        if self._head.bias is None:
            return np.zeros(self._head.num_ids, np.float32)
        bias: NDArray[np.float32] = self._head.bias.detach().cpu().numpy()
        return bias

    def head_logprobs(self, hidden_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            hidden = torch.from_numpy(hidden_ND).to(self._device, self._model.dtype)
            logprobs: NDArray[np.float32] = self._head.logits(hidden).log_softmax(1).cpu().numpy()
        return logprobs

    def install(self, projection: Projection | None) -> None:
        self._projector = Projector(projection, self._device) if projection else None
        self._inner_projector = InnerProjector(projection, self._device) if projection else None

    def capture(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Targets]]:
        for ordinal, prompt, hidden_ND, inputs in self._forward(prompts):
            yield ordinal, self._targets(hidden_ND, inputs, seed=seed_of(prompt.sequence_id))

    def answer(self, items: Iterable[Prompt | Question], writing: Writing) -> Iterator[Answer]:
        for ordinal, item in enumerate(items):
            if isinstance(item, Prompt):
                yield from ((ordinal, _NOTHING, targets) for _, targets in self.capture([item]))
            else:
                answer, hidden_ND = self._write(item, writing)
                inputs = self._inputs.of_row(0, len(hidden_ND))
                yield ordinal, answer, self._targets(hidden_ND, inputs, seed=seed_of(question_id(item)))

    def _targets(self, hidden_ND: torch.Tensor, inputs: dict[int, torch.Tensor], *, seed: int) -> Targets:
        with self._guard, torch.inference_mode():
            keys_N = None
            if self._spec.num_samples:
                keys_N = torch.from_numpy(sampled.keys(seed, 0, len(hidden_ND))).to(self._device)
            found = statistics(self._head, hidden_ND, self._spec, keys_N=keys_N, chunks=self._chunks)
            tensors = {field.name: getattr(found, field.name) for field in fields(found)}
            if self._projector:
                tensors |= {f"hidden_{bits}": values for bits, values in self._projector(hidden_ND).items()}
            if self._inner_projector:
                tensors |= self._inner_projector(inputs) | self._inputs.head_columns(inputs)
        return targets_of({name: values.cpu().numpy() for name, values in tensors.items()})

    def _write(self, question: Question, writing: Writing) -> tuple[NDArray[np.int32], torch.Tensor]:
        """An answer [G] and the final hidden states of question and answer but its last token: [P + G - 1, D]."""
        draws = {"do_sample": True, "temperature": writing.temperature, "top_p": writing.top_p, "top_k": 0}
        # A configuration of its own, since a teacher's may penalise what it repeats or cut its draws to a few ids.
        options = transformers.GenerationConfig(
            max_new_tokens=writing.most(question),
            eos_token_id=list(writing.stop_ids) or None,
            pad_token_id=writing.stop_ids[0] if writing.stop_ids else 0,
            suppress_tokens=list(range(self._head.num_ids, self._model.get_output_embeddings().weight.shape[0]))
            or None,
            output_hidden_states=True,
            return_dict_in_generate=True,
            **(draws if writing.temperature else {"do_sample": False}),
        )
        ids_1P = torch.from_numpy(question.input_ids.astype(np.int64)).to(self._device)[None]
        self._inputs.clear()
        with self._guard, torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(writing.seed_for(question))
            written = self._model.generate(ids_1P, attention_mask=torch.ones_like(ids_1P), generation_config=options)
        answer: NDArray[np.int32] = written.sequences[0, ids_1P.shape[1] :].cpu().numpy().astype(np.int32)
        return answer, torch.cat([step[-1][0] for step in written.hidden_states])

    def close(self) -> None:
        self._guard.close()
        del self._model, self._head, self._inputs  # each of them holds weights
        gc.collect()  # a model and its hooks hold each other, and the next one needs the room

    def _forward(self, prompts: Iterable[Prompt]) -> Iterator[_Seen]:
        """(ordinal, prompt, final hidden states [L-1, D], layer -> its inputs [L-1, D]) for each prompt."""
        source = enumerate(prompts)
        while window := list(islice(source, _WINDOW)):
            window.sort(key=lambda entry: entry[1].num_targets)
            while window:
                fits = max(1, self.batch_tokens // window[-1][1].num_targets)
                batch, window = window[-fits:], window[:-fits]
                yield from self._forward_batch(batch)

    def _forward_batch(self, batch: list[tuple[int, Prompt]]) -> Iterator[_Seen]:
        length = batch[-1][1].num_targets
        ids_BS = torch.zeros(len(batch), length, dtype=torch.long)
        mask_BS = torch.zeros(len(batch), length, dtype=torch.long)
        for row, (_, prompt) in enumerate(batch):
            ids_BS[row, : prompt.num_targets] = torch.from_numpy(prompt.input_ids[:-1])
            mask_BS[row, : prompt.num_targets] = 1
        self._inputs.clear()
        with self._guard, torch.inference_mode():
            output = self._model.base_model(
                input_ids=ids_BS.to(self._device), attention_mask=mask_BS.to(self._device), use_cache=False
            )
        for row, (hidden_SD, (ordinal, prompt)) in enumerate(zip(output.last_hidden_state, batch, strict=True)):
            num = prompt.num_targets
            yield ordinal, prompt, hidden_SD[:num], self._inputs.of_row(row, num)


def _beat_at_layers(model: Any, guard: Guard) -> None:
    """Each layer is a sign of life: all of a large model may take minutes for a long sequence, or for an answer."""
    for layers in model.modules():
        if isinstance(layers, torch.nn.ModuleList):
            for layer in layers:
                layer.register_forward_pre_hook(lambda *_: guard.beat())


def _head_of(model: Any, vocab_size: int, *, float32: bool) -> Head:
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    return Head(
        layer.weight.detach(),
        num_ids=vocab_size,
        bias=None if layer.bias is None else layer.bias.detach(),
        soft_cap=getattr(config, "final_logit_softcapping", None),
        scale=float(getattr(config, "logit_scale", 0) or 1 / float(getattr(config, "logits_scaling", 0) or 1)),
        float32=float32,
        compiled=can_compile(layer.weight.device),
    )


@torch.inference_mode()
def _check_head(model: Any, head: Head, device: torch.device) -> None:
    """Compares our logits with the model's own on a few tokens: some models do more to them than ``_head_of`` knows."""
    ids_1S = torch.arange(8, device=device)[None] % head.num_ids
    own_SV = model(input_ids=ids_1S, use_cache=False).logits[0, :, : head.num_ids].float()
    states_SD = model.base_model(input_ids=ids_1S, use_cache=False).last_hidden_state[0]
    error = float((head.logits(states_SD).float() - own_SV).abs().max())
    if not error <= 0.02 * float(own_SV.abs().max()) + 1e-4:
        raise UsageError(
            f"{type(model).__name__} does something to its logits that distill does not know of: they differ by up to "
            f"{error:.3g} from head times hidden state. Use --engine vllm, or another teacher."
        )
