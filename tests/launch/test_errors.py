"""A Ray cluster that cannot be joined or used.

What it protects: the missing extra, and a folder that a node does not see, are told instead of failing on every node.
"""

import os
import sys
from pathlib import Path

import pytest

from distill.errors import UsageError
from distill.launch import ray_cluster


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(UsageError, match=r"--ray needs ray, which is not installed\. Run pip install 'distill\[ray\]'"),
        ray_cluster.joined(gpus=0, num_workers=None),
    ):
        pass


def test_a_node_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    here = os.getcwd()
    error = ray_cluster._Holder().run(lambda *_: None, {}, (0, 1, str(tmp_path / "not-mounted")))
    assert isinstance(error, UsageError)
    assert "where the command was started, is not to be seen from" in str(error)
    assert os.getcwd() == here
