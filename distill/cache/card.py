"""A manifest flows in, the cache's README flows out: what it is, how it was made, and how to look into it."""

from distill.cache.plan import Manifest

_CARD = """# Teacher targets of {teacher}

Made by `distill cache-teacher`. Each row of `shards/*.parquet` is one sequence with what a student can learn from: for
every position the top {top_k} log-probabilities, log-partition and tail mass at temperatures {temperatures}{hidden}.

| domain | train sequences | eval sequences | train targets | eval targets |
|---|---|---|---|---|
{domains}

{num_input_rows:,} input rows, {num_rejects:,} of them rejected (`rejects/`), {megabytes:,.1f} MB of shards.

| made with | |
|---|---|
{provenance}

## Look into it

```python
import distill

frame = distill.open("{name}")  # one row per sequence, arrays of [tokens - 1, {top_k}]
print(frame[["domain", "prompt", "response"]].head())
```

`pandas.read_parquet("shards/…")` works as well. `distill inspect` shows a row in words and how close the kept targets
come to the teacher; `distill verify` reads every byte back.
"""


def render_card(manifest: Manifest) -> str:
    """The README of a sealed cache, in Markdown."""
    identity, recorded, totals = manifest.identity, manifest.recorded, manifest.totals
    rows = []
    for domain in dict.fromkeys(commit.domain for commit in manifest.commits):
        commits = [commit for commit in manifest.commits if commit.domain == domain]
        counts = [
            sum(getattr(commit, field)[split] for commit in commits)
            for field in ("num_rows", "num_targets")
            for split in ("train", "eval")
        ]
        rows.append(f"| {domain} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    provenance = {
        "engine": f"{recorded.engine} {recorded.engine_version}",
        "dtype": identity.dtype,
        "versions": ", ".join(f"{name} {version}" for name, version in recorded.versions.items()),
        "created": recorded.created,
        "command": f"`{recorded.command}`" if recorded.command else "",
        "sources": ", ".join(source.path for source in manifest.sources),
    }
    hidden = f",\nand the final hidden state in at most {identity.hidden_bytes} bytes" if identity.hidden_bytes else ""
    return _CARD.format(
        teacher=recorded.teacher,
        top_k=identity.top_k,
        temperatures=", ".join(f"{value:g}" for value in identity.temperatures),
        hidden=hidden,
        domains="\n".join(rows),
        num_input_rows=totals.num_input_rows,
        num_rejects=totals.num_rejects,
        megabytes=totals.num_bytes / 1e6,
        provenance="\n".join(f"| {name} | {value} |" for name, value in provenance.items() if value),
        name="path/to/this/folder",
    )
