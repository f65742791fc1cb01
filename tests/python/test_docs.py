"""The docs hold: Python blocks run, commands parse, links lead somewhere, messages are real.

A page's Python blocks run in order in one process, in a folder with a tiny model `my-model`. Only
what needs a GPU or several machines is fenced as ```python no-run.
"""

import ast
import functools
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer.main
import yaml
from transformers import LlamaForCausalLM

import halfbyte
import tiny_model
from formats import ROOT
from halfbyte.cli.main import app

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
IDS = [str(page.relative_to(DOCS)) for page in PAGES]
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.M | re.S)
# Reads ["folder", "block", ...] a line, runs those files in order in a process of their own, with
# the libraries loaded already, and answers with its exit code.
RUNNER = """
import json, os, signal, sys, traceback
import datasets, peft, torch, transformers

def run(folder, *blocks):
    signal.alarm(120)
    os.chdir(folder)
    output = os.open("output", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(open(block).read(), block, "exec"), names)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            run(*json.loads(line))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [match[3] for match in FENCE.finditer(text) if match[2] == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def tool(name: str):
    """A module of docs/tools."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A tiny Llama whose layers are long enough for whole pages of packed weights."""
    folder = tmp_path_factory.mktemp("docs") / "my-model"
    config = tiny_model.build_config(hidden_size=64, intermediate_size=256)
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_model.build_tokenizer().save_pretrained(folder)
    return folder


# --- Python --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runner():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", RUNNER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize(
    "page", with_blocks("python"), ids=lambda page: str(page.relative_to(DOCS))
)
def test_python_blocks_run(page, runner, tiny, tmp_path):
    (tmp_path / "my-model").symlink_to(tiny)
    names = []
    for i, code in enumerate(blocks(page, "python")):
        names.append(f"block-{i}.py")
        (tmp_path / names[-1]).write_text(code, encoding="utf-8")
    runner.stdin.write(json.dumps([str(tmp_path), *names]) + "\n")
    runner.stdin.flush()
    answer = runner.stdout.readline()
    assert answer == "0\n", (answer, (tmp_path / "output").read_text()[-3000:])


def test_fences_are_of_known_kinds():
    known = {"python", "python no-run", "sh", "json", "text", ""}
    for page in PAGES:
        kinds = {match[2] for match in FENCE.finditer(page.read_text(encoding="utf-8"))}
        assert kinds <= known, (page, kinds - known)
    unrun = [page for page in PAGES if blocks(page, "python no-run")]
    assert [page.name for page in unrun] == ["several-machines.md"]
    for code in blocks(unrun[0], "python no-run"):
        compile(code, str(unrun[0]), "exec")


# --- commands ------------------------------------------------------------------------------------


def calls(page: Path) -> list[list[str]]:
    """Arguments of each call of `halfbyte` in the page's shell blocks."""
    found = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "halfbyte" in words and "install" not in words:
                found.append(words[words.index("halfbyte") + 1 :])
    return found


COMMAND_PAGES = [page for page in with_blocks("sh") if calls(page)]


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_commands_parse(page):
    group = typer.main.get_command(app)
    for name, *arguments in calls(page):
        assert name in group.commands, name
        group.commands[name].make_context(name, list(arguments))  # raises on an unknown option


def test_the_reference_has_every_command_and_option():
    page = DOCS / "guide/commands.md"
    text = page.read_text(encoding="utf-8")
    commands = set(typer.main.get_command(app).commands)
    assert commands == set(re.findall(r"^<!-- options: (\w+) -->$", text, re.M))
    assert commands == set(re.findall(r"^## (\w+)$", text, re.M))
    assert tool("commands").filled(text) == text, "run: python docs/tools/commands.py"


# --- links and images ----------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor that the site gives a heading."""
    text = re.sub(r"[^\w\s-]", "", heading.encode("ascii", "ignore").decode()).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(page), re.M)}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_and_images_exist(page):
    for image, target in re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{target}: no such file"
        assert file.is_relative_to(ROOT), f"{target}: outside of the repository"
        if anchor and not image:
            assert anchor in anchors(file), f"{target}: no such heading"


class _Loader(yaml.SafeLoader):
    """mkdocs.yml names Python objects by tags; none of them matters here."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def test_every_page_is_in_the_navigation():
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)

    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        children = entry if isinstance(entry, list) else entry.values()
        return [page for child in children for page in pages(child)]

    assert sorted(pages(settings["nav"])) == IDS


def test_the_api_page_names_what_is_there():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    entries = re.findall(r"^::: (\S+)(?:\n    options:\n      members: (\S.*))?$", text, re.M)
    names = [name for name, _ in entries]
    assert len(names) == len(set(names)) > 20
    for name, members in entries:
        module, _, attribute = name.rpartition(".")
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError:
            found = getattr(importlib.import_module(module), attribute)
        assert found.__doc__, name
        listed = [] if members in ("", "false") else members.strip("[]").split(", ")
        for member in listed:
            assert getattr(found, member).__doc__, f"{name}.{member}"
        names += [f"{module}.{member}" for member in listed]
    public = {f"halfbyte.{name}" for name in halfbyte.__all__}
    assert public <= set(names)


# --- messages ------------------------------------------------------------------------------------


@functools.cache
def templates() -> str:
    """Every string of the Python source with … for what is put in, and the C++ source's words."""
    found = []
    for path in sorted((ROOT / "python/halfbyte").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(parts))
    for path in sorted((ROOT / "cpp").rglob("*")):
        if path.suffix in (".h", ".cpp"):
            found += re.findall(r'"((?:[^"\\]|\\.)*)"', path.read_text(encoding="utf-8"))
    return "\n".join(found)


def messages() -> list[str]:
    text = (DOCS / "guide/troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^### `+ ?(.*?) ?`+$", text, re.M)


def test_there_are_messages():
    assert len(messages()) > 40


@pytest.mark.parametrize("message", messages())
def test_messages_are_the_sources_own(message):
    for part in re.split(r"…|\. |; run: ", message):
        words = part.strip(" .()[];,:'")
        assert words in templates(), words


# --- drawings and versions -----------------------------------------------------------------------


class _Text(HTMLParser):
    """The words of an SVG."""

    def __init__(self):
        super().__init__()
        self.words = []

    def handle_data(self, data):
        self.words += data.split()


def test_drawings_are_what_the_script_draws():
    drawn = tool("drawings").DRAWINGS
    assert {path.name for path in (DOCS / "images").glob("*.svg")} == {f"{n}.svg" for n in drawn}
    for name, draw in drawn.items():
        file = DOCS / f"images/{name}.svg"
        assert file.read_text(encoding="utf-8") == draw(), "run: python docs/tools/drawings.py"
        text = _Text()
        text.feed(draw())
        assert len(text.words) > 10, name


def test_versions_agree():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.M)[0]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert newest == version == citation["version"]
    assert json.dumps(citation["references"]).find("QLoRA") >= 0
