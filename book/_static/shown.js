/* Figures and tables with their runs (book/shown.py). Without this script points are links with tooltips, and tables keep
   their order. */
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".am-figure").forEach(points);
  document.querySelectorAll(".am-drawing svg").forEach(stack);
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

/* On a phone the columns of a figure stand below each other. Groups are moved, not drawn again: their points remain links. The
   columns share the y axis of the first one, so that the others get a copy of it. */
function stack(svg) {
  const columns = [];
  for (let found; (found = [...svg.querySelectorAll(`.am-column-${columns.length}`)]).length;) columns.push(found);
  if (columns.length < 2) return;
  const wide = svg.getAttribute("viewBox");
  const height = svg.viewBox.baseVal.height;
  const panels = columns.map(groups => groups.filter(group => group.querySelector("path")));
  const frames = panels.map(axes => axes.map(axis => axis.querySelector("path").getBBox()));
  const lefts = frames.map(boxes => Math.min(...boxes.map(box => box.x)));
  const boxes = columns.map(groups => groups.map(group => group.getBBox()));
  const start = Math.min(...boxes[0].map(box => box.x)) - 4;
  const end = Math.max(...boxes.map((all, i) => Math.max(...all.map(box => box.x + box.width)) - lefts[i])) + lefts[0] + 4;
  const label = svg.querySelector(".am-xlabel");
  const place = label.getBBox();
  const middle = (lefts[0] + Math.max(...frames[0].map(box => box.x + box.width))) / 2 - place.x - place.width / 2;
  const copies = [];
  const copy = (group, x, y) => {
    const made = group.cloneNode(true);
    made.setAttribute("transform", `translate(${x} ${y})`);
    svg.append(made);
    copies.push(made);
  };
  const phone = matchMedia("(max-width: 600px)");
  const set = () => {
    copies.splice(0).forEach(made => made.remove());
    svg.setAttribute("viewBox", phone.matches ? `${start} 0 ${end - start} ${height * columns.length}` : wide);
    svg.style.minWidth = phone.matches ? `${1.25 * (end - start)}px` : ""; // text of 8 points is then 10 pixels high
    svg.classList.toggle("am-stacked", phone.matches);
    columns.forEach((groups, i) => {
      const move = `translate(${lefts[0] - lefts[i]} ${i * height})`;
      groups.forEach(group => phone.matches ? group.setAttribute("transform", move) : group.removeAttribute("transform"));
      if (!phone.matches) return;
      copy(label, middle, i * height);
      const rows = new Set(frames[i].map(box => box.y));
      for (const row of i ? rows : []) {
        copy(panels[0][frames[0].findIndex(box => box.y === row)].querySelector(".am-yaxis"), 0, i * height);
      }
    });
    label.style.display = phone.matches ? "none" : "";
    dispatchEvent(new Event("resize"));
  };
  phone.addEventListener("change", set);
  if (phone.matches) set();
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
