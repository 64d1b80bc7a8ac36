"use strict";
(() => {
  const every = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Tables that sort: a button in every head; numbers from the greatest down at first, names from A to Z.
  for (const table of every("table.sortable")) {
    const heads = every("thead th", table), body = table.tBodies[0];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const sorted = head.getAttribute("aria-sort");
        const down = sorted ? sorted === "ascending" : column > 0;
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => {
          const cell = row.cells[column];
          return column ? (cell.dataset.by === "" ? null : Number(cell.dataset.by)) : cell.textContent;
        };
        const compared = (a, b) => {
          const [left, right] = [key(a), key(b)];
          if (left === null || right === null) return (left === null) - (right === null);
          const order = column ? left - right : left.localeCompare(right);
          return down ? -order : order;
        };
        body.append(...[...body.rows].sort(compared));
      });
    });
  }

  // What a cell or a mark says of itself, where the pointer or the focus is.
  const tip = document.getElementById("tip");
  let current = null;
  const hide = () => { tip.hidden = true; current = null; };
  const wordsOf = (element) => {
    if (element.matches("circle, rect")) return element.getAttribute("aria-label");
    const table = element.closest("table");
    const names = {
      row: element.parentElement.cells[0].dataset.name,
      column: table.tHead.rows[0].cells[element.cellIndex].dataset.name,
      value: element.textContent,
    };
    return table.dataset.words.replace(/\{(row|column|value)\}/g, (_, name) => names[name]);
  };
  const show = (element) => {
    const words = wordsOf(element);
    tip.hidden = false;
    current = element;
    if (!element.hasAttribute("aria-label")) element.setAttribute("aria-label", words);
    tip.textContent = words;
    const at = element.getBoundingClientRect(), size = tip.getBoundingClientRect();
    const left = Math.min(Math.max(4, at.left + at.width / 2 - size.width / 2), innerWidth - size.width - 4);
    const top = at.top - size.height - 6;
    tip.style.left = `${left}px`;
    tip.style.top = `${top > 4 ? top : Math.min(at.bottom + 6, innerHeight - size.height - 4)}px`;
  };
  const told = "table.heat td[class], .line circle, .span rect";
  document.addEventListener("focusin", ({ target }) => { if (target.matches(told)) show(target); });
  // Not pointerover: that comes too when the page scrolls to a cell under the keyboard.
  document.addEventListener("pointermove", ({ target }) => {
    const element = target.closest(told);
    if (element && element !== current) show(element);
    if (!element && current !== document.activeElement) hide();
  });
  document.addEventListener("focusout", hide);
  addEventListener("scroll", () => { if (current) show(current); }, { capture: true, passive: true });

  // One stop of the Tab key for each table and chart; arrows move inside it.
  const grids = [
    ...every("table.heat").map((table) => [...table.tBodies[0].rows].map((row) => every("td[class]", row))),
    ...every("figure.accuracy svg").map((svg) => every(".line", svg).map((line) => every("circle", line))),
    ...every("figure.course svg").map((svg) => [every(".span rect", svg)]),
  ].map((rows) => rows.filter((row) => row.length)).filter((rows) => rows.length);
  for (const rows of grids) {
    const stop = (element) => {
      rows.flat().forEach((each) => { each.tabIndex = -1; });
      element.tabIndex = 0;
    };
    stop(rows[0][0]);
    rows.forEach((row, i) => row.forEach((element, j) => {
      element.addEventListener("focus", () => stop(element));
      element.addEventListener("keydown", (event) => {
        const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
        const next = event.key === "Escape" ? null : by && rows[i + by[0]];
        if (event.key === "Escape") hide();
        if (!next) return;
        event.preventDefault();
        const place = Math.min(j + by[1], next.length - 1);
        if (place >= 0) next[place].focus();
      });
    }));
  }

  // One row in detail at a time.
  const details = every("article.detail"), links = every(".choice a");
  const choose = (id) => {
    if (!details.some((each) => each.id === id)) return;
    for (const each of details) each.hidden = each.id !== id;
    for (const link of links) {
      if (link.hash === `#${id}`) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
    }
  };
  if (links.length) {
    const first = document.querySelector(".choice a[data-first]") || links[0];
    choose(first.hash.slice(1));
    choose(location.hash.slice(1));
    for (const link of every('a[href^="#row-"]')) {
      link.addEventListener("click", (event) => {
        event.preventDefault();
        const id = link.hash.slice(1);
        choose(id);
        history.replaceState(null, "", link.hash);
        if (!link.closest(".choice")) {
          const heading = document.querySelector(`#${id} h3`);
          heading.tabIndex = -1;
          heading.focus();
        }
      });
    }
    addEventListener("hashchange", () => choose(location.hash.slice(1)));
  }

  // The theme: the system's, or light, or dark.
  const button = document.querySelector(".theme"), names = ["automatic", "light", "dark"];
  button.hidden = false;
  button.addEventListener("click", () => {
    const shown = button.querySelector("span");
    shown.textContent = names[(names.indexOf(shown.textContent) + 1) % names.length];
    if (shown.textContent === "automatic") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = shown.textContent;
  });
})();
