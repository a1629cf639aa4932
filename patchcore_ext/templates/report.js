"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const run = JSON.parse(byId("run").textContent);
  const slider = byId("threshold");
  const filters = byId("filters");
  const gallery = byId("gallery");
  const viewer = byId("viewer");
  const panel = document.querySelector(".panel");
  const cards = [...gallery.querySelectorAll(".card")].map((element, index) => ({
    ...run.cards[index],
    element,
    button: element.querySelector("button"),
    verdict: element.querySelector(".verdict"),
  }));
  let threshold = run.threshold;
  let current = cards[0];
  let enlarged = null;

  const short = (number) => String(Number(number.toPrecision(4)));

  /** How many of ascending numbers are above the limit. */
  function countAbove(numbers, limit) {
    let low = 0;
    let high = numbers.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (numbers[middle] > limit) high = middle;
      else low = middle + 1;
    }
    return numbers.length - low;
  }

  function outcomeOf(card) {
    const flagged = card.score > threshold;
    if (card.truth === "unknown") return flagged ? "flagged" : "passed";
    if (flagged === (card.truth === "defective")) return "correct";
    return flagged ? "false alarm" : "missed";
  }

  const verdictOf = (card) => (card.score > threshold ? "anomalous" : "good");
  const isWrong = (card) => card.outcome === "missed" || card.outcome === "false alarm";

  function showCounts() {
    const { good, defective, unknown } = run.scores;
    const found = countAbove(defective, threshold);
    const alarms = countAbove(good, threshold);
    const lines = [];
    if (defective.length) lines.push(["missed", defective.length - found, `of ${defective.length.toLocaleString("en")} missed`]);
    if (good.length) lines.push(["alarms", alarms, `of ${good.length.toLocaleString("en")} false alarms`]);
    if (unknown.length) lines.push(["flagged", countAbove(unknown, threshold), `of ${unknown.length.toLocaleString("en")} anomalous`]);
    byId("counts").replaceChildren(
      ...lines.map(([kind, number, text]) => {
        const item = document.createElement("li");
        const strong = document.createElement("b");
        strong.textContent = number.toLocaleString("en");
        item.className = kind;
        item.append(strong, ` ${text}`);
        return item;
      }),
    );
    const point = byId("roc-point");
    if (point) {
      point.setAttribute("cx", (100 * alarms) / good.length);
      point.setAttribute("cy", 100 - (100 * found) / defective.length);
    }
  }

  function showThreshold() {
    const low = Number(slider.min);
    byId("line").style.left = `${(100 * (threshold - low)) / (Number(slider.max) - low)}%`;
    byId("threshold-value").textContent = short(threshold);
    slider.setAttribute("aria-valuetext", short(threshold));
    byId("reset").disabled = threshold === run.threshold;
    showCounts();
    for (const card of cards) {
      const outcome = outcomeOf(card);
      if (outcome === card.outcome) continue;
      card.outcome = outcome;
      card.element.dataset.outcome = outcome;
      card.verdict.textContent = isWrong(card) ? outcome : verdictOf(card);
    }
    applyFilters();
  }

  function applyFilters() {
    const chosen = (name) => new Set([...filters.querySelectorAll(`[name=${name}]:checked`)].map((box) => box.value));
    const outcomes = chosen("outcome");
    const groups = chosen("group");
    for (const card of cards) {
      card.element.hidden = (outcomes.size > 0 && !outcomes.has(card.outcome)) || (groups.size > 0 && !groups.has(card.group));
    }
    const shown = visibleCards();
    byId("shown").textContent = `${shown.length.toLocaleString("en")} of ${cards.length.toLocaleString("en")} shown`;
    if (current?.element.hidden && shown.length) makeCurrent(shown[0]);
  }

  const visibleCards = () => cards.filter((card) => !card.element.hidden);

  /** One card can be reached with Tab; the others with the arrow keys. */
  function makeCurrent(card) {
    current.button.tabIndex = -1;
    current = card;
    current.button.tabIndex = 0;
  }

  function cardsPerRow(shown) {
    const top = shown[0].element.offsetTop;
    const next = shown.findIndex((card) => card.element.offsetTop !== top);
    return next < 0 ? shown.length : next;
  }

  /** Moves along the shown cards, and stays when there is none at the new place. */
  function move(steps) {
    const shown = visibleCards();
    const target = shown[shown.indexOf(current) + steps];
    if (target) makeCurrent(target);
    if (viewer.open) showLarge();
    else current?.button.focus();
  }

  function showLarge() {
    enlarged = current;
    const [picture, heatMap] = current.button.querySelectorAll("img");
    for (const [id, image] of [["viewer-picture", picture], ["viewer-heat-map", heatMap]]) {
      byId(id).src = image.src;
      byId(id).alt = image.alt;
      byId(id).width = image.width;
      byId(id).style.aspectRatio = `${image.getAttribute("width")} / ${image.getAttribute("height")}`;
    }
    byId("viewer-name").textContent = current.element.querySelector(".name").textContent;
    const facts = [`score ${short(current.score)}`, `threshold ${short(threshold)}`, `called ${verdictOf(current)}`];
    if (current.group !== "unknown") facts.push(`in truth ${current.group}`);
    if (isWrong(current)) facts.push(current.outcome);
    byId("viewer-facts").textContent = facts.join(" · ");
    const shown = visibleCards();
    byId("previous").disabled = current === shown[0];
    byId("next").disabled = current === shown.at(-1);
    if (!viewer.open) viewer.showModal();
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target === slider || !current) return;
    const inGallery = viewer.open || gallery.contains(event.target);
    const arrows = {
      ArrowRight: () => 1,
      ArrowLeft: () => -1,
      ArrowDown: () => (viewer.open ? 1 : cardsPerRow(visibleCards())),
      ArrowUp: () => (viewer.open ? -1 : -cardsPerRow(visibleCards())),
    };
    // From elsewhere on the page the first letter only enters the gallery.
    const step = viewer.open || document.activeElement === current.button ? 1 : 0;
    if (event.key === "j") move(step);
    else if (event.key === "k") move(-step);
    else if (inGallery && event.key in arrows) move(arrows[event.key]());
    else return;
    event.preventDefault();
  }

  slider.addEventListener("input", () => {
    threshold = Number(slider.value);
    showThreshold();
  });
  byId("reset").addEventListener("click", () => {
    threshold = run.threshold;
    slider.value = threshold;
    showThreshold();
  });
  filters.addEventListener("change", applyFilters);
  filters.addEventListener("submit", (event) => event.preventDefault());
  gallery.addEventListener("click", (event) => {
    const card = cards.find(({ element }) => element.contains(event.target));
    if (!card || !event.target.closest("button")) return;
    makeCurrent(card);
    showLarge();
  });
  gallery.addEventListener("focusin", (event) => {
    const card = cards.find(({ button }) => button === event.target);
    if (card) makeCurrent(card);
  });
  document.addEventListener("keydown", onKey);
  byId("previous").addEventListener("click", () => move(-1));
  byId("next").addEventListener("click", () => move(1));
  byId("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
  // The browser has given the focus back to the card that was enlarged first.
  viewer.addEventListener("close", () => {
    makeCurrent(enlarged);
    current.button.focus();
  });
  // A card that gets the focus is not scrolled to below the panel.
  new ResizeObserver(() => {
    const covered = getComputedStyle(panel).position === "sticky" ? panel.offsetHeight : 0;
    document.documentElement.style.scrollPaddingTop = `${covered + 12}px`;
  }).observe(panel);

  for (const card of cards) card.button.tabIndex = -1;
  for (const id of ["threshold", "reset", "hint"]) byId(id).hidden = false;
  filters.hidden = cards.length === 0;
  if (current) makeCurrent(current);
  showThreshold();
})();
