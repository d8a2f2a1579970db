"""A vLLM worker that keeps the teacher's statistics: scheduled tokens flow in, finished sequences flow out by RPC.

vLLM instantiates the class named by ``worker_cls`` in every worker process, so this module is imported there and
nowhere else. After each forward pass it reads the final hidden states of the step's tokens, which vLLM would throw
away but for the last one of each request, and runs the LM head over them in chunks.

The private names of vLLM that this relies on are listed, and checked at the start, in ``distill.teacher.vllm_names``.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save
from vllm.distributed import get_pp_group, get_tp_group, tensor_model_parallel_all_gather
from vllm.platforms import current_platform

from distill.cache.projection import Projection
from distill.config import TargetsConfig
from distill.teacher import sampled
from distill.teacher.capture import (
    LocalStatistics,
    Projector,
    Spec,
    Statistics,
    local_in_chunks,
    merge,
)
from distill.teacher.chunks import Chunks
from distill.teacher.vllm_head import find_head, forbid_padding
from distill.teacher.vllm_inner import InnerLayers

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as BaseWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as BaseWorker


# Positions that are captured together: a step that writes answers has one for each, too few to be worth a pass.
_AT_ONCE = 64


@dataclass(slots=True, kw_only=True)
class _Request:
    """One sequence on its way: its key, how many positions it will have, and the pieces captured so far.

    Of an answer that is being written (``is_open``) ``num_positions`` is the most it can have, until the engine says
    that it has ended.
    """

    key: int
    seed: int
    num_positions: int
    first_trained: int
    is_open: bool
    done: int
    pieces: list["_Piece"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Positions ``start:stop`` of a step's host tensors; valid once ``copied`` has happened."""

    tensors: dict[str, torch.Tensor]
    copied: torch.cuda.Event | None
    start: int
    stop: int


# Final hidden states of a step [N, D], inputs of inner layers [N, D], and whose positions they are.
_Step = tuple[torch.Tensor, dict[int, torch.Tensor], list[tuple[_Request, int, int]]]


