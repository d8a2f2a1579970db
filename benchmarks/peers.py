"""This project beside others on one model, text and machine: what a token costs, and how true its target is.

    python -m benchmarks.peers [--text FILE] [--distillkit CHECKOUT] [--trl FOLDER] [--capture JSON]
        [--work FOLDER] [--json FILE]

The teacher is SmolLM2-135M-Instruct in float32. ``--text`` is JSON lines with ``text`` (.gz too; default: this
repository's documents). ``--distillkit`` is a checkout of arcee-ai/DistillKit, ``--trl`` a folder that ``pip install
--target FOLDER --no-deps trl`` filled; without them their rows are left out. ``--capture`` is what ``benchmarks.capture
--json`` wrote. ``--work`` keeps the cache for another run. One core does all, and seconds are its own.
"""

import argparse
import gzip
import importlib.metadata
import io
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks.peer_codecs import BUDGET, RECOMMENDED, DistillKit, Peer, RandomSampling, TopK, loaded, stored, timed
from distill.cache.codec import decode
from distill.cache.reader import CacheReader
from distill.cache.shard import write_rows
from distill.cache.tail import rebuild, total_variation
from distill.records import SequenceTargets
from examples.smollm2 import teacher_folder

ROOT = Path(__file__).parent.parent
LENGTH, NUM_TEXTS, NUM_MEASURED, CHUNK = 256, 64, 512, 64
TEMPERATURES = (1.0, 2.0, 4.0)
OUR_COLUMNS = ("topk_ids", "topk_logprobs", "log_z", "log_tail", "hidden_")
OURS, BUCKET = "distill, low-rank tail (k=64, 128 B hidden)", "distill, bucket tail (the same cache)"


def texts(source: Path | None) -> list[str]:
    """Pieces of text long enough to fill a sequence each."""
    if source is None:
        whole = "\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md")))
        return [whole[start : start + 2000] for start in range(0, len(whole) - 2000, 2000)][:NUM_TEXTS]
    with gzip.open(source, "rt") if source.suffix == ".gz" else source.open(encoding="utf-8") as lines:
        found = [json.loads(line)["text"] for line in lines]
    return [text for text in found if len(text) > 6 * LENGTH][:NUM_TEXTS]


def make_cache(root: Path, source: Path | None) -> CacheReader:
    """The cache of the text, by the command that a user would type."""
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(source)))
    command = [sys.executable, "-m", "distill", "cache-teacher", "--teacher", str(teacher_folder()), "--quiet"]
    command += ["--data", f"text={root / 'text.jsonl'}", "--out", str(root / "cache"), "--engine", "transformers"]
    command += ["--max-length", str(LENGTH), "--dtype", "float32", "--set", "eval_fraction=0.25"]
    subprocess.run(command, check=True)
    return CacheReader.open(root / "cache")


def held_out(reader: CacheReader) -> list[SequenceTargets]:
    """Whole sequences that did not fit the projection."""
    rows = [row for commit in reader.commits for row in reader.sequences(commit, "eval")]
    return [row for row in rows if len(row.prompt.input_ids) == LENGTH][:10]


@torch.no_grad()
def truth_of(rows: list[SequenceTargets], vocab: int) -> torch.Tensor:
    """The teacher's log-probabilities at T=1 at the targets of all rows: [N, V] float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher_folder(), dtype=torch.float32).eval()
    ids_BS = torch.from_numpy(np.stack([row.prompt.input_ids for row in rows])).long()
    return torch.cat([model(ids_S[None]).logits[0, :-1, :vocab].log_softmax(-1) for ids_S in ids_BS])


def tempered(logprobs_NV: torch.Tensor, temperature: float) -> NDArray[np.float64]:
    """The teacher at a temperature."""
    return np.asarray((logprobs_NV.double() / temperature).softmax(-1).numpy())


def errors(
    truth_NV: torch.Tensor, target: Callable[[slice, float], NDArray[np.float64]]
) -> dict[str, dict[str, float]]:
    """Total variation at each temperature: of positions, their mean; and of the mean over positions.

    The second forgives noise that averages out, and keeps bias.
    """
    found: dict[str, dict[str, float]] = {"tv": {}, "tv_of_mean": {}}
    for temperature in TEMPERATURES:
        distances, difference_V = [], np.zeros(truth_NV.shape[1])
        for start in range(0, NUM_MEASURED, CHUNK):
            positions = slice(start, start + CHUNK)
            true_NV = tempered(truth_NV[positions], temperature)
            ours_NV = target(positions, temperature)
            distances.append(total_variation(ours_NV, true_NV))
            difference_V += (ours_NV - true_NV).sum(0)
        found["tv"][f"{temperature:g}"] = round(float(np.concatenate(distances).mean()), 4)
        found["tv_of_mean"][f"{temperature:g}"] = round(float(np.abs(difference_V).sum() / 2 / NUM_MEASURED), 4)
    return found


def bench_ours(
    reader: CacheReader, rows: list[SequenceTargets], truth_NV: torch.Tensor, repeats: int
) -> dict[str, dict[str, Any]]:
    """Our rows through our shard and back, with both tails."""
    num, projection = len(truth_NV), reader.projection
    assert projection is not None
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "shard.parquet"

        def encode() -> None:
            with path.open("wb") as file:
                write_rows(file, rows, reader.layout)

        def read() -> list[SequenceTargets]:
            found = decode(pq.read_table(path, use_threads=False, page_checksum_verification=True), reader.layout)
            for row in found:
                projection.dequantise(row.targets.hidden)
            return found

        encode_s, _ = timed(encode, repeats)
        decode_s, back = timed(read, repeats)
        num_bytes = _target_bytes(pq.read_metadata(path))
    kept = {
        name: np.concatenate([getattr(row.targets, name) for row in back])
        for name in ("topk_ids", "topk_logprobs", "log_z", "log_tail")
    }
    hidden = {
        bits: np.concatenate([row.targets.hidden[bits] for row in back])[:NUM_MEASURED] for bits, _ in projection.widths
    }
    tail_logits_NV = projection.tail_logits(projection.dequantise(hidden))

    def target(kind: Any) -> Callable[[slice, float], NDArray[np.float64]]:
        return lambda positions, temperature: rebuild(
            kind,
            temperature=temperature,
            topk_ids_NK=kept["topk_ids"][positions],
            topk_logprobs_NK=kept["topk_logprobs"][positions],
            log_z_N=kept["log_z"][positions, reader.temperature_index(temperature)],
            log_tail_N=kept["log_tail"][positions, reader.temperature_index(temperature)],
            tail_logits_NV=tail_logits_NV[positions],
        )

    speed = _speed(num, num_bytes, encode_s, decode_s)
    return {
        OURS: {**speed, **errors(truth_NV, target("low_rank"))},
        BUCKET: {**speed, **errors(truth_NV, target("bucket"))},
    }


def bench_peer(peer: Peer, truth_NV: torch.Tensor, repeats: int) -> dict[str, Any]:
    """A peer's codec on the same positions."""
    num, vocab = truth_NV.shape
    prepared = peer.prepare(truth_NV)
    encode_s, data = timed(lambda: stored(peer.encode(prepared)), repeats)
    shapes = {name: values.shape for name, values in peer.encode(prepared).items()}
    decode_s, decoded = timed(lambda: peer.decode(loaded(data, shapes)), repeats)
    metadata = pq.read_metadata(io.BytesIO(data))
    found = errors(truth_NV, lambda positions, temperature: peer.target(decoded, positions, temperature, vocab))
    return {**_speed(num, _target_bytes(metadata, ""), encode_s, decode_s), **found}


