for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.v;
    const order = (a, b) => (value(a) === "") - (value(b) === "") ||
      (up ? 1 : -1) * value(a).localeCompare(value(b), "en", {numeric: false}) ;
    const numeric = (a, b) => (value(a) === "") - (value(b) === "") || (up ? 1 : -1) * (value(a) - value(b));
    const rows = [...body.rows];
    rows.sort(rows.some(row => isNaN(value(row))) ? order : numeric);
    body.append(...rows);
  }));
}
