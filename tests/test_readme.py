"""Checks the commands, options and files in the README, the pages of docs/ and the Makefile.

Runs no command, but parses each with its real parser, so that a renamed option, an invalid choice
or a missing argument fails here.
"""

import ast
import functools
import importlib
import json
import re
import shlex
import statistics
import subprocess
from collections.abc import Iterator

import click
import pytest

from flexunet.settings import parse_settings, read_yaml
from job.config import TrainConfig
from launcher.commands.launch import COMMANDS as LAUNCH_COMMANDS
from launcher.commands.root import COMMANDS
from tests.source_tree import PACKAGES as OWN_PACKAGES
from tests.source_tree import ROOT, python_files

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Path -> text of every page for users and developers.
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
}
# These pages have commands of other programs, and their own options.
OTHER_PAGES = ("k8s/README.md", "benchmarks/README.md")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(?:sh|bash|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Programs of the system that a line may call; their options are not checked.
OTHERS = {"cd", "ray", "source", "export", "uv", "tensorboard"}
OTHER_OPTIONS = {"--head", "--logdir"}  # of `ray start` and `tensorboard`
PACKAGES = {"data_prep": "data_prep.cli", "data_prep.phantoms": "data_prep.phantoms.cli"}


def shell_lines(text: str) -> list[str]:
    """Returns the command lines of the shell blocks in Markdown `text`, continued lines joined."""
    blocks = "\n".join(match[1] for match in BLOCK.finditer(text))
    lines = blocks.replace("\\\n", " ").splitlines()
    stripped = [line.strip().removeprefix("$ ") for line in lines]
    return [line for line in stripped if line and not line.startswith("#")]


def recipe_lines(text: str) -> list[str]:
    """Returns the lines of recipes in the Makefile `text` that call this project's commands."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [line.strip() for line in lines if re.match(r"\t@?(flexunet|python -m) ", line)]
    return [line.removeprefix("@").replace("$$", "$") for line in found]


def calls(line: str) -> Iterator[list[str]]:
    """Yields the arguments of each program that a line calls, without comments and variables."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if re.fullmatch(r"[&|;]+", word):
            if words:
                yield words
            words = []
        elif words or not re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", word):
            words.append(word)


def command_of(module: str) -> click.Command:
    command = importlib.import_module(PACKAGES.get(module, module)).command
    assert isinstance(command, click.Command)
    return command


def check(words: list[str]) -> None:
    """Raises an error if a program, command, target, option or value of a call does not exist."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):(?!=)", MAKEFILE, re.MULTILINE)
        wrong = [each for each in rest if each not in targets and "=" not in each]
        if wrong:
            raise ValueError(f"make has no target {wrong[0]!r}")
    elif program == "git":
        known = subprocess.check_output(["git", "--list-cmds=main"], text=True).split()
        if not rest or rest[0] not in known:
            raise ValueError(f"git has no command {rest[:1]}")
    elif program == "flexunet":
        if rest[:1] in (["--help"], ["--version"]):
            return
        check_flexunet(rest)
    elif re.fullmatch(r"(\S*/)?python[0-9.]*", program) and "-m" in rest[:2]:
        rest = rest[rest.index("-m") :]
        parse(command_of(rest[1]), rest[2:])
    elif program not in OTHERS:
        raise ValueError(f"unknown program {program!r}")


def check_flexunet(words: list[str]) -> None:
    """Raises an error if `flexunet` does not accept these arguments; also checks subcommands."""
    commands = COMMANDS
    if words[:1] == ["launch"] and words[1:2] != ["--help"]:
        words, commands = words[1:], LAUNCH_COMMANDS
    if not words or words[0] not in commands:
        raise ValueError(f"flexunet has no command {words[:1]}")
    parse(command_of(commands[words[0]][0]), words[1:])
    if words[0] == "submit" and "--" in words:
        # Hands on `flexunet launch COMMAND ...`, or the command itself where a cluster is no use.
        job = words[words.index("--") + 1 :]
        check_flexunet(["launch", *job] if job[:1] and job[0] in LAUNCH_COMMANDS else job)


def parse(command: click.Command, arguments: list[str]) -> None:
    """Parses `arguments` like `command`; a config file of this project must be valid too."""
    if "--help" in arguments:
        arguments = [each for each in arguments if each != "--help"]
        command.make_context("command", arguments, resilient_parsing=True)
        return
    context = command.make_context("command", arguments)
    file = context.params.get("file")
    if file is not None and (ROOT / file).is_file():
        parse_settings(TrainConfig, read_yaml((ROOT / file).read_text(), file), file)


def own_options() -> set[str]:
    members = [*COMMANDS.values(), *LAUNCH_COMMANDS.values()]
    commands = [command_of(module) for module, _ in members]
    options = [each for command in commands for each in command.params]
    names = {name for each in options for name in (*each.opts, *each.secondary_opts)}
    return names | {"--help", "--version"}


def typed_lines() -> list[str]:
    pages = [line for text in PAGES.values() for line in shell_lines(text)]
    return list(dict.fromkeys([*pages, *recipe_lines(MAKEFILE)]))


def code_words(text: str) -> set[str]:
    """Returns the words of all inline code, without code blocks."""
    prose = re.sub(r"^( *)```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return {word for code in re.findall(r"`([^`\n]+)`", prose) for word in code.split()}


def missing_paths(text: str) -> list[str]:
    """Returns the missing files of the project that inline code names."""
    top = "|".join([*OWN_PACKAGES, "docs", "k8s", "benchmarks", "tests"])
    form = re.compile(rf"({top})/[^A-Z<]*(/|\.[a-z0-9]+)")
    named = {word for word in code_words(text) if form.fullmatch(word)}
    return sorted(word for word in named if not any(ROOT.glob(word)))


def test_pages_have_commands() -> None:
    for page in ("README.md", "docs/tutorials/first-model.md"):
        programs = {words[0] for line in shell_lines(PAGES[page]) for words in calls(line)}
        assert {"make", "flexunet"} <= programs


@pytest.mark.parametrize("line", typed_lines())
def test_command_can_be_typed(line: str) -> None:
    for words in calls(line):
        check(words)


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"CONTRIBUTING.md"}))
def test_options_named_in_the_text_exist(page: str) -> None:
    words = {word.strip("`,;:.") for word in code_words(PAGES[page])}
    options = {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}
    assert options - own_options() - OTHER_OPTIONS == set()


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES])
def test_files_named_in_the_text_exist(page: str) -> None:
    assert missing_paths((ROOT / page).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES])
def test_linked_files_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (ROOT / page).parent.joinpath(link).exists()] == []


@functools.cache
def texts_of_the_code() -> str:
    """Returns all strings of the four packages, without interpolated values."""
    return "\n".join(
        node.value if isinstance(node, ast.Constant) else "".join(map(_constant, node.values))
        for path in python_files()
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    )


def _constant(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else "{}"


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    text = PAGES["docs/troubleshooting.md"]
    messages = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(messages) > 20
    gone = [each for each in messages if each not in texts_of_the_code()]
    assert not gone, "\n".join(["docs/troubleshooting.md names messages that changed:", *gone])


def test_a_file_that_does_not_exist_is_found() -> None:
    text = "See `job/nowhere.py`, `job/train.py`, `data_prep/` and `benchmarks/results/NAME.json`."
    assert missing_paths(text) == ["job/nowhere.py"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("flexunet train --epoch 3", "'--epoch'"),
        ("flexunet train --local \\\n  --model.layers 3", "'--model.layers'"),
        ("flexunet evaluate", "(?i)missing argument"),
        ("flexunet evaluate run --split all", "'all' is not one of"),
        ("flexunet trian", "no command"),
        ("flexunet trian --help", "no command"),
        ("flexunet prep a b extra", "unexpected extra argument"),
        ("flexunet launch evaluate run", "no command"),
        ("flexunet launch train --workers 2", "'--workers'"),
        ("flexunet submit --address http://h:1 -- train --workers 2", "'--workers'"),
        ("python -m job.train --epochs x", "not a valid int"),
        ("python -m data_prep a b --sizes 3", "'--sizes'"),
        ("cd x && FOO=1 flexunet infer --batch 3 a b", "'--batch'"),
        ("make dmeo", "no target 'dmeo'"),
        ("git clon url", "git has no command"),
        ("flexnet train", "unknown program"),
    ],
)
def test_a_command_that_cannot_work_is_found(line: str, message: str) -> None:
    (joined,) = shell_lines(f"text\n```sh\n{line}\n```\n")
    with pytest.raises((ValueError, click.ClickException)) as caught:
        for words in calls(joined):
            check(words)
    error = caught.value
    text = error.format_message() if isinstance(error, click.ClickException) else str(error)
    assert re.search(message, text)


@pytest.mark.parametrize(
    "line",
    [
        "$ flexunet doctor  # what this machine has",
        "flexunet prep IMAGES gs://bucket/data --group-regex '^(p[0-9]+)' --image-size 256",
        "flexunet train --help",
        "python -m data_prep --help",
        "git clone https://example.org/a.git && cd a && make demo",
        "make test PYTHON=python3.12",
    ],
)
def test_a_command_that_works_passes(line: str) -> None:
    (joined,) = shell_lines(f"```bash\n{line}\n```\n")
    for words in calls(joined):
        check(words)


def test_numbers_of_a_step_are_those_that_were_measured() -> None:
    text = " ".join(README.split())
    found = re.search(r"takes ([0-9.]+) s in float32, ([0-9.]+) of the machine's rate", text)
    assert found is not None
    path = ROOT / "benchmarks" / "results" / "step-512-float32.json"
    ours = json.loads(path.read_text(encoding="utf-8"))["ours"]
    medians = [statistics.median(ours[key]) for key in ("step_s", "share_of_matmul_rate")]
    assert list(found.groups()) == [f"{median:.2f}" for median in medians]
