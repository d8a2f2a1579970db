"""Commands, links and error texts of docs/ and the README are those of the program that is described."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import distill
from distill.__main__ import app
from distill.config import TrainConfig
from docs.pictures import NAMES, write_pictures
from tests.docs.caches import filled_cache

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every ``distill`` command in a page's shell blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = []
    for block in blocks:
        words = shlex.split(block.replace("\\\n", " ").replace("\ndistill ", "\n;; distill "), comments=True)
        for line in " ".join(shlex.quote(word) for word in words).split("';;'"):
            arguments = shlex.split(line)
            if arguments[:1] == ["distill"]:
                found.append(arguments[1:])
    return found


def test_pages_have_commands() -> None:
    assert len(commands(ROOT / "docs" / "quickstart.md")) == 11
    assert ["sql", "cache", "describe tokens"] in commands(ROOT / "docs" / "troubleshooting.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one_with_options_that_exist(page: Path) -> None:
    group = typer.main.get_command(app)
    for name, *arguments in commands(page):
        command = group.get_command(typer.Context(group), name)  # type: ignore[attr-defined]
        assert command is not None, name
        command.make_context(name, list(arguments))  # raises where an option or an argument is unknown


@pytest.mark.parametrize("name", ["quickstart.md", "troubleshooting.md"])
def test_commands_that_look_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled_cache(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    looking = [
        arguments
        for arguments in commands(ROOT / "docs" / name)
        if arguments[0] in ("init", "verify", "inspect", "sql", "report") and "run" not in arguments
    ]
    assert len(looking) >= 4
    for arguments in looking:
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, (arguments, done.output)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        if page.parent.name == "docs":
            assert linked.resolve().is_relative_to(page.parent), f"{target} would be dead in the built site"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    named = set(re.findall(r"[\w.-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} >= named
    for page in named:
        html = (tmp_path / "site" / page).with_suffix(".html").read_text(encoding="utf-8")
        assert not re.search(r'(?:src|href)="(?:https?:)?//(?!zensical\.org/")', html), page


def messages() -> list[str]:
    """Every text of the package, with … for what is put in."""
    found = []
    for path in Path(distill.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_errors_of_troubleshooting_are_the_programs() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `(.*)`$", text, flags=re.MULTILINE)
    assert len(headings) >= 15
    known = messages()
    for heading in headings:
        pattern = ".*".join(re.escape(part) for part in heading.split("…"))
        assert any(re.fullmatch(pattern, message, flags=re.DOTALL) for message in known), heading


def test_pictures_are_drawn_by_their_script(tmp_path: Path) -> None:
    filled_cache(tmp_path / "cache")
    drawn = write_pictures(tmp_path / "cache", tmp_path / "pictures")
    concepts = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    assert [path.name for path in drawn] == list(NAMES.values())
    for path in drawn:
        assert f"(pictures/{path.name})" in concepts
        committed = (ROOT / "docs" / "pictures" / path.name).read_text(encoding="utf-8")
        assert "var(--series-1)" in committed
        assert "prefers-color-scheme: dark" in committed


def test_the_stages_of_concepts_are_the_defaults() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([123]) \| [^|]* \| (\d+) \| (.*) \|$", text, flags=re.MULTILINE)
    config = TrainConfig(cache="c", student="s", out="o")
    assert [row[0] for row in rows] == ["1", "2", "3"]
    for number, temperature, losses in rows:
        stage = config.stage(int(number))
        assert stage.temperature == float(temperature)
        written = {name.lower(): float(weight) for weight, name in (loss.split() for loss in losses.split(" + "))}
        assert written == {name: weight for name, weight in stage.weights.model_dump().items() if weight}
