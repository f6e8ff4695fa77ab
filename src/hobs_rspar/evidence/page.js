// What the page does in a browser: charts in place of drawn figures, tables that sort by a click on a heading.
"use strict";

for (const [name, chart] of Object.entries(JSON.parse(document.getElementById("charts").textContent))) {
  const place = document.getElementById("chart-" + name);
  const drawn = place.closest("figure")?.querySelectorAll("img, .of-drawing") ?? [];
  place.classList.add("drawn");  // has its width before Vega asks for it
  vegaEmbed(place, chart, {actions: false, renderer: "svg"}).then(() => drawn.forEach(part => part.remove()));
}

// Numbers as the tables print them: true minus signs, thousands separators, "< 0.001", "92.53 [92.36, 92.69]".
function value(cell) {
  const number = parseFloat(cell.textContent.trim().replace("\u2212", "-").replace(/,(?=\d{3})/g, "").replace(/^< /, ""));
  return Number.isNaN(number) ? null : number;
}

function compare(a, b) {
  const [x, y] = [value(a), value(b)];
  if (x !== null && y !== null) return x - y;
  if (x === null && y === null) return a.textContent.localeCompare(b.textContent);
  return x === null ? 1 : -1;  // words and what is not measured come last
}

function sort(table, heading) {
  const place = heading.cellIndex, down = heading.ariaSort === "ascending";
  const rows = [...table.tBodies[0].rows].sort((a, b) => compare(a.cells[place], b.cells[place]));
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.ariaSort = down ? "descending" : "ascending";
  table.tBodies[0].append(...(down ? rows.reverse() : rows));
}

for (const table of document.querySelectorAll("table")) {
  for (const heading of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    button.title = "Sort";
    button.addEventListener("click", () => sort(table, heading));
    heading.append(button);
  }
}
