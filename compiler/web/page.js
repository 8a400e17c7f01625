// The report's tables and plots. Every string of the data becomes text, never markup.
"use strict";

const report = JSON.parse(document.getElementById("report-data").textContent);
const byId = (id) => document.getElementById(id);

/** An element with properties (class, text, any attribute, on: listeners) and children. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "text") made.textContent = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

const badge = (precision) => element("span", { class: `badge ${precision}`, text: { w4a4: "W4A4", w4a16: "W4A16" }[precision] ?? precision });
const figure = (value, digits = 3) => (value === null || value === undefined ? "" : String(Number(value.toPrecision(digits))));
const decibels = (value) => (value === null || value === undefined ? "" : value.toFixed(1));
const bytes = (count) => {
  const unit = [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]].find(([, size]) => count >= size);
  return unit ? `${(count / unit[1]).toPrecision(3)} ${unit[0]}` : `${count} B`;
};
const span = (low, high) => (low === null || low === undefined ? "" : `${figure(low)} … ${figure(high)}`);
const debounced = (action, milliseconds = 120) => {
  let waiting = 0;
  return () => { clearTimeout(waiting); waiting = setTimeout(action, milliseconds); };
};

// ---- plots: Bokeh draws each when it comes into view --------------------------------------------------------------

const plotItems = JSON.parse(byId("plot-data").textContent);
const drawn = new Map();

/** The Bokeh document of a plot, drawn into `target` the first time. */
function plot(name, target) {
  if (!drawn.has(name)) drawn.set(name, Bokeh.embed.embed_item(plotItems[name], target).then((views) => views.roots[0].model.document));
  return drawn.get(name);
}

const hiddenKinds = new Set();
const wholeTables = new WeakMap();  // source -> its data with the rows of every kind
function showKinds(page) {
  for (const source of page.roots()[0].references()) {
    if (!source.data?.kind) continue;
    if (!wholeTables.has(source)) wholeTables.set(source, source.data);
    const whole = wholeTables.get(source), kept = [...whole.kind.keys()].filter((row) => !hiddenKinds.has(whole.kind[row]));
    source.data = Object.fromEntries(Object.entries(whole).map(([name, column]) => [name, kept.map((row) => column[row])]));
  }
}

function startPlots() {
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((one) => one.isIntersecting)) {
      seen.unobserve(entry.target);
      plot(entry.target.dataset.plot, entry.target).then((page) => { if (hiddenKinds.size) showKinds(page); });
    }
  }, { rootMargin: "300px" });
  document.querySelectorAll("[data-plot]").forEach((place) => seen.observe(place));
  byId("kinds")?.append(...Object.entries(report.colours).map(([kind, colour]) => {
    const button = element("button", { class: "toggle", "aria-pressed": "true", title: `show or hide ${kind}`, text: kind });
    button.style.setProperty("--dot", colour);
    button.addEventListener("click", () => {
      if (!hiddenKinds.delete(kind)) hiddenKinds.add(kind);
      button.setAttribute("aria-pressed", String(!hiddenKinds.has(kind)));
      for (const [name, page] of drawn) if (name !== "lines") page.then(showKinds);
    });
    return button;
  }));
}

// ---- the linears ---------------------------------------------------------------------------------------------------

const experts = report.numbers.experts;
const linears = new Map();  // path -> one entry an expert
const inputs = experts.map(() => new Map());  // path of a reader -> group
experts.forEach((expert, index) => {
  for (const linear of expert.linears) {
    if (!linears.has(linear.path)) linears.set(linear.path, experts.map(() => null));
    linears.get(linear.path)[index] = linear;
  }
  for (const group of expert.groups) for (const reader of group.readers) inputs[index].set(reader, group);
});

const how = (linear) => [
  linear.mask && (linear.mask_folded ? "folded mask" : "mask"),
  linear.shift && "shift",
  linear.hadamard && `rotation ${linear.hadamard}`,
  linear.precision !== "high" && linear.rounding !== "nearest" && linear.rounding,
  linear.rank && `rank ${linear.rank}`,
  linear.outlier_columns && `${linear.outlier_columns} columns`,
].filter(Boolean).join(", ");

const mask = (linear) => linear.mask && [
  linear.alpha === null ? "" : `α ${figure(linear.alpha)}`, linear.mask_folded ? "folded" : span(linear.mask_min, linear.mask_max),
].filter(Boolean).join(" · ");

