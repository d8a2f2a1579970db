"""A sound cache and checkpoint flow in, one file of them mutated at a time; what reading them then gave flows out.

refused   one of distill's errors
harmless  every row that was found is as it was committed
changed   other rows, under hashes that vouch for them: whoever writes the records says what the rows are
wrong     other rows although no hash vouched for them, or a row twice
escaped   any other exception
"""

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.cache import document
from distill.cache.codec import decode
from distill.cache.plan import Repair
from distill.cache.reader import CacheReader
from distill.errors import DistillError
from distill.launch.worker import Worker
from distill.report.extras import read_rejects
from distill.report.inspect import inspect
from distill.report.verify import verify
from distill.student.checkpoint import State, read_checkpoint, write_checkpoint
from tests.attacks.forging import signed, unsigned
from tests.faults.filler import Job, fill_cache, fingerprint

# kind -> the files, below the folder of the fuzzing
KINDS = {
    "manifest": "sealed/manifest.json",
    "commit": "open/commits/*.json",
    "plan": "open/plan.json",
    "repair": "open/repairs/2.json",
    "shard": "sealed/shards/*.parquet",
    "projection": "sealed/projection.safetensors",
    "rejects": "sealed/rejects/*.jsonl",
    "state": "step-1/state.json",
}
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**63, 10**40, -(10**40), 0.5, float("nan"), float("inf")),
    *("", "x", "..", "../../x", "\0", "a" * 64, "9" * 5000, [], [[]], {}, {"a": {}}, ["x"] * 50),
)
_ENDS = ("refused", "harmless", "changed", "wrong", "escaped")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How reading ended, for one kind of file."""

    mutations: int
    ends: dict[str, int]
    examples: tuple[str, ...]  # of what must not be

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"mutations": self.mutations, **self.ends, "examples": list(self.examples)}


def fuzz(folder: Path, *, mutations: int, seed: int, kinds: tuple[str, ...] = tuple(KINDS)) -> dict[str, Any]:
    """``mutations`` of each kind of file: kind -> figures. Every file is mended again."""
    truth = _build(folder)
    figures = {}
    for kind in kinds:
        rng = random.Random(f"{seed} {kind}")
        ends, examples = dict.fromkeys(_ENDS, 0), []
        for number in range(mutations):
            path = rng.choice(sorted(folder.glob(KINDS[kind])))
            end, text = _ended(folder, kind, path, truth, rng, thorough=number % 3 == 0)
            ends[end] += 1
            if end in ("wrong", "escaped"):
                examples.append(text)
        figures[kind] = Figures(mutations=mutations, ends=ends, examples=tuple(examples[:5])).as_dict()
    assert verify(folder / "sealed").ok, "every file has been mended"
    return figures


def _build(folder: Path) -> dict[str, bytes]:
    """A sealed cache, one that is to be repaired, and a checkpoint; source -> fingerprint of every row."""
    folder.mkdir(exist_ok=True)
    fill_cache(folder / "sealed", Job.make(num_rows=16), Worker())
    shutil.copytree(folder / "sealed", folder / "open")
    (folder / "open" / "manifest.json").unlink()
    (folder / "open" / "repairs").mkdir()
    repair = Repair(generation=2, units={"00001": "shards/x: is missing"})
    (folder / "open" / "repairs" / "2.json").write_bytes(document.render(repair))
    state = State(stage=1, step=1, position=8, finished=False, settings={"seed": 42, "stage": {"temperature": 2.0}})
    write_checkpoint(folder / "step-1", state, lambda aside: (aside / "weights.safetensors").write_bytes(b"w" * 99))
    return dict(_rows(folder / "sealed"))


def _rows(root: Path) -> Iterator[tuple[str, bytes]]:
    reader = CacheReader.open(root, allow_incomplete=True)
    _ = reader.projection
    for commit in reader.commits:
        for row in decode(reader.read_unit(commit), reader.layout):
            yield row.prompt.source, fingerprint(row)
    read_rejects(reader)


def _ended(
    folder: Path, kind: str, path: Path, truth: dict[str, bytes], rng: random.Random, *, thorough: bool
) -> tuple[str, str]:
    """How reading ends while ``path`` is mutated, and what to say of it."""
    root = folder / KINDS[kind].partition("/")[0]
    records = [item for item in (root / "manifest.json", *root.glob("commits/*.json")) if item.exists()]
    before = {item: item.read_bytes() for item in {path, *records}}
    vouched = rng.random() < 0.6
    content = _mutated(path, before[path], rng, vouched=vouched)
    path.write_bytes(content)
    if vouched and path.suffix != ".json":
        _vouch(root, path, before[path], content)
    try:
        if kind == "state":
            read_checkpoint(path.parent)
            return "harmless", ""
        found = list(_rows(root))
        if thorough:
            inspect(root)
        same = all(truth.get(source) == content for source, content in found)
        twice = len({source for source, _ in found}) < len(found)
        allowed = vouched and kind == "shard"
        return ("harmless" if same and not twice else "changed" if allowed else "wrong"), f"{path.name}: other rows"
    except DistillError:
        return "refused", ""
    except Exception as error:
        return "escaped", f"{path.name}: {error!r}"[:300]
    finally:
        try:
            if thorough and kind != "state":
                verify(root)
        except DistillError:
            pass
        for item, data in before.items():
            item.write_bytes(data)


def _vouch(root: Path, path: Path, old: bytes, new: bytes) -> None:
    """Let every record that names the file's old hash and size name the new ones."""
    hashes = [hashlib.sha256(data).hexdigest().encode() for data in (old, new)]
    for record in (root / "manifest.json", *root.glob("commits/*.json")):
        data = record.read_bytes()
        if hashes[0] in data:
            text = json.dumps(unsigned(data), indent=2, ensure_ascii=False).encode().replace(*hashes)
            if path.suffix == ".parquet":
                text = text.replace(b'"num_bytes": %d' % len(old), b'"num_bytes": %d' % len(new))
            record.write_bytes(signed(text))


