"use strict";
(() => {
  const $ = (selector, from = document) => from.querySelector(selector);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const percent = (x) => `${(100 * x).toFixed(1)} %`;

  // -- Light and dark ------------------------------------------------------------------------

  $("#theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // -- The table: sort and search ------------------------------------------------------------

  const body = $("#layers tbody");
  const rows = all("tr", body);
  const heads = all("#layers thead th");

  // Missing numbers come last in both directions.
  const compare = (a, b, sign) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const numbers = a - b;
    return sign * (Number.isNaN(numbers) ? a.localeCompare(b, undefined, { numeric: true }) : numbers);
  };

  heads.forEach((head, column) => {
    $("button", head).addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.key;
      body.append(...[...rows].sort((a, b) => compare(key(a), key(b), down ? -1 : 1)));
    });
  });

  const show = () => {
    const words = $("#search").value.toLowerCase().split(/\s+/);
    const found = rows.filter((row) => {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      return !row.hidden;
    });
    $("#count").textContent = `${found.length} of ${rows.length} layers`;
  };
  $("#search").addEventListener("input", show);
  show();

  // -- The curves ----------------------------------------------------------------------------

  const SVG = "http://www.w3.org/2000/svg";
  const draw = (parent, name, attributes, text) => {
    const element = document.createElementNS(SVG, name);
    Object.entries(attributes).forEach(([key, value]) => element.setAttribute(key, value));
    if (text !== undefined) element.textContent = text;
    return parent.appendChild(element);
  };

  class Chart {
    // `curves` are {name, points, chosen}; `describe` says what a point of one means.
    constructor(place, curves, label, describe) {
      Object.assign(this, { place, curves, label, describe, on: curves.length === 1 ? 0 : -1 });
      this.top = Math.max(...curves.flatMap((c) => [...c.points, c.chosen || [0, 0]].map((p) => p[1])), 1e-9);
      this.svg = draw(place, "svg", { role: "img", "aria-label": label });
      this.output = place.appendChild(document.createElement("output"));
      ["pointermove", "pointerdown"].forEach((kind) =>
        this.svg.addEventListener(kind, (event) => this.point(event)));
      new ResizeObserver(() => this.redraw()).observe(this.svg);
    }

    x(value) { return 44 + value * (this.svg.clientWidth - 60); }
    y(value) { return 262 - (value / this.top) * 250; }

    redraw() {
      this.svg.replaceChildren();
      for (let step = 0; step <= 5; step++) {
        const [x, y] = [this.x(step / 5), this.y((this.top * step) / 5)];
        draw(this.svg, "line", { class: "grid", x1: this.x(0), x2: this.x(1), y1: y, y2: y });
        draw(this.svg, "text", { x: 38, y: y + 4, "text-anchor": "end" }, ((this.top * step) / 5).toFixed(2));
        draw(this.svg, "text", { x, y: 278, "text-anchor": "middle" }, `${20 * step} %`);
      }
      draw(this.svg, "text", { x: this.x(0.5), y: 296, "text-anchor": "middle" }, this.label);
      this.lines = this.curves.map((curve) => {
        const points = curve.points.map((p) => `${this.x(p[0])},${this.y(p[1])}`).join(" ");
        return draw(this.svg, "polyline", { class: "curve", points });
      });
      this.dots = this.curves.map((curve) => curve.chosen && draw(this.svg, "circle",
        { cx: this.x(curve.chosen[0]), cy: this.y(curve.chosen[1]), r: 4 }));
      this.mark = draw(this.svg, "circle", { class: "at", r: 3.5, visibility: "hidden" });
      this.select(this.on);
    }

    select(index, point) {
      this.on = index;
      [this.lines, this.dots].forEach((list) => list.forEach((element, i) =>
        element && element.classList.toggle("on", i === index)));
      const curve = this.curves[index];
      if (!curve) return;
      const at = point || curve.chosen;
      this.mark.setAttribute("visibility", point ? "visible" : "hidden");
      if (point) {
        this.mark.setAttribute("cx", this.x(point[0]));
        this.mark.setAttribute("cy", this.y(point[1]));
      }
      this.output.textContent = (curve.name ? `${curve.name}: ` : "")
        + (at ? this.describe(at) : "stays dense") + (at && at === curve.chosen ? " (as compressed)" : "");
    }

    point(event) {
      const box = this.svg.getBoundingClientRect();
      let best = [Infinity];
      this.curves.forEach((curve, i) => [...curve.points, ...(curve.chosen ? [curve.chosen] : [])].forEach((p) => {
        const far = Math.hypot(this.x(p[0]) - (event.clientX - box.left), this.y(p[1]) - (event.clientY - box.top));
        if (far <= best[0]) best = [far, i, p];
      }));
      if (best[0] < 40) choose(best[1], best[2], this);
    }
  }

  const data = JSON.parse($("#data").textContent);
  let layers;
  const choose = (index, point, chart = layers) => {
    chart.select(index, point);
    if (chart !== layers) return;
    const { name } = layers.curves[index];
    rows.forEach((row) => row.classList.toggle("on", row.dataset.path === name));
  };
  if (data) {
    new Chart($("#model-chart"), [data.model], "parameters removed",
      (p) => `${percent(p[0])} of the parameters removed, error ${p[1].toFixed(3)}`);
    layers = new Chart($("#layer-chart"), data.layers, "weights of the kernel kept",
      (p) => `${percent(p[0])} of the weights kept, error ${p[1].toFixed(3)}`);
    rows.forEach((row) => {
      const index = data.layers.findIndex((curve) => curve.name === row.dataset.path);
      if (index < 0) return;
      row.addEventListener("click", () => choose(index));
      $(".pick", row).addEventListener("click", () =>
        $("#layer-chart").scrollIntoView({ block: "nearest", behavior: "smooth" }));
    });
  }
})();
