"""The documentation site builds without a warning, needs no network, and lists every option.

The site is built twice: 8 s on an idle machine.
"""

import os
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest

import flexunet
from data_prep.config import PrepConfig
from flexunet.errors import EXIT_CODES
from flexunet.settings import fields_of
from job.config import TrainConfig
from launcher.commands.root import command as root
from tests.source_tree import ROOT


class Html(HTMLParser):
    """The ids, links and resources of a page of the site."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in ("script", "img", "iframe", "source") and "src" in values:
            self.resources.append(values["src"])
        elif tag == "link":
            self.resources.append(values["href"])


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    options = ["--config-file", str(config), "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run([*command, *options], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr
    return folder


def commands(group: click.Group, title: str) -> dict[str, click.Command]:
    """Returns every command below `group` by what is typed."""
    found: dict[str, click.Command] = {}
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found[f"{title} {name}"] = command
        if isinstance(command, click.Group):
            found |= commands(command, f"{title} {name}")
    return found


def sections(site: Path) -> dict[str, str]:
    """Returns the text of each section of the CLI reference by its heading's id."""
    html = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    parts = re.split(r'<h[23] id="([^"]+)">', html)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_cli_reference_has_every_command_and_option(site: Path) -> None:
    found = sections(site)
    for title, command in commands(root, "flexunet").items():
        text = unescape(found[title.replace(" ", "-")])
        if re.match("flexunet launch ", title):
            base = title.replace(" launch ", " ")
            assert f'all options of <a href="#{base.replace(" ", "-")}">' in text
            text += unescape(found[base.replace(" ", "-")])
        options = [each for each in command.params if isinstance(each, click.Option)]
        for option in options:
            name = option.opts[-1]
            if option.secondary_opts:
                name = re.sub(r"^(--(?:.*\.)?)", r"\1[no-]", option.opts[0])
            assert f"<code>{name}</code>" in text, (title, name)


def test_settings_reference_has_every_key(site: Path) -> None:
    html = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    for cls in (PrepConfig, TrainConfig):
        for path, _ in fields_of(cls):
            assert f"<code>{'.'.join(path)}</code>" in html


def test_python_reference_has_every_name(site: Path) -> None:
    ids = Html(site / "reference" / "python.html").ids
    names = [name for name in flexunet.__all__ if not name.startswith("_")]
    assert [name for name in names if f"flexunet.{name}" not in ids] == []


def test_exit_codes_are_listed(site: Path) -> None:
    html = unescape((site / "reference" / "exit-codes.html").read_text(encoding="utf-8"))
    for code, meaning in EXIT_CODES.items():
        assert re.search(f"<td[^>]*><code>{code}</code></td><td[^>]*>{re.escape(meaning)}<", html)


def test_links_and_anchors_lead_somewhere(site: Path) -> None:
    pages = {path: Html(path) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in [*page.links, *page.resources]:
            parts = urlsplit(link)
            if parts.scheme or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                broken.append(f"{path.relative_to(site)}: {link}")
            elif parts.fragment and target in pages:
                known = {"__search", "__toc"} | pages[target].ids
                broken += [link] if unquote(parts.fragment) not in known else []
    assert len(pages) > 10
    assert broken == []


def test_nothing_is_loaded_from_the_internet(site: Path) -> None:
    for path in site.rglob("*.html"):
        addresses = [each for each in Html(path).resources if urlsplit(each).netloc]
        assert addresses == [], path
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert not [each for each in styles if re.search(r"url\([\"']?(https?:)?//", each)]


def test_search_works_from_a_folder(site: Path) -> None:
    """Browsers start no worker from a folder and fetch no JSON: both are scripts there."""
    assert (site / "search" / "search_index.js").stat().st_size > 50_000
    assert "assets/iframe-worker.js" in Html(site / "index.html").resources


def test_broken_links_fail_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    links = "[a](nowhere.md) [b](index.md#nowhere) [c](../nowhere.py)"
    (tmp_path / "docs" / "index.md").write_text(f"# Title\n\n{links}\n")
    config = (ROOT / "mkdocs.yml").read_text()
    config = config.replace("docs/generate.py", f"{ROOT}/docs/generate.py")
    config = re.sub(r"(?ms)^nav:.*?(?=^\S)", "", config)
    (tmp_path / "mkdocs.yml").write_text(config)
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 1
    for problem in ("nowhere.md", "#nowhere", "../nowhere.py, which does not exist"):
        assert problem in done.stderr