/** [heading, explanation, value to sort by, cell, shown as figure, only on demand] of the columns that each expert has. */
const allColumns = [
  ["is", "precision", (l) => l.precision, (l) => badge(l.precision), false, false],
  ["mask", "exponent and range of the channel mask", (l) => l.mask_max ?? (l.mask ? 0 : ""), (l) => mask(l) ?? "", false, false],
  ["tail", "maximum of the input over its 99.9 percentile", (l, e) => inputs[e].get(l.path)?.ratios.at(-1), (l, e) => figure(inputs[e].get(l.path)?.ratios.at(-1)), true, false],
  ["error", "relative energy of the output error by plain rounding to W4A4", (l) => l.errors.w4a4, (l) => l.errors.w4a4?.toExponential(1) ?? "", true, false],
  ["SQNR", "of the output on calibration rows, in dB", (l) => l.sqnr, (l) => decibels(l.sqnr), true, false],
  ["bytes", "as stored", (l) => l.bytes, (l) => bytes(l.bytes), true, experts.length > 1],
  ["how", "shift, rotation, rounding, side branch", how, how, false, true],
  ["because", "reason of the precision", (l) => l.reason, (l) => l.reason, false, true],
].filter(([, , value]) => [...linears.values()].some((entry) => entry.some((l, e) => l && (value(l, e) ?? "") !== "")));
let columns = allColumns.filter((column) => !column[5]);

let order = { key: null, descending: false };
let chosen = null;

function startLinears() {
  byId("linear-filter").addEventListener("input", debounced(fillLinears));
  byId("linear-precision").addEventListener("change", fillLinears);
  byId("linear-all").addEventListener("change", (event) => {
    columns = allColumns.filter((column) => event.target.checked || !column[5]);
    order = { key: null, descending: false };
    fillHead();
  });
  fillHead();
}

function fillHead() {
  const head = (title, key, properties) => element("th", { scope: "col", "data-key": key, ...properties }, element("button", {
    text: title, on: { click: () => { order = { key, descending: order.key === key && !order.descending }; fillLinears(); } },
  }));
  byId("linears").replaceChildren(
    element("thead", {},
      element("tr", {}, element("th", { colspan: 2 }), ...experts.map((expert) => element("th", { colspan: columns.length, class: "first", text: expert.name }))),
      element("tr", {}, head("linear", "path", {}), head("out × in", "shape", { class: "number" }), ...experts.flatMap((_, e) =>
        columns.map(([title, note, , , number], c) => head(title, `${e}:${c}`, { title: note, class: `${c ? "" : "first"} ${number ? "number" : ""}` }))))),
    element("tbody"));
  fillLinears();
}

const sortValue = (path, entry, place) => {
  if (order.key === "path" || order.key === null) return place;
  const some = entry.find(Boolean);
  if (order.key === "shape") return some.in_features * some.out_features;
  const [e, c] = order.key.split(":").map(Number);
  return entry[e] ? columns[c][2](entry[e], e) ?? "" : "";
};

