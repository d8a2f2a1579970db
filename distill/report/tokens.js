"use strict";
{
  const sequences = JSON.parse(document.getElementById("token-data").textContent);

  function element(name, text, kind) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  function percent(value) {
    return value === 0 || value >= 0.0005 ? (100 * value).toFixed(1) + "%" : "< 0.1%";
  }

  function row([label, value, kind]) {
    const made = element("tr");
    const name = element("td", label, kind);
    if (kind === "came") name.append(element("b", " ✓ came"));
    const bar = element("i");
    bar.style.width = 100 * value + "%";
    const track = element("td", undefined, "track");
    track.append(bar);
    made.append(name, track, element("td", percent(value), "number"));
    return made;
  }

  function table(title, rows) {
    const made = element("table");
    made.append(element("caption", title), ...rows.map(row));
    return made;
  }

  function show(section, button) {
    for (const other of section.querySelectorAll("button")) {
      other.setAttribute("aria-pressed", other === button);
      other.tabIndex = other === button ? 0 : -1;
    }
    const token = sequences[section.dataset.number][button.dataset.place];
    const head = element("p", "In the place of ");
    head.append(element("b", token.text), ", which " + token.state + ":");
    const tables = element("div", undefined, "expected");
    tables.append(...Object.entries(token.tables).map(([title, rows]) => table(title, rows)));
    section.querySelector(".panel").replaceChildren(head, tables);
  }

  function next(buttons, place, key) {
    const steps = { ArrowRight: place + 1, ArrowDown: place + 1, ArrowLeft: place - 1, ArrowUp: place - 1, Home: 0 };
    const wanted = key === "End" ? buttons.length - 1 : steps[key];
    return wanted === undefined ? undefined : buttons[Math.max(0, Math.min(wanted, buttons.length - 1))];
  }

  for (const section of document.querySelectorAll(".sequence")) {
    const buttons = [...section.querySelectorAll("button")];
    section.addEventListener("click", event => {
      const button = event.target.closest("button");
      if (button) show(section, button);
    });
    section.addEventListener("keydown", event => {
      const button = next(buttons, buttons.indexOf(event.target), event.key);
      if (!button || !buttons.includes(event.target)) return;
      event.preventDefault();
      button.focus();
      show(section, button);
    });
    const first = section.querySelector("button.trained.differs") || section.querySelector("button.trained") || buttons[0];
    if (first) show(section, first);
  }
}
