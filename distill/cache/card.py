"""A manifest flows in, the cache's README flows out: what it is, how it was made, and how to look into it.

Its head is what data-set hubs read. A licence that nobody stated is "not stated", never guessed.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from distill.cache.plan import Identity, Manifest, Recorded
from distill.records import Split

NOT_STATED = "not stated"
_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
_SPLITS: tuple[Split, Split] = ("train", "eval")

_CARD = """---
{head}---

# Teacher targets of {teacher}

Each row of `shards/*.parquet` is one sequence with what a student can learn from {teacher}: for every position the
top {top_k} log-probabilities, and the log-partition and tail mass at temperatures {temperatures}{hidden}. Made by
`distill cache-teacher`; a student is trained from it without the teacher by `distill train --cache FOLDER`.

| domain | train sequences | eval sequences | train targets | eval targets |
|---|---|---|---|---|
{domains}

{num_input_rows:,} input rows, {num_rejects:,} of them rejected (`rejects/`), {megabytes:,.1f} MB of shards.

## Columns

Target t describes token t + 1, so a sequence of L tokens has L-1 targets. Lists are flat, target after target.

| column | holds |
|---|---|
{columns}

The teacher's log-probability of a kept token at a temperature T is `topk_logprobs / T - log_z[T]`.

## Licences

| of | |
|---|---|
{licences}

What a model or data set allows to be done with its outputs is for its licence to say; read both before you publish.
{notes}
## How it was made

| | |
|---|---|
{provenance}

## Look into it

In this folder:

```python
import distill

frame = distill.open(".")  # one row per sequence, arrays of [tokens - 1, {top_k}]
print(frame[["domain", "prompt", "response"]].head())
```

```python
import pandas as pd

frame = pd.read_parquet("shards", columns=["domain", "split", "prompt", "entropy"])
print(frame.groupby(["domain", "split"], observed=True).size())
```

```python
import duckdb

print(duckdb.sql("select domain, split, count(*), avg(len(input_ids)) from 'shards/*.parquet' group by all"))
```

```python
import polars as pl

print(pl.scan_parquet("shards/*.parquet").group_by("domain", "split").len().collect())
```

`datasets` knows no maps, so `metadata` has to stay out:

```python
import pyarrow.parquet as pq
from datasets import Dataset

rows = Dataset(pq.read_table("shards", columns=["input_ids", "topk_ids", "topk_logprobs", "log_z"]))
print(rows.features, rows[0]["topk_ids"][:{top_k}])
```

`distill inspect` shows a row in words and how close the kept targets come to the teacher; `distill verify` reads every
byte back.
"""


def render_card(manifest: Manifest) -> str:
    """The README of a sealed cache: YAML for hubs, then Markdown."""
    identity, recorded, totals = manifest.identity, manifest.recorded, manifest.totals
    bytes_each = identity.hidden_bytes
    notes = recorded.card.get("notes")
    return _CARD.format(
        head=yaml.safe_dump(_head(manifest), sort_keys=False, allow_unicode=True),
        teacher=recorded.teacher,
        top_k=identity.top_k,
        temperatures=", ".join(f"{value:g}" for value in identity.temperatures),
        hidden=f", and\nthe final hidden state in at most {bytes_each} bytes" if bytes_each else "",
        domains="\n".join(_domain_lines(manifest)),
        num_input_rows=totals.num_input_rows,
        num_rejects=totals.num_rejects,
        megabytes=totals.num_bytes / 1e6,
        columns=_table(_columns(identity)),
        licences=_table(_licences(recorded)),
        notes=f"\n{notes.strip()}\n" if notes else "",
        provenance=_table(_provenance(manifest)),
    )


def stated_license(folder: Path) -> str | None:
    """The licence that the head of a model folder's README.md names; None where it names none."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        _, front, _ = text.split("---\n", 2)
        head = yaml.safe_load(front)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(head, dict):
        return None
    found = head.get("license_name") or head.get("license")  # "other" has a name beside it
    return str(found) if found else None


def _head(manifest: Manifest) -> dict[str, Any]:
    """What hubs read: no licence at all where none is stated for the cache itself."""
    num_rows = manifest.totals.num_rows.total
    size = next((name for limit, name in _SIZES.items() if num_rows < limit), "n>10M")
    own = manifest.recorded.card.get("license")
    return {
        **({"license": own} if own else {}),
        "task_categories": ["text-generation"],
        "tags": ["distill-cache", "knowledge-distillation", "logits"],
        "size_categories": [size],
    }


def _domain_lines(manifest: Manifest) -> Iterator[str]:
    sums: dict[str, list[int]] = {}
    for commit in manifest.commits:
        counts = [getattr(commit, field)[split] for field in ("num_rows", "num_targets") for split in _SPLITS]
        before = sums.setdefault(commit.domain, [0] * len(counts))
        sums[commit.domain] = [old + new for old, new in zip(before, counts, strict=True)]
    for domain, counts in sums.items():
        yield f"| {_cell(domain)} | " + " | ".join(f"{count:,}" for count in counts) + " |"


def _columns(identity: Identity) -> dict[str, str]:
    num_temperatures = len(identity.temperatures)
    kept = {
        "sequence_id, prompt_id, source": "hash of the sequence and of its prompt, input file and row",
        "domain, split, metadata": "label, `train` or `eval`, the input's other columns",
        "prompt, response": "text",
        "input_ids, loss_mask": "L tokens, L-1 marks of the targets that train",
        "topk_ids, topk_logprobs": f"{identity.top_k} for each target, falling, at temperature 1",
        "log_z, log_tail": f"{num_temperatures} for each target: log-partition, log of the mass outside the top-k",
        "entropy": "nats at temperature 1",
    }
    if identity.hidden_bytes:
        kept["hidden_8, hidden_6, hidden_4, hidden_2"] = (
            "quantised coordinates of the final hidden state under `projection.safetensors`"
        )
    if identity.num_samples:
        kept["sampled_ids, sampled_counts"] = f"{identity.num_samples} draws for each target, at temperature 1"
    for layer in identity.layers:
        kept[f"layer{layer}_hidden"] = "projected state of an inner layer"
    for heads in identity.heads:
        kept[f"layer{heads.layer}_q, …_k"] = "queries and keys of chosen attention heads"
    return {f"`{name}`".replace(", ", "`, `"): text for name, text in kept.items()}


def _licences(recorded: Recorded) -> dict[str, str]:
    card: Mapping[str, str] = recorded.card
    return {
        "this cache": card.get("license", NOT_STATED),
        f"the teacher, {recorded.teacher}": card.get("teacher_license", NOT_STATED),
        "the data": card.get("data_license", NOT_STATED),
    }


def _provenance(manifest: Manifest) -> dict[str, str]:
    identity, recorded = manifest.identity, manifest.recorded
    found = {
        "revision": recorded.revision or "",
        "weights": f"`{identity.teacher_weights}`",
        "engine": f"{recorded.engine} {recorded.engine_version}",
        "dtype": identity.dtype + (f", quantised by {identity.quantisation}" if identity.quantisation else ""),
        "longest sequence": f"{identity.max_length} tokens; longer rows: {identity.overlong}",
        "versions": ", ".join(f"{name} {version}" for name, version in recorded.versions.items()),
        "created": recorded.created,
        "command": f"`{recorded.command}`" if recorded.command else "",
        "sources": ", ".join(source.path for source in manifest.sources),
    }
    return {name: value for name, value in found.items() if value}


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