function fillLinears() {
  const words = byId("linear-filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const precision = byId("linear-precision").value;
  let rows = [...linears].map(([path, entry], place) => ({ path, entry, key: sortValue(path, entry, place) }));
  rows = rows.filter(({ path, entry }) => {
    const text = `${path} ${entry.map((l) => l && `${l.precision} ${how(l)} ${l.reason}`).join(" ")}`.toLowerCase();
    return words.every((word) => text.includes(word)) && (!precision || entry.some((l) => l?.precision === precision));
  });
  const sign = order.descending ? -1 : 1;
  // What has no value comes last in either order.
  rows.sort((a, b) => (a.key === "") - (b.key === "") || sign * (a.key < b.key ? -1 : a.key > b.key ? 1 : 0));
  byId("linears").tBodies[0].replaceChildren(...rows.map(({ path, entry }) => {
    const some = entry.find(Boolean);
    const reasons = entry.map((l, e) => l && `${experts[e].name}: ${l.reason}`).filter(Boolean).join("\n");
    return element("tr", { "data-path": path, class: path === chosen && "chosen", on: { click: () => choose(path) } },
      element("td", { class: "mono path", title: `${path}\n${reasons}` }, element("button", { class: "link", text: path })),
      element("td", { class: "number", text: `${some.out_features} × ${some.in_features}` }),
      ...entry.flatMap((l, e) => columns.map(([, , , cell, number], c) => {
        const value = l ? cell(l, e) : "";
        return element("td", { class: `${c ? "" : "first"} ${number ? "number" : ""}`, title: c === 0 && l ? l.reason : null }, value);
      })));
  }));
  byId("linear-count").textContent = `${rows.length} of ${linears.size}`;
  for (const cell of document.querySelectorAll("#linears [data-key]")) {
    cell.setAttribute("aria-sort", order.key !== cell.dataset.key ? "none" : order.descending ? "descending" : "ascending");
  }
}

// ---- histograms of the chosen linear -------------------------------------------------------------------------------

const nothing = { left: [0], right: [1], top: [0.001] };  // Bokeh complains of a range without data

/** Bars of magnitudes in half octaves; a share is one of all values, zeros included. */
function magnitudes(histogram) {
  if (!histogram) return nothing;
  const total = histogram.zeros + histogram.counts.reduce((a, b) => a + b, 0);
  const left = histogram.counts.map((_, index) => (histogram.lowest + index) / 2);
  return { left, right: left.map((value) => value + 0.5), top: histogram.counts.map((count) => (100 * count) / total) };
}

function integers(counts) {
  if (!counts) return nothing;
  const total = counts.reduce((a, b) => a + b, 0);
  const used = counts.map((count, n) => [n, count]).filter(([, count]) => count);
  return { left: used.map(([n]) => n - 0.45), right: used.map(([n]) => n + 0.45), top: used.map(([, count]) => (100 * count) / total) };
}

async function choose(path) {
  chosen = path;
  byId("histogram-linear").value = path;
  document.querySelectorAll("#linears tbody tr").forEach((row) => row.classList.toggle("chosen", row.dataset.path === path));
  const page = await plot("histograms", byId("histogram-plot"));
  const entry = linears.get(path);
  entry.forEach((linear, e) => {
    const data = {
      weight: magnitudes(linear?.weight?.magnitudes), in_unit: integers(linear?.weight?.in_unit),
      input: magnitudes(inputs[e].get(path)?.magnitudes),
    };
    for (const [name, value] of Object.entries(data)) page.get_model_by_name(`${name}:${e}`).data = value;
  });
  byId("histogram-note").replaceChildren(...entry.flatMap((linear, e) => {
    if (!linear) return [];
    const unit = linear.weight?.unit_scale, group = inputs[e].get(path);
    const facts = [
      linear.weight && `${(100 * linear.weight.magnitudes.zeros / (linear.weight.magnitudes.zeros + linear.weight.magnitudes.counts.reduce((a, b) => a + b, 0))).toFixed(1)} % of the weights are 0`,
      linear.weight && linear.weight.rows < linear.out_features && `${linear.weight.rows} of ${linear.out_features} rows counted`,
      unit && `unit scales ${span(...unit)}`,
      group ? `input: maximum ${figure(group.maximum)}, 99.9 % ${figure(group.percentiles.at(-1))}, ${group.tokens} tokens` : "no calibration of its input",
    ].filter(Boolean);
    const name = element("b", { text: `${experts[e].name}: ` });
    name.style.color = report.expert_colours[e % 2];
    return [element("div", {}, name, facts.join(" · "))];
  }));
}

function startHistograms() {
  const select = byId("histogram-linear");
  select.append(...[...linears.keys()].map((path) => element("option", { value: path, text: path })));
  select.addEventListener("change", () => choose(select.value));
  byId("histogram-previous").addEventListener("click", () => step(-1));
  byId("histogram-next").addEventListener("click", () => step(1));
  const step = (by) => {
    const paths = [...linears.keys()];
    choose(paths[(paths.indexOf(chosen) + by + paths.length) % paths.length]);
  };
  const first = [...linears].find(([, entry]) => entry.some((l) => l && l.precision !== "high")) ?? [...linears][0];
  const seen = new IntersectionObserver((entries) => {
    if (!entries.some((one) => one.isIntersecting)) return;
    seen.disconnect();
    if (!chosen && first) choose(first[0]);
  }, { rootMargin: "300px" });
  seen.observe(byId("histogram-plot"));
}

function startContents() {
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const sections = [...links.keys()].map(byId);
  const mark = () => {
    const end = innerHeight + scrollY >= document.body.scrollHeight - 4;
    const here = end ? sections.at(-1) : sections.filter((section) => section.getBoundingClientRect().top < innerHeight / 3).at(-1);
    for (const [id, link] of links) {
      link.classList.toggle("here", id === (here ?? sections[0]).id);
    }
  };
  addEventListener("scroll", mark, { passive: true });
  mark();
}

startContents();
startLinears();
startPlots();
startHistograms();
