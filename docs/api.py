"""The public names of the package flow in, docs/api.md flows out: their signatures and docstrings as they are written.

python -m docs.api
"""

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import distill
from distill import errors

PAGE = Path(__file__).parent / "api.md"
GROUPS = {
    "Reading a cache": ("open", "CacheReader"),
    "Batches": ("batches", "Batches", "Batch"),
    "Losses": ("kd_loss", "kd_loss_from_logits", "Divergence", "Head"),
}
# Attributes and methods that are shown, of the classes that have some; dataclasses show their fields.
MEMBERS = {
    "CacheReader": (
        "open",
        "temperatures",
        "top_k",
        "hidden_bytes",
        "domains",
        "num_rows",
        "units",
        "sequences",
        "read_unit",
        "projection",
        "temperature_index",
    ),
    "Batches": ("walk", "set_epoch"),
    "Batch": ("input_ids", "attention_mask", "trained", "labels", "teacher", "coords", "num_trained", "to"),
}
HEAD = """# From Python

For a trainer of your own. `import distill` loads nothing heavy; a name does when it is first used, and torch only with
batches and losses. The package is typed (`py.typed`). Every name here keeps its meaning within a major version; other
modules may change.

```python
import distill

for read in distill.batches("cache", temperature=2.0, batch_tokens=4096):
    batch = read.to(model.device)
    hidden = model.base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    loss = distill.kd_loss(hidden, model.lm_head.weight, batch, kl_weight=0.9, ce_weight=0.1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
```

`examples/bare_loop.py` is this loop as a program, `examples/trainer.py` the same in transformers' `Trainer`, and
`examples/temperature_trap.ipynb` looks into a cache with pandas and matplotlib. Tests run all three.

- **Order.** `Batches.walk(start=…, epochs=…, rank=…, world_size=…)` is a pure function of its arguments and the cache:
  keep `batch.position` with your checkpoint and go on with `walk(start=position)`.
- **Several processes.** Give each its `rank`. Under a framework that shards data sets by itself, wrap `walk` in a data
  set of your own instead.
- **Shapes.** B sequences, S padded length, N trained tokens, K top-k, R coordinates, D hidden size, V ids that exist.
  Only trained tokens have targets, and nothing is to be shifted.
- **The student's vocabulary** must be the teacher's: `distill train` compares token maps, here you vouch for it.
- The head must be one tensor: gather a sharded one before `kd_loss`, or use `kd_loss_from_logits`.

This page is made by `python -m docs.api`, and a test compares it with the package.
"""


def page() -> str:
    """The page."""
    lines = [HEAD]
    for title, names in GROUPS.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += _entry(name, getattr(distill, name))
    lines += ["## Errors", "", "Children of `distill.DistillError`; [errors](errors.md) lists every message.", ""]
    lines += ["| name | also a | exit code | means |", "|---|---|---|---|"]
    for name in (name for name in distill.__all__ if hasattr(errors, name)):
        kind = getattr(errors, name)
        builtin = kind.__bases__[-1].__name__
        lines.append(f"| `{name}` | `{builtin}` | {kind.exit_code} | {(kind.__doc__ or '').partition(' (exit')[0]} |")
    return "\n".join(lines) + "\n"


def _entry(name: str, value: Any) -> list[str]:
    if not inspect.isclass(value):
        return [f"### `{name}`", "", *_function(value)]
    lines = [f"### `{name}`", "", *_described(value)]
    fields = _fields(value)
    if fields:
        lines += ["```python", *fields, "```", ""]
    properties: list[str] = []
    for member in MEMBERS.get(name, ()):
        found = vars(value)[member]
        function = _function_of(found)
        if isinstance(found, property):
            summary = " ".join((function.__doc__ or "").split("\n\n")[0].split())
            properties.append(f"- `{name}.{member}`: {summary.replace('``', '`')}")
        else:
            lines += [f"#### `{name}.{member}`", "", *_function(function)]
    return [*lines, *properties, ""] if properties else lines


def _function_of(found: Any) -> Any:
    """The plain function of a property or a static method."""
    return found.fget if isinstance(found, property) else getattr(found, "__func__", found)


def _function(function: Any) -> list[str]:
    node = _parsed(function)
    assert isinstance(node, ast.FunctionDef)
    node.body, node.decorator_list = [ast.Expr(ast.Constant(...))], []
    text = ast.unparse(node).removesuffix(":\n    ...")
    text = text.replace("(self, ", "(").replace("(self)", "()")
    return ["```python", *_wrapped(text), "```", "", *_described(function)]


def _wrapped(signature: str) -> list[str]:
    """The signature with spaces as one writes them, one parameter a line where all would be too long."""
    head, _, rest = signature.partition("(")
    inside, _, tail = rest.rpartition(")")
    depth, parts = 0, [""]
    for letter in inside:
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    parts = [re.sub(r"^\s*(\w+: .*?)=", r"\1 = ", part).strip() for part in parts]
    one_line = f"{head}({', '.join(parts)}){tail}"
    return [one_line] if len(one_line) <= 100 else [f"{head}(", *(f"    {part}," for part in parts), f"){tail}"]


def _fields(kind: type) -> list[str]:
    """The annotated fields of a dataclass as they are written, comments included."""
    if not hasattr(kind, "__dataclass_fields__"):
        return []
    node = _parsed(kind)
    assert isinstance(node, ast.ClassDef)
    lines = textwrap.dedent(inspect.getsource(kind)).splitlines()
    found = [lines[item.lineno - 1].strip() for item in node.body if isinstance(item, ast.AnnAssign)]
    return [line for line in found if not line.startswith("_")]


def _parsed(value: Any) -> ast.stmt:
    return ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]


def _described(value: Any) -> list[str]:
    """The docstring as Markdown: double backticks become single ones, indented equations stay code."""
    text = inspect.getdoc(value) or ""
    return [re.sub(r"``", "`", line) for line in text.splitlines()] + [""]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
