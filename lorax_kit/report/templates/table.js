for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const sort = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = row => row.cells[column].dataset.v;
      const text = (a, b) => (value(a) === "") - (value(b) === "") ||
        (up ? 1 : -1) * value(a).localeCompare(value(b), "en", {numeric: false});
      const number = (a, b) => (value(a) === "") - (value(b) === "") || (up ? 1 : -1) * (value(a) - value(b));
      const rows = [...body.rows];
      rows.sort(rows.some(row => isNaN(value(row))) ? text : number);
      body.append(...rows);
    };
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}

for (const table of document.querySelectorAll("table.filterable")) {
  const heads = [...table.tHead.rows[0].cells], rows = [...table.tBodies[0].rows], ranges = new Map();
  const bar = document.createElement("div");
  bar.className = "filter";
  const add = (tag, settings, within = bar) => within.appendChild(Object.assign(document.createElement(tag), settings));
  const words = add("input", {type: "search", placeholder: "words in a row", ariaLabel: "words that a row must hold"});
  const column = add("select", {ariaLabel: "column of the range"});
  heads.forEach((head, i) => {
    const values = rows.map(row => row.cells[i].dataset.v).filter(value => value !== "");
    if (values.length && !values.some(isNaN)) add("option", {value: i, textContent: head.textContent}, column);
  });
  const box = label => ({type: "text", inputMode: "decimal", placeholder: label, ariaLabel: label + " this value"});
  const least = add("input", box("from")), most = add("input", box("to"));
  const clear = add("button", {type: "button", textContent: "clear"});
  const count = add("output", {}), active = add("p", {className: "quiet"});

  const number = input => input.value.trim() === "" ? NaN : Number(input.value.replace(",", "."));
  const within = (row, [low, high], i) => {
    const value = row.cells[i].dataset.v;
    const shown = Number(value) * (heads[i].dataset.factor || 1);
    return value !== "" && !(shown < low - 1e-9 * Math.abs(low)) && !(shown > high + 1e-9 * Math.abs(high));
  };
  const apply = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const keep = wanted.every(word => text.includes(word)) &&
        [...ranges].every(([i, range]) => within(row, range, i));
      row.hidden = !keep;
      left += keep;
    }
    count.textContent = `${left} of ${rows.length}`;
    active.textContent = [...ranges].map(([i, [low, high]]) => heads[i].textContent +
      (isNaN(low) ? "" : ` from ${low}`) + (isNaN(high) ? "" : ` to ${high}`)).join("; ");
  };
  const narrow = () => {
    const range = [number(least), number(most)];
    if (range.every(isNaN)) ranges.delete(column.value); else ranges.set(column.value, range);
    apply();
  };
  const show = () => [least, most].forEach((input, end) => {
    const range = ranges.get(column.value);
    input.value = range && !isNaN(range[end]) ? range[end] : "";
  });
  words.addEventListener("input", apply);
  least.addEventListener("input", narrow);
  most.addEventListener("input", narrow);
  column.addEventListener("change", show);
  clear.addEventListener("click", () => { words.value = ""; ranges.clear(); show(); apply(); });
  table.closest(".wide").before(bar);
  apply();
}
