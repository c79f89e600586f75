"use strict";

// Tables: a heading sorts its column, first upwards, then downwards. Undefined numbers stay at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => ({ row, key: keyOf(row.cells[column]) }));
      rows.sort((a, b) => compare(a.key, b.key, down ? -1 : 1));
      body.append(...rows.map(({ row }) => row));
    });
  });
}

function keyOf(cell) {
  if (cell.dataset.value === undefined) return cell.textContent.trim();
  return cell.dataset.value === "" ? null : Number(cell.dataset.value.replace("inf", "Infinity"));
}

function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null);
  return sign * (typeof a === "number" ? Math.sign(a - b) : a.localeCompare(b, undefined, { numeric: true }));
}

// Reliability diagrams: the questions of the bin that is pointed at, or that has the focus.
for (const section of document.querySelectorAll("[data-bins]")) {
  const questions = JSON.parse(document.getElementById(section.dataset.bins).textContent);
  const panel = section.querySelector(".bin-panel");
  const bins = [...section.querySelectorAll(".bin")];
  const show = (bin) => {
    if (!bin || bin.classList.contains("chosen")) return;
    bins.forEach((other) => other.classList.remove("chosen"));
    bin.classList.add("chosen");
    const { method, start, end, count, right } = bin.dataset;
    const listed = questions[method][bin.dataset.bin];
    const left = Number(count) - listed.length;
    panel.replaceChildren(
      element("h3", `${method}, confidence ${start} to ${end}: ${right} of ${count} right`),
      element("ul", "", ...listed.map(item)),
      ...(left > 0 ? [element("p", `${left} more are not listed.`, "note")] : []),
    );
    panel.scrollTop = 0;
  };
  for (const name of ["pointerover", "focusin", "click"]) {
    section.addEventListener(name, (event) => show(event.target.closest(".bin")));
  }
  show(bins.findLast((bin) => bin.dataset.method === section.dataset.main));
}

function item(question) {
  const outcome = question.right ? `right: ${question.gold}` : `wrong: ${question.predicted}, not ${question.gold}`;
  const meta = element("span", "");
  meta.className = "meta";
  const word = element("span", outcome);
  word.className = "outcome";
  meta.append(`${question.task}, confidence ${question.confidence.toFixed(3)}, `, word);
  const found = element("li", question.input);
  if (!question.right) found.className = "wrong";
  found.append(meta);
  return found;
}

function element(name, text, ...rest) {
  const made = document.createElement(name);
  made.textContent = text;
  if (typeof rest[0] === "string") made.className = rest.shift();
  made.append(...rest);
  return made;
}
