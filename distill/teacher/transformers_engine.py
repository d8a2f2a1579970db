"""The transformers teacher: prompts flow in, targets flow out, on any device that torch knows.

Slower than vLLM, and the reference that vLLM's capture is tested against: the same weights, the same capture maths.
Sequences run in padded batches of at most ``batch_tokens`` tokens, shortest together.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from distill.cache.projection import Moments, Projection
from distill.config import CacheConfig
from distill.errors import RetryError, UsageError
from distill.records import Prompt, Targets
from distill.teacher.capture import Head, Projector, Spec, Statistics, can_compile, chunk_rows, statistics
from distill.teacher.engine import FloatArray, first_trained

_WINDOW = 64  # sequences sorted by length together


class TransformersEngine:
    """A teacher loaded by ``AutoModelForCausalLM``; ``engine_options`` go to ``from_pretrained``.

    Of the options, ``device`` (default: cuda where there is one) and ``batch_tokens`` (default 4096) are taken here.
    """

    name = "transformers"
    kv_cache_dtype = "none"

    def __init__(self, config: CacheConfig, *, vocab_size: int) -> None:
        options = dict(config.engine_options)
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(options.pop("device", default))
        self._batch_tokens = int(options.pop("batch_tokens", 4096))
        self.version = str(transformers.__version__)
        try:
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                config.teacher,
                output_loading_info=True,
                revision=config.revision,
                dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
                trust_remote_code=config.trust_remote_code,
                use_safetensors=True,
                **options,
            )
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"transformers cannot load the teacher {config.teacher}: {error}") from error
        if missing := sorted([*loading["missing_keys"], *map(str, loading["mismatched_keys"])]):
            # transformers would go on with random numbers in their place.
            raise UsageError(
                f"The weights in {config.teacher} lack or misshape {len(missing)} tensors that its configuration asks "
                f"for, the first of them {missing[0]}. Download the teacher again, whole."
            )
        self._model = model.to(self._device).eval()
        self.dtype = str(model.dtype).removeprefix("torch.")
        self._spec = Spec(top_k=config.targets.top_k, temperatures=config.targets.temperatures)
        self._head = _head_of(model, vocab_size, float32=config.head_dtype == "float32")
        self._projector: Projector | None = None

    @property
    def soft_cap(self) -> float | None:
        return self._head.soft_cap

    @property
    def logit_scale(self) -> float:
        return self._head.scale

    def moments(self, prompts: Iterable[Prompt]) -> Moments:
        dim = int(self._model.config.get_text_config().hidden_size)
        count, sum_D, outer_DD = 0, np.zeros(dim), np.zeros((dim, dim))
        for _, prompt, hidden_ND in self._forward(prompts):
            kept_ND = hidden_ND[first_trained(prompt) :].double().cpu().numpy()
            count += len(kept_ND)
            sum_D += kept_ND.sum(0)
            outer_DD += kept_ND.T @ kept_ND
        return Moments(count=count, sum_D=sum_D, outer_DD=outer_DD)

    def hidden_states(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        for ordinal, _, hidden_ND in self._forward(prompts):
            yield ordinal, hidden_ND.float().cpu().numpy()

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

    def capture(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Targets]]:
        chunk = chunk_rows(self._head.num_ids, is_cuda=self._device.type == "cuda")
        for ordinal, _, hidden_ND in self._forward(prompts):
            with torch.inference_mode():
                found = statistics(self._head, hidden_ND, self._spec, chunk=chunk)
                hidden = self._projector(hidden_ND) if self._projector else {}
            yield ordinal, _to_targets(found, hidden)

    def close(self) -> None:
        del self._model, self._head

    def _forward(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Prompt, torch.Tensor]]:
        """(ordinal, prompt, final hidden states [L-1, D]) for each prompt."""
        source = enumerate(prompts)
        while window := list(islice(source, _WINDOW)):
            window.sort(key=lambda entry: entry[1].num_targets)
            while window:
                fits = max(1, self._batch_tokens // window[-1][1].num_targets)
                batch, window = window[-fits:], window[:-fits]
                yield from self._forward_batch(batch)

    def _forward_batch(self, batch: list[tuple[int, Prompt]]) -> Iterator[tuple[int, Prompt, torch.Tensor]]:
        length = batch[-1][1].num_targets
        ids_BS = torch.zeros(len(batch), length, dtype=torch.long)
        mask_BS = torch.zeros(len(batch), length, dtype=torch.long)
        for row, (_, prompt) in enumerate(batch):
            ids_BS[row, : prompt.num_targets] = torch.from_numpy(prompt.input_ids[:-1])
            mask_BS[row, : prompt.num_targets] = 1
        try:
            with torch.inference_mode():
                output = self._model.model(
                    input_ids=ids_BS.to(self._device), attention_mask=mask_BS.to(self._device), use_cache=False
                )
        except RuntimeError as error:
            raise RetryError(
                f"The teacher's forward pass failed: {error}. Committed units are kept; lower "
                "engine_options.batch_tokens if memory ran out, and run the same command again."
            ) from error
        for hidden_SD, (ordinal, prompt) in zip(output.last_hidden_state, batch, strict=True):
            yield ordinal, prompt, hidden_SD[: prompt.num_targets]


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


def _to_targets(found: Statistics, hidden: dict[int, torch.Tensor]) -> Targets:
    return Targets(
        topk_ids=found.topk_ids.cpu().numpy(),
        topk_logprobs=found.topk_logprobs.cpu().numpy(),
        log_z=found.log_z.cpu().numpy(),
        log_tail=found.log_tail.cpu().numpy(),
        hidden={bits: values.cpu().numpy() for bits, values in hidden.items()},
        entropy=found.entropy.cpu().numpy(),
    )