class CaptureWorker(BaseWorker):  # type: ignore[misc]
    """The platform's worker plus capture. Everything it adds is named ``capture_…`` or ``_capture_…``."""

    def load_model(self, **options: Any) -> None:
        """Loads the model, then finds its LM head."""
        super().load_model(**options)
        settings = self.vllm_config.additional_config["distill"]
        self._capture_inner = InnerLayers(
            self.model_runner,
            targets=TargetsConfig.model_validate(settings["targets"]),
            eager=self.model_config.enforce_eager,
        )
        self._capture_spec = Spec(
            top_k=settings["top_k"],
            temperatures=tuple(settings["temperatures"]),
            num_samples=settings["num_samples"],
        )
        self._capture_requests: dict[str, _Request] = {}
        self._capture_ready: list[_Request] = []
        self._capture_steps: list[_Step] = []  # whose positions are not captured yet
        self._capture_mode = "off"
        self._capture_projector: Projector | None = None
        self._capture_moments: list[torch.Tensor] = []
        self._capture_active = get_pp_group().is_last_rank
        if self._capture_active:
            model = self.model_runner.get_model()
            self._capture_head = find_head(model, settings["vocab_size"], float32=settings["float32_head"])
            forbid_padding(model, settings["vocab_size"])
            self._capture_chunks = Chunks(self._capture_head.num_ids, self.device)

    @property
    def _capture_answers(self) -> bool:
        """One rank answers for all: the first of the tensor-parallel group in the last pipeline stage."""
        return bool(self._capture_active and get_tp_group().rank_in_group == 0)

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any) -> Any:
        """One step of the engine, then capture of its positions."""
        output = super().execute_model(scheduler_output)
        if self._capture_active and self._capture_mode != "off":
            self._capture_step(scheduler_output)
        return output

    def _capture_step(self, scheduled: Any) -> None:
        starts = self._capture_register(scheduled)
        state = self.model_runner.execute_model_state
        if state is None or not self._capture_requests:
            return
        # The model runner reorders the batch, so rows follow its order, never the scheduler's.
        batch = getattr(state, "input_batch", None) or self.model_runner.input_batch
        rows: list[tuple[_Request, int, int]] = []
        keep: list[np.ndarray] = []
        offset = 0
        for request_id in batch.req_ids:
            count = scheduled.num_scheduled_tokens.get(request_id, 0)
            request = self._capture_requests.get(request_id)
            if request is not None and count:
                start, stop = starts[request_id], min(starts[request_id] + count, request.num_positions)
                if start > request.done:
                    raise RuntimeError(
                        f"capture gap in sequence {request.key}: {request.done} positions are captured and the step "
                        f"starts at {start}; a prefix cache or KV connector supplied the rest"
                    )
                # After a preemption vLLM computes positions again that are already captured.
                new = np.arange(offset + request.done - start, offset + stop - start)
                if len(new):
                    rows.append((request, request.done, stop))
                    keep.append(new)
            offset += count
        if rows:
            index = torch.from_numpy(np.concatenate(keep)).to(state.hidden_states.device, non_blocking=True)
            inputs = self._capture_inner.inputs(state, index)
            self._capture_steps.append((state.hidden_states.index_select(0, index), inputs, rows))
            for request, _, stop in rows:
                request.done = stop
            if sum(len(hidden_ND) for hidden_ND, _, _ in self._capture_steps) >= _AT_ONCE:
                self._capture_flush()

    def _capture_flush(self) -> None:
        """Captures what the steps since the last time left. Every rank does so after the same step."""
        if self._capture_steps:
            hidden, inputs, rows = zip(*self._capture_steps, strict=True)
            self._capture_steps.clear()
            self._capture_rows(
                torch.cat(hidden),
                {layer: torch.cat([states[layer] for states in inputs]) for layer in inputs[0]},
                [row for step in rows for row in step],
            )

    def _capture_register(self, scheduled: Any) -> dict[str, int]:
        """Notes new requests; returns each scheduled request's first position in this step."""
        starts: dict[str, int] = {}
        for new in scheduled.scheduled_new_reqs:
            starts[new.req_id] = new.num_computed_tokens
            extra = (new.sampling_params.extra_args or {}).get("distill") if new.sampling_params else None
            if extra is not None and new.req_id not in self._capture_requests:
                self._capture_requests[new.req_id] = _Request(
                    key=extra["key"],
                    seed=extra["seed"],
                    num_positions=extra["num_positions"],
                    first_trained=extra["first_trained"],
                    is_open=extra["is_open"],
                    done=0,
                    pieces=[],
                )
        cached = scheduled.scheduled_cached_reqs
        starts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        return starts

    def _capture_rows(
        self, hidden_ND: torch.Tensor, inputs: dict[int, torch.Tensor], rows: list[tuple[_Request, int, int]]
    ) -> None:
        if self._capture_mode == "moments":
            tensors = {"trained": self._capture_add_moments(hidden_ND, rows)}
        elif self._capture_mode == "hidden":
            tensors = {"hidden": hidden_ND.float()}
        elif self._capture_mode == "inner":
            tensors = {str(layer): states_ND.float() for layer, states_ND in inputs.items()}
        else:
            tensors = self._capture_targets(hidden_ND, rows) | self._capture_inner.columns(inputs)
        host, copied = _to_host(tensors) if self._capture_answers else ({}, None)
        offset = 0
        for request, start, stop in rows:
            request.pieces.append(_Piece(tensors=host, copied=copied, start=offset, stop=offset + stop - start))
            offset += stop - start
            if stop == request.num_positions and not request.is_open:
                self._capture_finish(request)

    def _capture_finish(self, request: _Request) -> None:
        for request_id in [key for key, value in self._capture_requests.items() if value is request]:
            del self._capture_requests[request_id]
        if self._capture_answers:
            self._capture_ready.append(request)

    def _capture_targets(
        self, hidden_ND: torch.Tensor, rows: list[tuple[_Request, int, int]]
    ) -> dict[str, torch.Tensor]:
        spec, rank = self._capture_spec, get_tp_group().rank_in_group
        keys_N = None
        if spec.num_samples:
            keys = [sampled.keys(request.seed, start, stop) for request, start, stop in rows]
            keys_N = torch.from_numpy(np.concatenate(keys)).to(hidden_ND.device, non_blocking=True)
        # Ranks may differ in what fits into their memory, so they meet once for all positions of a step.
        local = local_in_chunks(
            self._capture_head, hidden_ND, spec, chunks=self._capture_chunks, keys_N=keys_N, rank=rank
        )
        slices = self._capture_slices(local)
        if not self._capture_answers:
            return {}
        statistics = merge(slices, spec, keys_N=keys_N)
        tensors = {field.name: getattr(statistics, field.name) for field in fields(Statistics)}
        if self._capture_projector is not None:
            for bits, values in self._capture_projector(hidden_ND).items():
                tensors[f"hidden_{bits}"] = values
        return tensors

    def _capture_slices(self, local: LocalStatistics) -> list[LocalStatistics]:
        """Every tensor-parallel rank's statistics: one gather of 2k + T + 1 + S numbers for each position."""
        if get_tp_group().world_size == 1:
            return [local]
        packed = local.packed()
        gathered = tensor_model_parallel_all_gather(packed, dim=-1)
        return [LocalStatistics.unpacked(part, self._capture_spec) for part in gathered.split(packed.shape[1], dim=1)]

    def _capture_add_moments(self, hidden_ND: torch.Tensor, rows: list[tuple[_Request, int, int]]) -> torch.Tensor:
        trained = np.concatenate([np.arange(start, stop) >= request.first_trained for request, start, stop in rows])
        trained_N = torch.from_numpy(trained).to(hidden_ND.device)
        kept_ND = hidden_ND[trained_N].double()
        self._capture_moments[0] += len(kept_ND)
        self._capture_moments[1] += kept_ND.sum(0)
        self._capture_moments[2] += kept_ND.T @ kept_ND
        return trained_N

    # Calls from the engine, by collective_rpc. Arrays travel as safetensors bytes: vLLM's own transport between
    # processes loses their types.

    def capture_begin(self, mode: str) -> None:
        """Starts a phase: ``targets``, ``moments``, ``hidden`` or ``inner``; no request may be running."""
        self._capture_mode = mode
        self._capture_requests.clear()
        self._capture_ready.clear()
        self._capture_steps.clear()
        if self._capture_active:
            self._capture_chunks.measure()
        if mode == "moments" and self._capture_active:
            dim = self.model_config.get_hidden_size()
            shapes: list[tuple[int, ...]] = [(1,), (dim,), (dim, dim)]
            self._capture_moments = [torch.zeros(s, dtype=torch.float64, device=self.device) for s in shapes]

    def capture_install(self, projection: bytes) -> None:
        """Sets the projection; empty bytes remove it."""
        if self._capture_active:
            installed = Projection.from_bytes(projection) if projection else None
            self._capture_projector = Projector(installed, self.device) if installed else None
            self._capture_inner.install(installed, self.device)

    @torch.inference_mode()
    def capture_take(self, ended: list[tuple[int, int]]) -> bytes | None:
        """The sequences finished since the last call: ``<key>/<name>`` -> array of its positions.

        ``ended`` says of answers that have ended, key by key, how many positions they have.
        """
        self._capture_flush()
        by_key = {request.key: request for request in self._capture_requests.values()}
        for key, num_positions in ended:
            if request := by_key.get(key):
                if request.done < num_positions:
                    raise RuntimeError(
                        f"sequence {key} ended with {request.done} of {num_positions} positions captured"
                    )
                request.num_positions = num_positions
                self._capture_finish(request)
        if not self._capture_answers:
            return None
        arrays: dict[str, np.ndarray] = {}
        for request in self._capture_ready:
            for piece in request.pieces:
                if piece.copied is not None:
                    piece.copied.synchronize()
            for name in request.pieces[0].tensors:
                whole = np.concatenate(
                    [piece.tensors[name][piece.start : piece.stop].numpy() for piece in request.pieces]
                )
                # A step may have been begun before the one in which the answer ended was looked at.
                arrays[f"{request.key}/{name}"] = np.ascontiguousarray(whole[: request.num_positions])
        self._capture_ready.clear()
        return bytes(save(arrays))

    def capture_take_moments(self) -> bytes | None:
        """Count [1], sum [D] and outer product [D, D] of the phase, float64. Every sequence has been taken."""
        if not self._capture_answers:
            return None
        names = ("count", "sum", "outer")
        return bytes(save({n: t.cpu().numpy() for n, t in zip(names, self._capture_moments, strict=True)}))

    @torch.inference_mode()
    def capture_head_gram(self) -> bytes | None:
        """This slice's ``W' W`` and sum of rows, float64."""
        if not self._capture_active:
            return None
        gram_DD, sum_D = self._capture_head.gram()
        return bytes(save({"gram": gram_DD.cpu().numpy(), "sum": sum_D.cpu().numpy()}))

    @torch.inference_mode()
    def capture_head_times(self, matrix: bytes) -> bytes | None:
        """This slice's ``W @ matrix`` and bias."""
        if not self._capture_active:
            return None
        head = self._capture_head
        matrix_DR = torch.from_numpy(load(matrix)["matrix"]).to(self.device)
        bias = torch.zeros(head.num_ids) if head.bias is None else head.bias.cpu()
        first = np.array([head.first_id])
        return bytes(save({"first": first, "product": head.times(matrix_DR).cpu().numpy(), "bias": bias.numpy()}))

    @torch.inference_mode()
    def capture_head_logits(self, hidden: bytes) -> bytes | None:
        """This slice's logits of given final hidden states."""
        if not self._capture_active:
            return None
        hidden_ND = torch.from_numpy(load(hidden)["hidden"]).to(self.device)
        logits_NV = self._capture_head.logits(hidden_ND.to(self.model_config.dtype))
        first = np.array([self._capture_head.first_id])
        return bytes(save({"first": first, "logits": logits_NV.cpu().numpy()}))

    def capture_facts(self) -> dict[str, Any] | None:
        """What the head does to logits, and why the model gives no inner layers, if so."""
        if not self._capture_answers:
            return None
        return {
            "inner_refusal": self._capture_inner.refusal,
            "soft_cap": self._capture_head.soft_cap,
            "scale": self._capture_head.scale,
        }


def _to_host(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.cuda.Event | None]:
    """Copies to pinned memory without waiting; the event says when they have arrived."""
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return {name: tensor.contiguous() for name, tensor in tensors.items()}, None
    host = {name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        host[name].copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied
