"""Fills the generated parts of the documentation site; MkDocs calls the `on_` functions.

A page names a generated part by a comment of its own line: `<!-- generated: commands -->`. README
files outside of `docs/` become pages, too (`PAGES`). A link from a page to a file of the project
leads to that file's page; a file that has none is named, not linked.
"""

import html
import inspect
import posixpath
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# File of the project -> its place in the site.
PAGES = {
    "k8s/README.md": "how-to/kubernetes.md",
    "benchmarks/README.md": "reference/benchmarks.md",
    "benchmarks/results/ratios.png": "assets/ratios.png",
    "ARCHITECTURE.md": "explanation/architecture.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "LICENSE": "project/licence.txt",
}
FILES = {place: name for name, place in PAGES.items()}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]*)(#[^()\s]*)?\)")
FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z.-]*[a-z])")
DEFAULT = re.compile(r"\s*\[(?:default:\s*(.*?)|(required))\]$")
TYPES = {"int": "integer", "float": "number", "str": "text", "bool": "true or false"}
LOG = get_plugin_logger("generate")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and images that are not in `docs/`."""
    for name, place in PAGES.items():
        path = ROOT / name
        content = path.read_bytes() if path.suffix == ".png" else path.read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills the generated parts of a page, and mends its links to files of the project."""
    place = page.file.src_uri
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]  # a list of one page
    if place == "project/changelog.md":
        page.meta["search"] = {"exclude": True}  # it would be found first, for any word
    markdown = MARKER.sub(lambda match: PARTS[match[1]](), markdown)
    source = FILES.get(place, f"docs/{place}")
    pieces, end = [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [_with_links(markdown[end : fence.start()], source, place), fence[0]]
        end = fence.end()
    return "".join([*pieces, _with_links(markdown[end:], source, place)])


def _with_links(markdown: str, source: str, place: str) -> str:
    """Returns the text of the file `source` with links that work from `place` in the site."""

    def replaced(match: re.Match[str]) -> str:
        image, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        name = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        found = PAGES.get(name)
        if found is None and name.startswith("docs/"):
            found = name.removeprefix("docs/")
        if found is None:
            if not (ROOT / name).exists():
                LOG.warning(f"{source} links to {target}, which does not exist")
            return text if text.startswith("`") else f"{text} (`{name}`)"
        target = posixpath.relpath(found, posixpath.dirname(place) or ".")
        return f"{image}[{text}]({target}{anchor})"

    return LINK.sub(replaced, markdown)


def commands() -> str:
    """Returns a section for each command of `flexunet`, with every option."""
    from launcher.commands.root import command as root

    lines = []
    for name, command in _commands_of(root):
        if isinstance(command, click.Group):
            lines += _section(f"flexunet {name}", command)
            for below, member in _commands_of(command):
                lines += _launch_section(root, f"flexunet {name} {below}", member)
        else:
            lines += _section(f"flexunet {name}", command)
    return "\n".join(lines)


def phantoms() -> str:
    """Returns the section of the command that makes synthetic data."""
    from data_prep.phantoms.cli import command

    return "\n".join(_section("python -m data_prep.phantoms", command))


def exit_codes() -> str:
    """Returns the table of exit codes."""
    from flexunet.errors import EXIT_CODES

    rows = [(f"<code>{code}</code>", _html(text)) for code, text in EXIT_CODES.items()]
    return _table(("code", "meaning"), rows)


def settings() -> str:
    """Returns the tables of every settings class, with the allowed values."""
    from data_prep.config import PrepConfig
    from job.config import TrainConfig
    from job.evaluation.pipeline import EvaluateConfig
    from job.exporting.options import ExportConfig
    from job.inference.options import InferConfig
    from launcher.config import LaunchConfig

    lines = []
    for title, cls in (
        ("prep", PrepConfig),
        ("train", TrainConfig),
        ("evaluate", EvaluateConfig),
        ("infer", InferConfig),
        ("export", ExportConfig),
        ("launch train", LaunchConfig),
    ):
        lines += [f"## {title}", "", *_settings_tables(title, cls)]
    return "\n".join(lines)


def api() -> str:
    """Returns an entry for each name of `flexunet.__all__`: functions, classes, errors."""
    import flexunet

    sections: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors": []}
    for name in flexunet.__all__:
        if not name.startswith("_"):
            kind = "Functions" if name[0].islower() else "Classes"
            sections["Errors" if name.endswith("Error") else kind].append(name)
    lines = []
    for title, names in sections.items():
        if names:
            lines += [f"## {title}", "", *(f"::: flexunet.{name}\n" for name in names)]
    return "\n".join(lines)


def _commands_of(group: click.Group) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield name, command


def _section(title: str, command: click.Command, base: click.Command | None = None) -> list[str]:
    """Returns the section of one command.

    Args:
        base: a command that has a section; its options are not listed again.
    """
    level = "###" if title.startswith("flexunet launch ") else "##"
    context = click.Context(command, info_name=title)
    usage = " ".join([title, *command.collect_usage_pieces(context)])
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    text = "".join(f"<p>{_html(' '.join(each.split()))}</p>\n" for each in paragraphs)
    lines = [f"{level} {title}", "", "```text", usage, "```", "", text]
    known = {_name_of(each): each.help for each in (_options_of(base) if base else [])}
    groups: dict[Any, list[tuple[str, ...]]] = {None: []}
    for option in _options_of(command):
        if known.get(_name_of(option)) != option.help:
            groups.setdefault(getattr(option, "group", None), []).append(_row_of(option, context))
    for group, rows in groups.items():
        if group is not None:
            lines += [f"<p><strong>{_html(_summary_of(group))}</strong></p>", ""]
        if rows:
            lines += [_table(("option", "default", "meaning"), rows), ""]
    return lines


def _launch_section(root: click.Group, title: str, command: click.Command) -> list[str]:
    """Returns the section of `flexunet launch COMMAND`, without the options of COMMAND."""
    name = title.split()[-1]
    base = root.get_command(click.Context(root), name)
    assert base is not None
    own = {_name_of(each) for each in _options_of(command)}
    missing = [f"`{each}`" for each in map(_name_of, _options_of(base)) if each not in own]
    but = f" except {', '.join(missing)}" if missing else ""
    link = f"[`flexunet {name}`](#flexunet-{name})"
    return [*_section(title, command, base), f"Also all options of {link}{but}.", ""]


def _options_of(command: click.Command) -> list[click.Option]:
    return [each for each in command.params if isinstance(each, click.Option)]


def _name_of(option: click.Option) -> str:
    """Returns the name of an option; the two names of a switch as one: `--[no-]cache`."""
    if not option.secondary_opts:
        return option.opts[-1]
    *groups, leaf = option.opts[0].removeprefix("--").split(".")
    return "--" + ".".join([*groups, f"[no-]{leaf}"])


def _row_of(option: click.Option, context: click.Context) -> tuple[str, str, str]:
    """Returns (name and value, default, meaning) of an option, as HTML."""
    record = option.get_help_record(context)
    assert record is not None
    text = record[1].replace("\u00a0", " ")
    default = ""
    if found := DEFAULT.search(text):
        text = text[: found.start()]
        default = found[2] or _code(found[1])
    name, _, value = record[0].partition(" ")
    values = ", ".join(value.split("|"))
    return f"{_code(name)} {html.escape(values)}".strip(), default, _html(text)


def _settings_tables(title: str, cls: Any, prefix: str = "") -> list[str]:
    """Returns the table of a settings class, then those of its groups."""
    rows, groups = [], []
    has_identity = title in ("prep", "train")
    for name, field in cls.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            groups.append((name, field.annotation))
            continue
        change = (
            ("yes" if field.json_schema_extra["not_identity"] else "no",) if has_identity else ()
        )
        row = (_code(prefix + name), _values_of(field), _default_of(field))
        rows.append((*row, *change, _html(field.description or "")))
    change = ("may change",) if has_identity else ()
    lines = [_table(("key", "values", "default", *change, "meaning"), rows), ""]
    for name, group in groups:
        lines += [f"### {title}: {name}", "", f"<p>{_html(_summary_of(group))}</p>", ""]
        lines += _settings_tables(title, group, f"{prefix}{name}.")
    return lines


def _values_of(field: Any) -> str:
    """Returns the choices of a field, or its type and the bounds of its value."""
    kind = str(field.annotation)
    if "Literal" in kind:
        return ", ".join(map(_code, re.findall(r"'([^']+)'", kind)))
    kind = getattr(field.annotation, "__name__", kind)
    words = ["list"] if "tuple" in kind else [TYPES[each] for each in TYPES if each in kind]
    for constraint in field.metadata:
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            if getattr(constraint, name, None) is not None:
                words.append(f"{sign}\u00a0{_number(getattr(constraint, name))}")
    return html.escape(", ".join(words))


def _default_of(field: Any) -> str:
    value = field.default
    if value is None:
        return _code("null")
    if isinstance(value, bool):
        return _code(str(value).lower())
    if isinstance(value, tuple):
        return _code(f"[{', '.join(map(_number, value))}]")
    return _code(_number(value))


def _number(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _summary_of(cls: type) -> str:
    return " ".join((cls.__doc__ or "").split())


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Returns a table of HTML; a table of Markdown has no place for `|` in code."""
    lines = [
        "<div class=options><table>",
        "<thead><tr>",
        *(f"<th>{each}</th>" for each in head),
        "</tr></thead>",
    ]
    lines.append("<tbody>")
    for row in rows:
        cells = "".join(
            f'<td data-column="{name}">{cell}</td>' for name, cell in zip(head, row, strict=True)
        )
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _html(text: str) -> str:
    """Returns a text of the code as HTML; names of options are set as code."""
    parts = re.split(r"`([^`]+)`", text)
    for i, part in enumerate(parts):
        plain = html.escape(part, quote=False)
        parts[i] = _code(part) if i % 2 else OPTION.sub(r"<code>\1</code>", plain)
    return "".join(parts)


def _code(text: str) -> str:
    return f"<code>{html.escape(text, quote=False)}</code>"


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "phantoms": phantoms,
    "exit-codes": exit_codes,
    "settings": settings,
    "api": api,
}
