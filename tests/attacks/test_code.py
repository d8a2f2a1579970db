"""Opening a cache or a checkpoint runs nothing that came with it: no pickle, no remote code, no extension type.

Everything here is vouched for by right hashes and checksums. The trap is a file that appears as soon as any of it runs.
"""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner

import distill
from distill.__main__ import app
from distill.cache.reader import CacheReader
from distill.report.verify import verify
from tests.attacks.conftest import Trap
from tests.attacks.forging import put_shard, refused, shard_of, vouch

REMOTE = {
    "auto_map": {
        "AutoConfig": "evil.EvilConfig",
        "AutoModel": "evil.EvilModel",
        "AutoModelForCausalLM": "evil.EvilModel",
        "AutoTokenizer": ["evil.EvilTokenizer", "https://example.org/evil.EvilTokenizer"],
    },
    "tokenizer_file": "https://example.org/tokenizer.json",
    "chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
}
PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "training_args.bin", "optimizer.pkl", "adapter_model.bin")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever follows a URL fails."""

    def refuse(_socket: socket.socket, address: object) -> None:
        raise AssertionError(f"something calls {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def add_code(folder: Path, trap: Trap) -> None:
    """Give a folder pickles, modules, and configurations that point to them."""
    folder.mkdir(exist_ok=True)
    for name in PICKLES:
        (folder / name).write_bytes(trap.pickled())
    for name in ("evil.py", "__init__.py", "conftest.py", "sitecustomize.py", "tokenization_evil.py"):
        (folder / name).write_text(trap.code())
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        path = folder / name
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **REMOTE}))


def command(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def test_the_trap_works(trap: Trap, tmp_path: Path) -> None:
    import pickle

    pickle.loads(trap.pickled())
    assert trap.sprung.exists()
    trap.sprung.unlink()
    exec(compile(trap.code(), str(tmp_path), "exec"))
    assert trap.sprung.exists()


def test_code_beside_a_cache(world: Any, tmp_path: Path, trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(shutil.copytree(world.cache, tmp_path / "cache"))
    for folder in (root, root / "teacher", root / "shards", root / "commits"):
        add_code(folder, trap)
    monkeypatch.chdir(root)
    command("inspect", root)
    assert [item.file for item in verify(root).problems] == [
        "teacher/tokenizer_config.json"
    ]  # it was sealed as another
    command("sql", root, "select text from vocabulary limit 1")
    command("status", root)
    assert len(distill.open(root)) == 96
    command("eval", "--cache", root, "--student", world.student, "--set", "device=cpu")
    assert not trap.sprung.exists()


def test_code_in_a_checkpoint(checkpoint: Callable[[str], Path], world: Any, trap: Trap) -> None:
    for tune in ("full", "lora"):
        folder = checkpoint(tune)
        add_code(folder / "model", trap)
        vouch(folder)
        command("eval", "--cache", world.cache, "--student", folder, "--set", "device=cpu")
    assert not trap.sprung.exists()


def test_a_model_that_only_code_can_load(checkpoint: Callable[[str], Path], world: Any, trap: Trap) -> None:
    folder = checkpoint("full")
    path = folder / "model" / "config.json"
    path.write_text(json.dumps({"model_type": "evil", "architectures": ["EvilModel"], **REMOTE}))
    (folder / "model" / "evil.py").write_text(trap.code())
    vouch(folder)
    refused("eval", "--cache", world.cache, "--student", folder, "--set", "device=cpu", code=2)
    assert not trap.sprung.exists()


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_pickled_weights(checkpoint: Callable[[str], Path], world: Any, trap: Trap, tune: str) -> None:
    folder = checkpoint(tune)
    for path in (folder / "model").glob("*.safetensors"):
        path.unlink()
    for name in PICKLES:
        (folder / "model" / name).write_bytes(trap.pickled())
    vouch(folder)
    text = refused("eval", "--cache", world.cache, "--student", folder, "--set", "device=cpu", code=2)
    assert "never loaded" in text
    assert not trap.sprung.exists()


def test_an_adapter_imports_nothing(
    checkpoint: Callable[[str], Path], world: Any, trap: Trap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft imports the modules that some keys of adapter_config.json name."""
    folder = checkpoint("lora")
    (tmp_path / "evil_core.py").write_text(trap.code())
    monkeypatch.syspath_prepend(tmp_path)
    path = folder / "model" / "adapter_config.json"
    evil = {
        "megatron_config": {"params_dtype": "x"},
        "megatron_core": "evil_core",
        "auto_mapping": {"base_model_class": "EvilModel", "parent_library": "evil_core"},
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **evil}))
    vouch(folder)
    CliRunner().invoke(app, ["eval", "--cache", str(world.cache), "--student", str(folder), "--set", "device=cpu"])
    assert not trap.sprung.exists()


class _Evil(pa.ExtensionType):
    """An extension type that this process knows, as any imported library may register one."""

    def __init__(self) -> None:
        super().__init__(pa.int32(), "evil.extension")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, _storage: pa.DataType, _serialized: bytes) -> "_Evil":
        return cls()


def with_metadata(table: pa.Table, name: str, metadata: dict[bytes, bytes]) -> pa.Table:
    index = table.schema.get_field_index(name)
    field = table.schema.field(name).with_metadata(metadata)
    return table.cast(table.schema.set(index, field))


def test_pickles_in_a_shards_schema(cache: Path, trap: Trap) -> None:
    """What libraries have unpickled in their time: Arrow's extension metadata of Python types, pandas' metadata."""
    reader = CacheReader.open(cache)
    table = reader.read_unit(reader.commits[0])
    pickled = trap.pickled()
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickled}
    forged = with_metadata(table, "source", extension)
    forged = forged.replace_schema_metadata({b"pandas": pickled, b"distill": pickled, b"huggingface": pickled})
    reader = put_shard(cache, shard_of(forged, reader))
    assert reader.read_unit(reader.commits[0]).num_rows == 4
    command("inspect", cache)
    command("sql", cache, "select source from rows")
    assert not trap.sprung.exists()


def test_a_registered_extension_type_is_another_column(cache: Path) -> None:
    reader = CacheReader.open(cache)
    table = reader.read_unit(reader.commits[0])
    pa.register_extension_type(_Evil())
    try:
        column = pa.ExtensionArray.from_storage(_Evil(), pa.array([1, 2, 3, 4], pa.int32()))
        index = table.schema.get_field_index("source")
        forged = table.set_column(index, pa.field("source", column.type, nullable=False), column)
        put_shard(cache, shard_of(forged, reader))
        assert "its columns are not those of this cache" in refused("inspect", cache)
    finally:
        pa.unregister_extension_type("evil.extension")


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04N.", b"[" * 100_000, b'{"version": "1.0", "model": 5}'])
def test_a_tokenizer_that_is_none(cache: Path, content: bytes) -> None:
    (cache / "teacher").mkdir()
    (cache / "teacher" / "tokenizer.json").write_bytes(content)
    assert "is no tokenizer" in refused("inspect", cache)
