"""Hold README and docs/ to the code: Python names exist, commands parse, links lead somewhere."""

import ast
import builtins
import dataclasses
import importlib
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lm_eval._cli.harness import HarnessCLI
from transformers import HfArgumentParser

from configuration_retro import RetroConfig
from data_retro import DocumentStream
from evaluation_retro.cli import COMMANDS
from retrieval.cli import build_parser
from retrieval.parsing import parse_settings
from training_retro import DataArguments, ModelArguments, RetroTrainingArguments, parse_arguments
from training_retro.sampling import GenerateArguments

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
GUIDES = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which tells of what was, too
OUR_PACKAGES = (
    "configuration_retro",
    "modeling_retro",
    "retrieval",
    "data_retro",
    "evaluation_retro",
    "training_retro",
)
TEXT_EXISTS = ("prompt.txt", "demo_output/prompt.txt")  # files of the reader that a program opens while it parses


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(page, line, match[1], match[2]))
    return [block for block in found if block.language in languages]


def commands() -> list[Any]:
    """Return each command line as words; lines that end with a backslash are joined."""
    found = []
    for block in blocks("sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                found.append(pytest.param(words, id=f"{block}-{' '.join(words[:4])}"))
    return found


def inline_code(page: Path) -> list[str]:
    """Return what stands between single backticks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    if page.name == "coming_from_nanoretro.md":  # a row's first cell is nanoRETRO's
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.M)
    return re.findall(r"`([^`\n]+)`", text)


# --- Python ---------------------------------------------------------------------------------------


def python_pages() -> list[Path]:
    return sorted({block.page for block in blocks("python")})


@pytest.mark.parametrize("page", python_pages(), ids=name_of)
def test_python_uses_names_and_arguments_that_exist(page):
    # a page's blocks are read as one program: later ones use names of earlier ones
    tree = ast.parse("".join(block.text for block in blocks("python") if block.page == page))
    imported = dict(imports(tree))
    assigned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assigned |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            assert node.id in assigned | imported.keys() | vars(builtins).keys(), f"{node.id} is not defined"
        if isinstance(node, ast.Call):
            check_call(node, imported)


def imports(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Yield the names that a program imports, with the objects that are ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert importlib.util.find_spec(alias.name), f"{alias.name} cannot be imported"
                yield alias.asname or alias.name, None
        elif isinstance(node, ast.ImportFrom):
            is_ours = node.module.split(".")[0] in OUR_PACKAGES
            module = importlib.import_module(node.module) if is_ours else None
            assert is_ours or importlib.util.find_spec(node.module), f"{node.module} cannot be imported"
            for alias in node.names:
                assert not is_ours or hasattr(module, alias.name), f"{node.module} has no {alias.name}"
                yield alias.asname or alias.name, getattr(module, alias.name) if is_ours else None


def check_call(call: ast.Call, imported: dict[str, Any]) -> None:
    """Bind the call's arguments to the signature of what it calls, where that is ours."""
    path = ast.unparse(call.func).split(".")
    function = imported.get(path[0])
    for attribute in path[1:]:
        function = None if function is None else getattr(function, attribute)
    if function is None or any(isinstance(argument, ast.Starred) for argument in call.args):
        return
    named = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
    inspect.signature(function).bind(*call.args, **named)


def test_the_readme_and_the_quick_start_show_the_same_program():
    readme, quick_start = (
        [block.text for block in blocks("python") if block.page == ROOT / page]
        for page in ("README.md", "docs/quick_start.md")
    )
    assert readme == quick_start[:1]


# --- commands -------------------------------------------------------------------------------------


@pytest.fixture
def folder_of_a_reader(tmp_path, monkeypatch):
    """Enter a folder with the files that programs look at while they parse."""
    for part in ("examples", "benchmarks", "docs"):
        (tmp_path / part).symlink_to(ROOT / part)
    for name in TEXT_EXISTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    checkpoint = tmp_path / "runs" / "local" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("folder_of_a_reader")
@pytest.mark.parametrize("words", commands())
def test_commands_parse(words):
    if words[:2] == ["accelerate", "launch"]:
        words = launched(words[2:])
    match words:
        case ["python", "-m", "retrieval", *rest] | ["retro-kb", *rest]:
            build_parser().parse_args(rest)
        case ["python", "train_hf.py", *rest] | ["retro-train", *rest]:
            parse_arguments([*rest, "--bf16", "false"])  # here may be no GPU
        case ["python", "generate_hf.py", *rest] | ["retro-generate", *rest]:
            HfArgumentParser(GenerateArguments, allow_abbrev=False).parse_args_into_dataclasses(rest)
        case ["python", "-m", "evaluation_retro", command, *rest] | ["retro-eval", command, *rest]:
            kind = importlib.import_module(COMMANDS[command]).SETTINGS
            parse_settings((kind,), command, rest, lambda settings: None)
        case ["retro-lm-eval", *rest]:
            HarnessCLI()._parser.parse_args(rest)
        case ["python" | "bash", script, *rest]:
            check_script(script, rest)
        case ["make", *rest]:
            check_make([word for word in rest if "=" not in word])
        case ["pip", "install", what]:
            check_extras(what)
        case _:
            pytest.fail(f"no check for {words}")


def check_script(script: str, arguments: list[str]) -> None:
    source = (ROOT / script).read_text(encoding="utf-8")
    for flag in (word for word in arguments if word.startswith("--")):
        assert f'"{flag}"' in source, f"{script} has no {flag}"


def check_make(targets: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), f"the Makefile has no {target}"


def check_extras(installed: str) -> None:
    extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", installed)[1]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in extras.split(",") if extras else ():
        assert re.search(rf"^{extra} = \[", project, re.M), f"there is no extra {extra}"


def launched(words: list[str]) -> list[str]:
    """Return the command that `accelerate launch` runs, after a look at its configuration file."""
    while words[0].startswith("--"):
        if words[0] == "--config_file":
            assert Path(words[1]).is_file()
        words = words[2:]
    return ["python", *words]


@pytest.mark.usefixtures("folder_of_a_reader")
@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_settings_in_yaml_parse(block):
    Path("settings.yaml").write_text(block.text)
    parse_arguments(["settings.yaml", "--tokenizer_name", "gpt2", "--output_dir", "runs/yaml"])


# --- settings in prose ----------------------------------------------------------------------------


def known_settings() -> set[str]:
    dataclass_types = (ModelArguments, DataArguments, RetroTrainingArguments, GenerateArguments, RetroConfig)
    return {field.name for kind in (*dataclass_types, DocumentStream) for field in dataclasses.fields(kind)}


def known_flags() -> set[str]:
    subparsers = next(action for action in build_parser()._actions if action.dest == "command")
    flags = {flag for parser in subparsers.choices.values() for flag in parser._option_string_actions}
    return flags | {f"--{name}" for name in known_settings()} | {"--help"}


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_settings_named_in_prose_exist(page):
    for code in inline_code(page):
        if setting := re.fullmatch(r"([a-z]+(?:_[a-z]+)*): .+", code):
            assert setting[1] in known_settings()
        if not code.startswith(("accelerate ", "pip ")):
            assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) <= known_flags()


# --- links and the site ---------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