def peers(distillkit: Path | None) -> Iterator[Peer]:
    """What is there to be measured."""
    yield TopK()
    yield RandomSampling()
    if distillkit is not None:
        sys.path.insert(0, str(distillkit))
        for missing in ("zero", "symmetric_uniform"):
            yield DistillKit(label="recommended", settings=RECOMMENDED, missing=missing)
            yield DistillKit(label="budget", settings=BUDGET, missing=missing)


def _target_bytes(metadata: pq.FileMetaData, *prefixes: str) -> int:
    wanted = prefixes or OUR_COLUMNS
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    columns = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(column.total_compressed_size for column in columns if column.path_in_schema.startswith(wanted))


def _speed(num: int, num_bytes: int, encode_s: float, decode_s: float) -> dict[str, Any]:
    return {
        "bytes_per_token": round(num_bytes / num, 1),
        "encode_tokens_per_s": round(num / encode_s),
        "decode_tokens_per_s": round(num / decode_s),
    }


def table(results: dict[str, Any]) -> str:
    """The codecs as Markdown, as docs/peers.md has it."""
    lines = [
        "| | B/token | encode, tok/s | decode, tok/s | TV T=1 | T=2 | T=4 | TV of the mean, T=1 | T=2 | T=4 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results["codecs"].items():
        speeds = [f"{found[key]:,}" for key in ("encode_tokens_per_s", "decode_tokens_per_s")]
        numbers = [f"{value:.3f}" for key in ("tv", "tv_of_mean") for value in found[key].values()]
        lines.append(f"| {name} | {found['bytes_per_token']:.0f} | {' | '.join([*speeds, *numbers])} |")
    return "\n".join(lines)


def steps_table(results: dict[str, Any]) -> str:
    """The training steps as Markdown."""
    names = {"ours": "distill, from the cache", "trl": "TRL, teacher in memory"}
    lines = ["| | seconds a step | tokens/s | peak memory, GiB |", "|---|---|---|---|"]
    for side, found in results["steps"].items():
        numbers = f"{found['step_s']:.2f} | {found['tokens_per_s']:,} | {found['peak_gib']:.2f}"
        lines.append(f"| {names[side]} ({found['version']}) | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the tables, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--distillkit", type=Path)
    parser.add_argument("--trl", type=Path)
    parser.add_argument("--capture", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        reader = make_cache(work, arguments.text)
        rows = held_out(reader)
        truth_NV = truth_of(rows, reader.identity.vocab_size)
        codecs = bench_ours(reader, rows, truth_NV, arguments.repeats)
        codecs |= {peer.name: bench_peer(peer, truth_NV, arguments.repeats) for peer in peers(arguments.distillkit)}
        results: dict[str, Any] = {
            "machine": f"{platform.machine()}, torch {importlib.metadata.version('torch')}, codecs on one core",
            "num_fit": reader.num_rows(split="train"),
            "num_tokens": len(truth_NV),
            "num_measured": NUM_MEASURED,
            "codecs": codecs,
        }
        if arguments.trl is not None:
            from benchmarks.peer_steps import bench_steps

            results["steps"] = bench_steps(reader, arguments.trl, work)
    if arguments.capture is not None:
        captured = json.loads(arguments.capture.read_text())
        results["capture"] = {name: captured[name] for name in ("small", "deep")}
    print(table(results))
    if "steps" in results:
        print(steps_table(results))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
