"""Student logits and the tokens that really follow flow in, cross-entropy of each token flows out."""

from torch import Tensor

from distill.student.losses.kl import wide


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """``-log softmax(z)[label] = lse(z) - z[label]`` of each token, [N] float32, in nats at T=1.

    ``labels_N`` int64 in [0, V).
    """
    z_NV = wide(logits_NV)
    return z_NV.logsumexp(1) - z_NV.gather(1, labels_N.unsqueeze(1)).squeeze(1)
