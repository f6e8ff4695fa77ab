"""The page in headless Chromium: charts in place of drawings, tables that sort, no request, no error, no overflow."""

import html
import json
import re
import shutil
import subprocess

import pytest

from hobs_rspar.config import load
from hobs_rspar.evidence.report import write
from synthetic_cells import METHODS, make_study

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
PROBE = """<!doctype html><iframe id="frame" src="index.html" style="width: {width}px; height: 900px"></iframe>
<pre id="found"></pre><script>
const wait = () => new Promise(done => setTimeout(done, 50));
frame.onload = async () => {{
  const page = frame.contentDocument, charts = page.querySelectorAll(".chart");
  const blank = () => [...charts].some(chart => !chart.querySelector("svg.marks"));
  for (let tries = 0; tries < 400 && blank(); tries++) await wait();
  const column = (table, place) => [...table.tBodies[0].rows].map(row => row.cells[place].textContent.trim());
  const table = page.querySelector("#T1 table"), heading = table.tHead.rows[0].cells[2];
  const sorted = [];
  for (let clicks = 0; clicks < 2; clicks++) {{
    heading.querySelector("button").click();
    sorted.push([heading.ariaSort, column(table, 2)]);
  }}
  const select = page.querySelector("#chart-explorer select"), marks = () =>
    [...page.querySelectorAll("#chart-explorer .mark-rect path, #chart-explorer .mark-tick path")].length;
  select.value = "l1";
  select.dispatchEvent(new frame.contentWindow.Event("input"));
  await wait();
  found.textContent = JSON.stringify({{
    charts: [...charts].map(chart => [chart.id, chart.querySelectorAll("svg.marks").length]),
    drawings: page.querySelectorAll("figure img").length, sorted, marks: marks(),
    explored: page.querySelector("#chart-explorer select").value,
    focusable: page.querySelectorAll("th button").length,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    requests: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name)}});
}};
</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    study = make_study(tmp_path_factory.mktemp("page"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(study)
        write(load())
    return study / "reports/default"


def seen(folder, width: int, *flags: str) -> tuple[dict, str]:
    """What a script sees on the page at a width, and what the browser logged."""
    (folder / "probe.html").write_text(PROBE.format(width=width))
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
                           "--enable-logging=stderr", "--virtual-time-budget=30000", f"--window-size={width + 40},1000",
                           *flags, "--dump-dom", (folder / "probe.html").as_uri()], capture_output=True, text=True,
                          timeout=300)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], done.stderr
    return json.loads(html.unescape(found[1])), done.stderr


@needs_chromium
@pytest.mark.parametrize("width,flags", [(1280, ()), (390, ("--force-dark-mode",))])
def test_in_a_browser(folder, width, flags):
    found, log = seen(folder, width, *flags)
    assert {count for _, count in found["charts"]} == {1} and len(found["charts"]) >= 8
    assert found["drawings"] == 0  # every drawing of this study has given way to its chart
    assert found["overflow"] <= 0
    assert not [name for name in found["requests"] if not name.startswith("data:")]
    assert found["explored"] == "l1" and found["marks"] > 0
    (first, up), (second, down) = found["sorted"]
    numbers = [float(cell.split()[0]) for cell in up]
    assert (first, second) == ("ascending", "descending") and numbers == sorted(numbers)
    assert down == up[::-1] and len(up) == len(METHODS)
    problems = [line for line in log.splitlines() if "CONSOLE" in line and re.search("error|uncaught|warn", line, re.I)]
    assert not problems


def test_without_scripts_everything_can_be_read(folder):
    page = (folder / "index.html").read_text()
    assert page.count("<img src=\"data:image/svg+xml") >= 8 and "<noscript>" in page
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", page)


def test_every_method_is_explained(folder):
    page = (folder / "index.html").read_text()
    section = page[page.index('<section id="methods">'):page.index('<section id="missing">')]
    for method in METHODS:
        assert f"</span>{method}: " in section
