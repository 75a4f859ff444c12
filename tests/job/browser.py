"""Shows pages in headless Chromium, and returns what a script finds in them."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

CHECKS = Path(__file__).with_name("page_checks.js")
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
_AROUND = """<!doctype html><meta charset="utf-8"><pre id="found"></pre><script>
const found = {};
window.addEventListener("message", (event) => {
  const frame = [...document.querySelectorAll("iframe")].find(
    (each) => each.contentWindow === event.source);
  found[frame.name] = event.data;
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>
"""


def chromium() -> str:
    """Returns the path of Chromium; skips the test without one."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium: install the Debian package of this name")
    return found


def checked_pages(
    pages: Mapping[str, str], folder: Path, widths: Sequence[int] = (360, 1400)
) -> dict[tuple[str, int], dict[str, Any]]:
    """Returns what `page_checks.js` finds in each of `pages`, HTML by name, at each width."""
    script = f"<script>{CHECKS.read_text()}</script>"
    frames = []
    for name, text in pages.items():
        # The policy of the page forbids scripts.
        path = folder / f"{name}.html"
        path.write_text(_POLICY.sub("", text).replace("</body>", f"{script}</body>"))
        frames += [
            f'<iframe name="{html.escape(name)} {width}" src="{path.name}" width="{width}" '
            f'height="800" style="border: 0"></iframe>'
            for width in widths
        ]
    around = folder / "around.html"
    around.write_text(_AROUND + "\n".join(frames))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--window-size=1500,900"]
    done = subprocess.run(
        [chromium(), *flags, "--dump-dom", f"file://{around}"],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stderr
    found = json.loads(html.unescape(match[1]))
    return {(name, width): found[f"{name} {width}"] for name in pages for width in widths}
