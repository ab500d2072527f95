"use strict";
(() => {
  const tip = document.getElementById("tip");

  // A table sorts by the column whose head is pressed; equal rows keep their order.
  function sort(table, place, button) {
    const head = button.closest("th");
    const was = head.getAttribute("aria-sort");
    const numbers = head.classList.contains("number");
    const down = was ? was === "ascending" : numbers; // the largest number first
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const key = (row) => {
      const cell = row.cells[place];
      if (!numbers) return cell.textContent;
      const said = cell.dataset.v.toLowerCase();
      return said === "" ? null : said === "inf" ? Infinity : said === "-inf" ? -Infinity : Number(said);
    };
    const none = (value) => value === null || Number.isNaN(value);
    const words = new Intl.Collator("en", { numeric: true });
    const rows = [...body.rows].map((row) => [key(row), row]);
    rows.sort(([a], [b]) => {
      if (none(a) || none(b)) return none(a) - none(b); // what is not there comes last
      const order = numbers ? (a < b ? -1 : a > b ? 1 : 0) : words.compare(a, b);
      return down ? -order : order;
    });
    body.append(...rows.map(([, row]) => row));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, place) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sort(table, place, button));
    });
  }

  for (const label of document.querySelectorAll("label.scripted")) {
    label.hidden = false;
    const field = label.querySelector("input");
    const body = document.getElementById(field.dataset.of).tBodies[0];
    field.addEventListener("input", () => {
      const word = field.value.toLowerCase();
      for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(word);
    });
  }

  // What a cell of a heat map stands for, in every measure, beside the pointer or the chosen cell.
  function told(cell) {
    const row = cell.parentElement;
    const table = row.closest("table");
    const place = cell.cellIndex;
    const lines = [...table.closest("section").querySelectorAll(".view")].map((view) => {
      const grid = view.querySelector("table");
      const same = grid.tBodies[0].rows[row.sectionRowIndex].cells[place];
      return [grid.caption.textContent.split(": ").pop(), same.textContent.replace("!", "")];
    });
    const column = table.tHead.rows[0].cells[place].textContent;
    const axis = table.tHead.rows[0].cells[0].textContent.split(" \\ ")[1];
    const named = /^\d+$/.test(column) ? `${axis} ${column}` : column;
    return [row.cells[0].textContent, named, lines];
  }

  function show(cell, x, y) {
    const [row, column, lines] = told(cell);
    const title = document.createElement("b");
    title.textContent = `${row}, ${column}`;
    const list = document.createElement("dl");
    for (const [name, value] of lines) {
      const term = document.createElement("dt");
      const said = document.createElement("dd");
      term.textContent = name;
      said.textContent = value;
      list.append(term, said);
    }
    tip.replaceChildren(title, list);
    tip.hidden = false;
    const room = tip.getBoundingClientRect();
    const left = x + 16 + room.width > innerWidth ? x - room.width - 12 : x + 16;
    const top = y + 16 + room.height > innerHeight ? y - room.height - 12 : y + 16;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, top)}px`;
  }

  for (const grid of document.querySelectorAll("table.grid")) {
    const region = grid.parentElement;
    let at = null;
    const leave = () => {
      if (at) at.classList.remove("at");
      at = null;
      tip.hidden = true;
    };
    grid.addEventListener("pointermove", (event) => {
      const cell = event.target.closest("tbody td:not(.blank)");
      if (cell) show(cell, event.clientX, event.clientY);
      else leave();
    });
    grid.addEventListener("pointerleave", leave);
    region.addEventListener("blur", leave);
    region.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (event.key === "Escape") leave();
      if (!step) return;
      event.preventDefault();
      const rows = grid.tBodies[0].rows;
      const row = at ? at.parentElement.sectionRowIndex + step[0] : 0;
      const place = at ? at.cellIndex + step[1] : 1;
      const cell = rows[row] && place > 0 ? rows[row].cells[place] : null;
      if (!cell) return;
      if (at) at.classList.remove("at");
      at = cell;
      at.classList.add("at");
      at.scrollIntoView({ block: "nearest", inline: "nearest" });
      const box = at.getBoundingClientRect();
      show(at, box.right, box.bottom);
    });
  }
})();
