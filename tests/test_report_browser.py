"""The report in a real browser: everything fits a phone and is large enough to read, offline."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.test_report import page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt install chromium")

# The page in a frame as wide as a phone: how wide it became, and its letters' height in pixels.
_MEASURE = """
const page = document.getElementById("page").contentDocument;
const heights = [...page.querySelectorAll("text, td, p, figcaption, span, pre")]
  .map(e => [e.getBoundingClientRect().height, e.textContent]).filter(h => h[1].trim());
const svgs = [...page.querySelectorAll("svg")].map(e => e.getBoundingClientRect().width);
document.getElementById("out").textContent = JSON.stringify({
  width: page.documentElement.scrollWidth, smallest: heights.sort((a, b) => a[0] - b[0])[0],
  svgs: svgs, outside: performance.getEntriesByType("resource").length});
"""


def run(folder: Path, *options: str) -> str:
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",  # as root there is none
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder / 'profile'}",
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def measured(folder: Path, text: str, width: int) -> dict[str, Any]:
    frame = folder / "frame.html"
    frame.write_text(
        f'<iframe id="page" width="{width}" height="800" frameborder="0" '
        f'srcdoc="{html.escape(text)}"></iframe><pre id="out"></pre>'
        f"<script>window.onload = () => {{ {_MEASURE} }}</script>",
        encoding="utf-8",
    )
    dom = run(folder, "--virtual-time-budget=5000", "--dump-dom", frame.as_uri())
    found = re.search(r'<pre id="out">(.+?)</pre>', dom)
    assert found, dom[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", [390, 1100])
def test_the_page_fits_and_can_be_read(tmp_path: Path, width: int) -> None:
    long_text = page(figures=[("a" * 30, "b " * 60)], samples=[])
    found = measured(tmp_path, long_text, width)
    assert found["width"] <= width
    assert found["smallest"][0] >= 10, found["smallest"]
    assert min(found["svgs"]) > 0.85 * min(width, 700)
    assert found["outside"] == 0


def test_a_page_too_wide_or_too_small_would_be_seen(tmp_path: Path) -> None:
    wide = page().replace("</h1>", '</h1><div style="width:900px">x</div>')
    assert measured(tmp_path, wide, 390)["width"] > 390
    small = page().replace("font-size: 20px", "font-size: 8px")
    assert measured(tmp_path, small, 390)["smallest"][0] < 10


def test_a_screenshot_shows_the_curves(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page(), encoding="utf-8")
    picture = tmp_path / "report.png"
    run(tmp_path, "--window-size=1100,2000", f"--screenshot={picture}", file.as_uri())
    raw = picture.read_bytes()
    assert raw.startswith(b"\x89PNG")
    assert len(raw) > 20_000  # an empty page takes a few kilobytes
