"""The library's names: light to import, typed, and each one there.

What it protects: ``import distill`` in somebody else's program.
"""

import subprocess
import sys
from pathlib import Path

import pytest

import distill

ROOT = Path(__file__).parents[1]
CLIENT = """
import distill

made = distill.batches("cache", temperature=2.0, split="train", domains=["general"], max_length=512, batch_tokens=4096)
for batch in made.walk(start=0, epochs=3, rank=0, world_size=2):
    loss = distill.kd_loss(batch.labels, batch.labels, batch.to("cuda"), kl_weight=0.9, ce_weight=0.1)
    reveal_type(loss)
    reveal_type(distill.CacheReader.open("cache").temperatures)
distill.batches("cache", split="train")
"""


def test_importing_it_loads_nothing_heavy_until_a_name_is_used() -> None:
    code = (
        "import sys, distill\n"
        "before = set(sys.modules)\n"
        "assert not {'torch', 'numpy', 'pandas', 'pyarrow', 'pydantic'} & before, before\n"
        "assert distill.DataError.exit_code == 3 and 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "distill.CacheReader\n"
        "assert 'pyarrow' in sys.modules and 'torch' not in sys.modules\n"
        "distill.batches\n"
        "assert 'torch' in sys.modules and 'transformers' not in sys.modules and 'peft' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_and_described() -> None:
    assert sorted(distill.__all__) == distill.__all__
    for name in distill.__all__:
        assert getattr(distill, name).__doc__, name
        assert name in dir(distill)
    with pytest.raises(AttributeError, match="no attribute 'kd_lost'"):
        _ = distill.kd_lost


def test_a_client_is_checked_by_mypy(tmp_path: Path) -> None:
    client = tmp_path / "client.py"
    client.write_text(CLIENT)
    # With the project's own cache of types, which saves a minute.
    command = [sys.executable, "-m", "mypy", "--no-pretty", str(client)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    said = [line for line in done.stdout.splitlines() if "client.py:" in line]
    assert len(said) >= 3, done.stdout
    assert 'Revealed type is "torch._tensor.Tensor"' in said[0]
    assert 'Revealed type is "tuple[float, ...]"' in said[1]
    assert 'Missing named argument "temperature" for "batches"' in said[2]
    assert sum(": error: " in line for line in said) == 1, said