def _mutated(path: Path, data: bytes, rng: random.Random, *, vouched: bool) -> bytes:
    if path.suffix != ".json":
        return _edited(data, rng)
    if not vouched:
        return _edited(data, rng)
    if rng.random() < 0.3:
        body = json.dumps(unsigned(data), indent=2).encode()
        return signed(_edited(body, rng))
    content = unsigned(data)
    for _ in range(rng.randint(1, 3)):
        _change(content, rng)
    return signed(json.dumps(content, indent=2, ensure_ascii=rng.random() < 0.5))


def _edited(data: bytes, rng: random.Random) -> bytes:
    """A few bytes flipped, overwritten, cut out, doubled or put in, or the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(changed) + 1), rng.randint(1, 32)
        edit = rng.randrange(6)
        if edit == 0 and changed:
            changed[at % len(changed)] ^= 1 << rng.randrange(8)
        elif edit == 1:
            changed[at : at + length] = rng.randbytes(len(changed[at : at + length]))
        elif edit == 2:
            del changed[at : at + length]
        elif edit == 3:
            changed[at:at] = changed[at : at + length]
        elif edit == 4:
            changed[at:at] = rng.choice((b"[" * 5000, b"\xff" * length, b"9" * 5000, b'"', b"{", b"\0" * length))
        else:
            del changed[at:]
    return bytes(changed)


def _change(content: Any, rng: random.Random) -> None:
    """Replace, delete, double or add one value somewhere in a tree of JSON."""
    holder, key = rng.choice(list(_places(content)))
    edit = rng.randrange(4)
    if edit == 0:
        holder[key] = copy.deepcopy(rng.choice(_VALUES))
    elif edit == 1:
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    elif edit == 2:
        holder[rng.choice(list(holder))] = copy.deepcopy(holder[key])
    else:
        holder[str(rng.choice(("extra", "__proto__", "../x", key * 2 if isinstance(key, str) else key)))] = 1


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    keys: Callable[[Any], Any] = lambda holder: range(len(holder)) if isinstance(holder, list) else list(holder)  # noqa: E731
    stack = [content]
    while stack:
        holder = stack.pop()
        for key in keys(holder):
            yield holder, key
            if isinstance(holder[key], dict | list):
                stack.append(holder[key])
