/* Figures and tables with their runs (book/shown.py). Without this script points are links with tooltips, and tables keep
   their order. */
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".am-figure").forEach(points);
  document.querySelectorAll("table.am-table").forEach(sortable);
  if (location.protocol === "file:") {
    document.querySelectorAll("code[data-file]").forEach(linkFile);
  }
});

/* Say which run a point is; arrow keys move from one to the next, Enter opens the run in the list below. */
function points(figure) {
  const all = [...figure.querySelectorAll("a.am-point")];
  const shown = figure.querySelector(".am-shown");
  const of = event => event.target.closest("a.am-point");
  all.forEach((point, i) => point.setAttribute("tabindex", i ? -1 : 0));
  for (const kind of ["pointerover", "focusin"]) {
    figure.addEventListener(kind, event => {
      if (of(event)) shown.textContent = of(event).getAttribute("aria-label");
    });
  }
  figure.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    const next = step && of(event) && all[all.indexOf(of(event)) + step];
    if (!next) return;
    event.preventDefault();
    of(event).setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus();
  });
  figure.addEventListener("click", event => {
    if (of(event)) figure.querySelector(".am-runs").open = true;
  });
}

/* Buttons in the headings sort by a column: descending, ascending, as before. */
function sortable(table) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows].map(row => [...row.querySelectorAll("th.col_heading")]);
  const order = [...body.rows];
  for (const head of heads.filter(row => row.length).pop() ?? []) {
    const column = [...head.classList].find(name => /^col\d+$/.test(name));
    const button = document.createElement("button");
    button.append(...head.childNodes);
    button.title = "Sort by this column";
    head.append(button);
    button.addEventListener("click", () => {
      const next = {descending: "ascending", ascending: "none"}[head.ariaSort] ?? "descending";
      table.querySelectorAll("th[aria-sort]").forEach(other => other.removeAttribute("aria-sort"));
      repeat(order);
      const sign = next === "ascending" ? 1 : -1;
      const key = row => value(row.querySelector(`td.${column}`));
      const sorted = [...order];
      if (next !== "none") {
        head.ariaSort = next;
        sorted.sort((a, b) => compare(key(a), key(b), sign));
      }
      body.append(...sorted);
    });
  }
}

/* Headings that span several rows, once per row: sorting parts them. */
function repeat(rows) {
  rows.forEach((row, i) => {
    for (const head of row.querySelectorAll("th[rowspan]")) {
      const count = head.rowSpan;
      head.removeAttribute("rowspan");
      for (const other of rows.slice(i + 1, i + count)) {
        const copy = head.cloneNode(true);
        copy.removeAttribute("id");
        other.insertBefore(copy, other.children[head.cellIndex]);
      }
    }
  });
}

/* A cell as a number: scores, times, counts in millions; else its text. */
function value(cell) {
  const text = cell.childNodes[0]?.textContent.trim().replace("−", "-").replace(/[†*,≈\s]/g, "") ?? "";
  if (/^\d+(:\d\d)+$/.test(text)) return text.split(":").reduce((sum, part) => 60 * sum + Number(part), 0);
  const number = parseFloat(text) * (text.endsWith("M") ? 1e6 : 1);
  return Number.isNaN(number) ? text : number;
}

function compare(a, b, sign) {
  const missing = x => x === "" || x === "—";
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
}

/* In a book that lies where it was built, the files of a run can be opened. */
function linkFile(code) {
  const link = document.createElement("a");
  link.href = `${document.documentElement.dataset.content_root ?? ""}../../${code.dataset.file}`;
  code.replaceWith(link);
  link.append(code);
}
