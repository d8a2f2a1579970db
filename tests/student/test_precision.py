"""Protects the choice of a device and of the dtypes: what cannot compute is refused before anything is loaded."""

import pytest
import torch

from distill.errors import UsageError
from distill.student.precision import resolve_precision


@pytest.mark.parametrize("device", ["cuda:99", "bogus", "", "meta", "hpu"])
def test_a_device_that_cannot_compute_is_refused_with_a_way_out_of_every_command(device):
    with pytest.raises(UsageError, match=f"device '{device}' cannot be used: .*") as caught:
        resolve_precision(device, "auto")
    assert str(caught.value).endswith("on the command line --set device=cpu.")
    assert "--device" not in str(caught.value)


@pytest.mark.parametrize(
    ("precision", "dtype", "autocast", "scales"),
    [
        ("auto", torch.float32, False, False),
        ("fp32", torch.float32, False, False),
        ("bf16", torch.bfloat16, True, False),
        ("fp16", torch.float16, True, True),
    ],
)
def test_what_the_words_mean_on_a_cpu(precision, dtype, autocast, scales):
    found = resolve_precision("cpu", precision)
    assert (found.device.type, found.compute_dtype) == ("cpu", dtype)
    assert (found.autocast, found.scales_gradients) == (autocast, scales)
    assert resolve_precision("cpu", found.name) == found
