// Sorting and filtering for tables of class eff-board. Without scripts the whole table is there, in chapter order.
(() => {
  "use strict";

  const cellValue = (row, index) => row.cells[index].dataset.sort ?? row.cells[index].textContent.trim();

  // Numbers before words, missing values ("") last in either direction.
  const compare = (a, b, sign) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const [x, y] = [Number(a), Number(b)];
    const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
    return sign * order;
  };

  const makeSortable = (table, say) => {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    heads.forEach((head, index) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const descending = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        const sign = descending ? -1 : 1;
        const rows = [...body.rows].map((row, place) => [cellValue(row, index), place, row]);
        rows.sort((a, b) => compare(a[0], b[0], sign) || a[1] - b[1]);
        body.append(...rows.map((entry) => entry[2]));
        say(`Sorted by ${button.textContent.trim()}, ${descending ? "descending" : "ascending"}.`);
      });
    });
  };

  const makeFilterable = (table, controls, say) => {
    const rows = [...table.tBodies[0].rows];
    const search = controls.querySelector("input[type=search]");
    const chapter = controls.querySelector("select[name=chapter]");
    const question = controls.querySelector("select[name=question]");
    const chips = [...controls.querySelectorAll("[data-verdict]")];
    const update = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const verdicts = new Set(chips.filter((c) => c.getAttribute("aria-pressed") === "true").map((c) => c.dataset.verdict));
      let shown = 0;
      for (const row of rows) {
        const text = `${row.id} ${row.textContent}`.toLowerCase();
        const keep = verdicts.has(row.dataset[question.value]) && (!chapter.value || row.dataset.system === chapter.value)
          && words.every((word) => text.includes(word));
        row.hidden = !keep;
        shown += keep;
      }
      say(`${shown} of ${rows.length} claims shown.`);
    };
    search.addEventListener("input", update);
    chapter.addEventListener("change", update);
    question.addEventListener("change", update);
    for (const chip of chips) {
      chip.addEventListener("click", () => {
        chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
        update();
      });
    }
    controls.addEventListener("reset", () => {
      chips.forEach((chip) => chip.setAttribute("aria-pressed", "true"));
      setTimeout(update);
    });
    controls.addEventListener("submit", (event) => event.preventDefault());
    controls.hidden = false;
    update();
    return () => { controls.reset(); update(); };
  };

  const start = () => {
    for (const table of document.querySelectorAll("table.eff-board")) {
      const count = document.getElementById(`${table.id}-count`);
      const say = (text) => { if (count) count.textContent = text; };
      makeSortable(table, say);
      const controls = document.getElementById(`${table.id}-controls`);
      if (!controls) continue;
      const reset = makeFilterable(table, controls, say);
      // A link to a row must find it even when a filter hides it.
      window.addEventListener("hashchange", () => {
        const row = document.getElementById(decodeURIComponent(location.hash.slice(1)));
        if (row?.hidden) { reset(); row.scrollIntoView(); }
      });
    }
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start); else start();
})();
