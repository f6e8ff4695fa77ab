"""Writes .dvc/plots_page.html, in which ``dvc plots show`` and ``dvc plots diff`` draw without a network.

DVC's own page loads its renderer from elsewhere; this one holds it (Vega, from vl-convert-python). ``--check`` only
compares, after an update of that package.
"""

import sys
from pathlib import Path

import vl_convert

PAGE = Path(__file__).resolve().parents[1] / ".dvc" / "plots_page.html"
TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{refresh_tag}
<title>Plots of DVC</title>
<link rel="icon" href="data:,">
<style>body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem; } body > div { margin-bottom: 2rem; }</style>
<script>RENDERER</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def page() -> str:
    return TEMPLATE.replace("RENDERER", vl_convert.javascript_bundle())


def main() -> None:
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit("error: .dvc/plots_page.html is not of the installed vl-convert-python; run 'python "
                 "tasks/plots_page.py'")


if __name__ == "__main__":
    main()
