"use strict";
// Sort: click or Enter on a header; numbers by data-v (SI values), empty values always last.
document.querySelectorAll("table.data").forEach((table) => {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((h) => h.querySelector("button") && h.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const numeric = head.classList.contains("num");
      const key = (row) => {
        const cell = row.cells[column];
        const text = cell.hasAttribute("data-v") ? cell.dataset.v : cell.textContent.trim();
        return numeric ? (text === "" || isNaN(text) ? null : Number(text)) : text || null;
      };
      const order = rows.map((row) => [key(row), row]);
      order.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        const c = numeric ? a - b : a.localeCompare(b, undefined, { numeric: true });
        return up ? c : -c;
      });
      body.append(...order.map(([, row]) => row));
    });
  });
});
// Search: every word must occur in the row, and its state be the one that is chosen.
const filter = (id) => {
  const input = document.querySelector(`input[data-table="${id}"]`);
  const choice = document.querySelector(`select[data-table="${id}"]`);
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of document.getElementById(id).tBodies[0].rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word))
      || Boolean(choice && choice.value && row.dataset.state !== choice.value);
    shown += !row.hidden;
  }
  const count = document.getElementById(id + "-count");
  const some = words.length || (choice && choice.value);
  count.textContent = some ? `${shown} of ${count.dataset.all}` : count.dataset.all;
};
document.querySelectorAll("input[data-table], select[data-table]").forEach((input) => {
  input.addEventListener("input", () => filter(input.dataset.table));
});
// Slices: one picture at a time.
document.querySelectorAll(".slider").forEach((slider) => {
  const range = slider.querySelector("input"), pictures = [...slider.querySelectorAll(".stage img")];
  const turn = () => {
    const shown = pictures[Number(range.value)];
    pictures.forEach((picture) => { picture.hidden = picture !== shown; });
    slider.querySelector("output").textContent = shown.alt;
    range.setAttribute("aria-valuetext", shown.alt);
  };
  range.addEventListener("input", turn);
  turn();
});
// Definitions: a link opens the one it leads to; paper has them all.
const reveal = (hash) => {
  const target = hash.startsWith("#def-") && document.getElementById(hash.slice(1));
  if (target) target.open = true;
};
document.querySelectorAll('a[href^="#def-"]').forEach((link) => {
  link.addEventListener("click", () => reveal(link.hash));
});
reveal(location.hash);
addEventListener("beforeprint", () => document.querySelectorAll(".def").forEach((d) => { d.open = true; }));
// Zoom: pictures of one scene at one place, so that arrow keys flicker between them.
const dialog = document.querySelector("dialog");
let views = [], current = 0;
const show = (index) => {
  current = (index + views.length) % views.length;
  const image = views[current].querySelector("img");
  dialog.querySelector("img").src = image.src;
  dialog.querySelector("img").alt = image.alt;
  dialog.querySelector("b").textContent = views[current].dataset.title;
  dialog.querySelector("p").textContent = image.alt;
};
document.querySelectorAll(".view").forEach((view) => {
  view.addEventListener("click", () => {
    views = [...view.closest(".panels").querySelectorAll(".view")];
    show(views.indexOf(view));
    dialog.showModal();
  });
});
dialog?.addEventListener("click", (event) => {
  const step = event.target.dataset.step;
  if (step) show(current + Number(step));
  else if (event.target.closest("[data-close]") || event.target.tagName === "IMG") dialog.close();
});
dialog?.addEventListener("keydown", (event) => {
  if (event.key === "ArrowRight") show(current + 1);
  if (event.key === "ArrowLeft") show(current - 1);
});
