"""A batch of ``distill.batches`` and a student's hidden states or logits flow in, one differentiable loss flows out.

``B`` sequences, ``S`` padded length, ``N`` trained tokens, ``D`` the student's hidden size, ``V`` real vocabulary,
``H`` rows of its head (H >= V, since models pad it).
"""

import torch
from torch import Tensor

from distill.errors import IdentityError, UsageError
from distill.student.feed import Batch
from distill.student.losses.ce import cross_entropy
from distill.student.losses.divergence import FORWARD, Divergence
from distill.student.losses.fused import Head, HeadTargets, fused_head_losses


def kd_loss(
    hidden: Tensor,
    lm_head: Tensor | Head,
    batch: Batch,
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    divergence: Divergence = FORWARD,
    chunk: int = 256,
) -> Tensor:
    """Mean over the batch's trained tokens of ``kl_weight T² D + ce_weight CE``, without ever forming all the logits.

    ``hidden`` are final hidden states, after the last norm: [B, S, D] of the whole batch, or [N, D] of its trained
    tokens (``hidden.flatten(0, 1)[batch.trained]``); float32, bfloat16 or float16. ``lm_head`` is the weight of the LM
    head, [H, D], or a ``Head`` where logits also have a bias, a scale or a soft cap. Products run in the dtype of
    autocast where it is on, else in that of ``hidden``; sums in float32. The scalar is differentiable in both.

    D is KL(teacher || student) unless ``divergence`` says otherwise, CE the cross-entropy of the next token. Logits and
    their gradients exist for ``chunk`` tokens at a time. ``loss * batch.num_trained`` is the sum, for a mean over
    several batches.

    Raises UsageError for shapes that do not fit and for weights of which none is above 0; IdentityError when the head
    has fewer rows than the cache has ids.
    """
    _check_weights(kl_weight, ce_weight)
    head = lm_head if isinstance(lm_head, Head) else _plain_head(hidden, lm_head, batch)
    _check_rows(head.weight, batch)
    targets = HeadTargets(
        teacher=batch.teacher,
        labels=batch.labels,
        coords=batch.coords,
        tail=None if batch.tail is None else batch.tail.on(hidden.device, head.compute_dtype),
        divergence=divergence,
    )
    hidden_ND = _of_trained_tokens("hidden", hidden, batch)
    losses = fused_head_losses(hidden_ND, head, targets, kl_weight=kl_weight, ce_weight=ce_weight, chunk=chunk)
    return losses.weighted / batch.num_trained


def kd_loss_from_logits(
    logits: Tensor,
    batch: Batch,
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    divergence: Divergence = FORWARD,
) -> Tensor:
    """``kd_loss`` for a model that has already computed its logits: simpler, and as large as they are.

    ``logits`` [B, S, H] of the whole batch, or [N, H] of its trained tokens, at temperature 1 and not shifted. Raises
    as ``kd_loss`` does.
    """
    _check_weights(kl_weight, ce_weight)
    _check_rows(logits.mT, batch)
    logits_NV = _of_trained_tokens("logits", logits, batch)[:, : batch.vocab_size]
    total = logits_NV.new_zeros((), dtype=torch.float32)
    if kl_weight > 0:
        tail_NV = None
        coords_NR = batch.coords
        if batch.tail is not None and coords_NR is not None:
            tail_NV = batch.tail.on(logits.device, torch.float32).logits(coords_NR)
        total = total + kl_weight * divergence(logits_NV, batch.teacher, tail_NV).sum()
    if ce_weight > 0:
        total = total + ce_weight * cross_entropy(logits_NV, batch.labels).sum()
    return total / batch.num_trained


def _plain_head(hidden: Tensor, weight_HD: Tensor, batch: Batch) -> Head:
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    return Head(
        weight=weight_HD,
        bias=None,
        vocab_size=batch.vocab_size,
        scale=1.0,
        soft_cap=None,
        compute_dtype=torch.get_autocast_dtype(device) if autocast else hidden.dtype,
    )


def _of_trained_tokens(name: str, values: Tensor, batch: Batch) -> Tensor:
    if values.shape[:-1] == batch.input_ids.shape:
        return values.flatten(0, 1).index_select(0, batch.trained)
    if values.ndim == 2 and len(values) == batch.num_trained:
        return values
    num_sequences, num_padded = batch.input_ids.shape
    raise UsageError(
        f"{name} has shape {list(values.shape)}, which does not fit this batch. Give all positions, "
        f"[{num_sequences}, {num_padded}, …], or those of its trained tokens, [{batch.num_trained}, …]."
    )


def _check_weights(kl_weight: float, ce_weight: float) -> None:
    if min(kl_weight, ce_weight) < 0 or max(kl_weight, ce_weight) == 0:
        raise UsageError(
            f"kl_weight is {kl_weight:g} and ce_weight {ce_weight:g}; neither may be negative and one must be above 0."
        )


def _check_rows(weight_HD: Tensor, batch: Batch) -> None:
    if weight_HD.shape[-2] < batch.vocab_size:
        raise IdentityError(
            f"the student's head has {weight_HD.shape[-2]} rows, but the cache has targets for {batch.vocab_size} ids. "
            "Use a student of the teacher's tokenizer, its embedding as large as the tokenizer (transformers: "
            "resize_token_embeddings)."
        )
