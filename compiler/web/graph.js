// The program by region: drawings, what each pass changed, search, and the details of a node.
"use strict";

const COLUMN = 158, LAYER = 54, NODE = { width: 148, height: 36 }, MARGIN = 16;
const SMALL = new Set(["getitem"]);
const CHANGES = "Changes", BEFORE = "Before", AFTER = "After", DRAWING = "Drawing", TEXT = "Text";

const view = { expert: 0, step: 0, tab: DRAWING, region: null, node: null, words: [] };
const regions = byId("regions"), viewer = byId("viewer");
const edges = { page: null };

const program = () => report.programs[view.expert];
const step = () => program().passes[view.step];
const isPass = () => !["captured", "graph.json", "relax_activations"].includes(step().name);
const structure = (region, at = view.step) => program().structures[program().passes[at]?.blocks[region]];
const formOf = (found) => report.forms[found.form];
const nodesOf = (found) => (found ? found.nodes.map((index) => program().nodes[index]) : []);
const modulePath = (region, node) => [region === "outside" ? "" : region, node.module].filter(Boolean).join(".");
const line = (node) => `${node.name} = ${node.target}(${node.args})${node.type ? ` : ${node.type}` : ""}${node.marks ? `  # ${node.marks}` : ""}`;

for (const one of report.programs) one.nodes = one.nodes.map((row) => Object.fromEntries(row.map((value, index) => [one.node_fields[index], value])));

/** Positions of the nodes that the chosen step took from a region and brought to it. */
function difference(region) {
  const before = new Set(structure(region, view.step - 1)?.nodes), after = new Set(structure(region)?.nodes);
  return { went: [...before].filter((node) => !after.has(node)), came: [...after].filter((node) => !before.has(node)) };
}

/** "f*h*w" and the like stay; types are named shortly. */
const shortType = (type) => type.replaceAll("bfloat16", "bf16").replaceAll("float32", "f32").replaceAll("uint8", "u8").replaceAll("int64", "i64").replaceAll(", ", ",");
/** "to_q" of attn1.to_q: which linear it is. */
const shortModule = (node) => (node.reads.length && node.precision !== "none" ? node.module.split(".").slice(1).join(".") : "");

// ---- the list of regions -------------------------------------------------------------------------------------------

function fillRegions() {
  const open = view.region;
  const names = Object.keys(step().blocks).sort((a, b) => regionNumber(a) - regionNumber(b));
  const letters = new Map();
  for (const name of names) if (!letters.has(step().blocks[name])) letters.set(step().blocks[name], letterOf(letters.size));
  const sharers = (name) => names.filter((other) => step().blocks[other] === step().blocks[name]);
  viewer.remove();
  regions.replaceChildren(...names.map((name) => {
    const found = structure(name), same = sharers(name), letter = letters.get(step().blocks[name]);
    const title = same.length > 1 ? `structure ${letter}, the same in ${ranges(same)}` : `structure ${letter}, only here`;
    const summary = element("summary", { title }, element("span", { class: "grow", text: name === "outside" ? "outside" : name.replace("blocks.", "block ") }));
    if (isPass()) {
      const { came, went } = difference(name);
      if (came.length) summary.append(element("span", { class: "badge came", text: `+${came.length}` }));
      if (went.length) summary.append(element("span", { class: "badge went", text: `−${went.length}` }));
      if (!came.length && !went.length) summary.append(element("span", { class: "quiet", text: "unchanged" }));
    } else summary.append(element("span", { class: "quiet", text: `${found.nodes.length} nodes` }));
    summary.append(element("span", { class: "badge", text: letter }), element("span", { class: "badge hits", hidden: true }));
    const details = element("details", { class: "region", "data-region": name }, summary);
    if (isPass() && !summary.querySelector(".came, .went")) details.classList.add("same");
    summary.addEventListener("click", (event) => {
      event.preventDefault();
      openRegion(details.open ? null : name);
    });
    return details;
  }));
  view.region = null;
  openRegion(names.includes(open) ? open : null, { keepNode: true });
  search();
}

const regionNumber = (name) => (name === "outside" ? -1 : Number(name.slice(7)));
const letterOf = (index) => (index < 26 ? String.fromCharCode(65 + index) : `${letterOf(Math.floor(index / 26) - 1)}${letterOf(index % 26)}`);

/** "block 1 to 4, block 6" */
function ranges(names) {
  const numbers = names.map(regionNumber).sort((a, b) => a - b), parts = [];
  for (let first = 0; first < numbers.length;) {
    let last = first;
    while (numbers[last + 1] === numbers[last] + 1) last++;
    parts.push(numbers[first] < 0 ? "outside" : first === last ? `block ${numbers[first]}` : `blocks ${numbers[first]} to ${numbers[last]}`);
    first = last + 1;
  }
  return parts.join(", ");
}

function openRegion(name, { keepNode = false } = {}) {
  if (!keepNode || name !== view.region) view.node = keepNode ? view.node : null;
  view.region = name;
  for (const details of regions.children) details.open = details.dataset.region === name;
  if (name === null) {
    viewer.remove();
    return;
  }
  regions.querySelector(`[data-region="${CSS.escape(name)}"]`).append(viewer);
  viewer.hidden = false;
  const names = Object.keys(step().blocks).filter((other) => step().blocks[other] === step().blocks[name] && other !== name);
  byId("same-as").textContent = names.length ? `the same in ${ranges(names)}` : "";
  show();
}

// ---- what the viewer shows -----------------------------------------------------------------------------------------

function show() {
  if (!tabs().includes(view.tab)) view.tab = tabs()[0];
  byId("tabs").replaceChildren(...tabs().map((name) => element("button", {
    text: name, "aria-pressed": String(name === view.tab), on: { click: () => { view.tab = name; show(); } },
  })));
  const drawing = [DRAWING, BEFORE, AFTER].includes(view.tab);
  byId("sheet").hidden = !drawing;
  byId("text").hidden = drawing;
  if (drawing) draw(); else write();
  if (drawing) showFirst();
  else byId("text").scrollTo(0, 0);
  detail();
  mark();
}

/** Begins at the drawing's corner, unless the first node that a pass took or brought, or the first of all, is not in view there. */
function showFirst() {
  const canvas = byId("canvas"), first = canvas.querySelector(".node.came, .node.went") ?? canvas.querySelector(".node");
  if (!first) return;
  const { offsetLeft: x, offsetTop: y } = first, { clientWidth: width, clientHeight: height } = canvas;
  canvas.scrollTo(x + NODE.width > width ? x - (width - NODE.width) / 2 : 0, y + NODE.height > height ? y - LAYER : 0);
}

const tabs = () => (isPass() ? [CHANGES, BEFORE, AFTER] : step().name === "relax_activations" ? [DRAWING, TEXT, CHANGES] : [DRAWING, TEXT]);
const shown = () => structure(view.region, view.tab === BEFORE ? view.step - 1 : view.step);

async function draw() {
  const found = shown(), sheet = byId("sheet");
  if (!found) {
    sheet.replaceChildren(edges.place);
    return;
  }
  const { x, y, routes, columns, layers } = formOf(found).layout;
  const width = Math.ceil(2 * MARGIN + columns * COLUMN + NODE.width), height = 2 * MARGIN + (layers - 1) * LAYER + NODE.height;
  sheet.style.width = `${width}px`;
  sheet.style.height = `${height}px`;
  const { came, went } = isPass() ? difference(view.region) : { came: [], went: [] };
  const news = new Map([...came.map((node) => [node, "came"]), ...went.map((node) => [node, "went"])]);
  const middle = (column) => MARGIN + column * COLUMN + NODE.width / 2, top = (layer) => MARGIN + layer * LAYER;
  const nodes = nodesOf(found), isSmall = (index) => SMALL.has(nodes[index].label);
  const place = (made, index, above = 0) => {
    made.style.left = `${middle(x[index]) - NODE.width / 2}px`;
    made.style.top = `${top(y[index]) - above}px`;
    return made;
  };
  const sources = new Map(found.inputs.map((input) => [input[0], input]));
  const sheetNodes = nodes.flatMap((node, index) => {
    const button = element("button", {
      class: `node ${node.precision} ${isSmall(index) ? "small" : ""} ${news.get(found.nodes[index]) ?? ""}`, "data-node": node.name,
      title: `${modulePath(view.region, node)}\n${node.type}`, "aria-pressed": "false", on: { click: () => pick(node) },
    }, element("b", { text: isSmall(index) ? `[${node.args.split(", ").at(-1)}]` : node.label }, element("i", { text: ` ${shortModule(node)}` })),
    element("span", { text: shortType(node.type) }));
    if (!node.inputs.length) return [place(button, index)];
    const about = node.inputs.map((name) => (sources.get(name) ?? [name]).filter(Boolean).join("  ")).join("\n");
    return [place(element("div", { class: "from", title: about, text: `↘ ${node.inputs.join(", ")}` }), index, isSmall(index) ? 7 : 15), place(button, index)];
  });
  sheet.replaceChildren(edges.place, ...sheetNodes);
  mark();
  const isChosen = (index) => nodes[index].name === view.node;
  const data = Object.fromEntries(["x0", "y0", "x1", "y1", "cx0", "cy0", "cx1", "cy1", "colour", "width"].map((name) => [name, []]));
  formOf(found).edges.forEach(([from, to], index) => {
    const active = isChosen(from) || isChosen(to);
    const points = [[middle(x[from]), top(y[from]) + (isSmall(from) ? 29 : NODE.height)]];
    routes[index].forEach((column, passed) => {
      const at = top(y[from] + 1 + passed);
      points.push([middle(column), at], [middle(column), at + NODE.height]);
    });
    points.push([middle(x[to]), top(y[to]) + (isSmall(to) ? 7 : 0)]);
    for (let at = 0; at + 1 < points.length; at++) {
      const [[x0, y0], [x1, y1]] = [points[at], points[at + 1]], half = (y0 + y1) / 2;
      const row = { x0, y0, x1, y1, cx0: x0, cy0: half, cx1: x1, cy1: half, colour: active ? "#3d6fe0" : "#8b97a6", width: active ? 2.4 : 1.1 };
      for (const [name, value] of Object.entries(row)) data[name].push(value);
    }
  });
  const page = await plot("lines", edges.place), lines = page.get_model_by_name("lines");
  Object.assign(lines.x_range, { end: width });
  Object.assign(lines.y_range, { start: height });
  lines.setv({ width, height });
  page.get_model_by_name("lines:source").data = data;
}

function write() {
  const text = byId("text");
  const entry = (node, kind = "", sign = "", more = "") => element("button", {
    class: kind, "data-node": node.name, "aria-pressed": "false", text: `${sign}${line(node)}${more}`, on: { click: () => pick(node) },
  });
  if (view.tab === TEXT) {
    text.replaceChildren(...nodesOf(shown()).map((node) => entry(node)));
    return;
  }
  const before = structure(view.region, view.step - 1)?.nodes ?? [], after = structure(view.region)?.nodes ?? [];
  const rows = lineDifference(before, after);
  if (rows.every(([, kind]) => kind === "")) {
    text.replaceChildren(element("div", { class: "fold", text: "This pass left the region as it was." }));
    return;
  }
  const { came, went } = difference(view.region), others = { came: went, went: came };
  /** What a node has that the one of the same line on the other side has not: how its stored tensors are made. */
  const unlike = (index, kind) => {
    const node = program().nodes[index];
    const twin = (others[kind] ?? []).map((other) => program().nodes[other]).find((other) => line(other) === line(node));
    const told = twin ? node.reads.filter((read) => !twin.reads.includes(read)) : [];
    return told.length ? `  # ${told.join(", ")}` : "";
  };
  const near = rows.map((_, at) => rows.slice(Math.max(0, at - 2), at + 3).some(([, kind]) => kind !== ""));
  const parts = [];
  let folded = 0;
  rows.forEach(([index, kind], at) => {
    if (!near[at]) { folded++; return; }
    if (folded) parts.push(element("div", { class: "fold", text: asBefore(folded) }));
    folded = 0;
    parts.push(entry(program().nodes[index], kind, { came: "+ ", went: "− " }[kind] ?? "  ", unlike(index, kind)));
  });
  if (folded) parts.push(element("div", { class: "fold", text: asBefore(folded) }));
  text.replaceChildren(...parts);
}

const asBefore = (count) => `  ⋯ ${count} ${count === 1 ? "line" : "lines"} as before`;

/** Both lists merged by their longest common subsequence: [value, "went" | "came" | ""]. */
function lineDifference(before, after) {
  const common = Array.from({ length: before.length + 1 }, () => new Uint16Array(after.length + 1));
  for (let i = before.length - 1; i >= 0; i--) {
    for (let j = after.length - 1; j >= 0; j--) common[i][j] = before[i] === after[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
  }
  const rows = [];
  let i = 0, j = 0;
  while (i < before.length || j < after.length) {
    if (i < before.length && j < after.length && before[i] === after[j]) { rows.push([before[i], ""]); i++; j++; }
    else if (i < before.length && (j === after.length || common[i + 1][j] >= common[i][j + 1])) rows.push([before[i++], "went"]);
    else rows.push([after[j++], "came"]);
  }
  return rows;
}

// ---- one node ------------------------------------------------------------------------------------------------------

function pick(node) {
  view.node = view.node === node.name ? null : node.name;
  detail();
  mark();
  if (!byId("sheet").hidden) draw();
}

function mark() {
  for (const button of viewer.querySelectorAll("[data-node]")) button.setAttribute("aria-pressed", String(button.dataset.node === view.node));
  const found = new Map([...nodesOf(structure(view.region, view.step - 1)), ...nodesOf(structure(view.region))].map((node) => [node.name, node]));
  byId("canvas").classList.toggle("searching", view.words.length > 0);
  for (const button of viewer.querySelectorAll("[data-node]")) button.classList.toggle("hit", view.words.length > 0 && matches(view.region, found.get(button.dataset.node)));
}

/** The version of the chosen node that is shown: after a pass, unless only the program before has it. */
function chosenNode() {
  const named = (found) => nodesOf(found).find((node) => node.name === view.node);
  return named(shown()) ?? named(structure(view.region, view.step - 1));
}

const list = (title, items) => (items.length ? [element("h5", { text: title }), ...items] : []);
const code = (text) => element("pre", { text });
const facts = (pairs) => element("dl", {}, ...pairs.filter(([, value]) => value !== "" && value !== null && value !== undefined)
  .flatMap(([name, value]) => [element("dt", { text: name }), element("dd", {}, value)]));

function detail() {
  const node = view.node && chosenNode(), aside = byId("details");
  if (!node) {
    aside.replaceChildren(element("p", { class: "quiet", text: "Choose a node to see its arguments, its stored tensors and its numbers." }));
    return;
  }
  const path = modulePath(view.region, node), linear = linears.get(path)?.[view.expert];
  const found = shown(), place = nodesOf(found).findIndex((other) => other.name === node.name);
  const jump = (other) => element("div", {}, element("button", { class: "link", text: `${other.name} ${other.label}`, on: { click: () => { pick(other); reveal(); } } }));
  const around = (from, to) => (place < 0 ? [] : formOf(found).edges.filter((edge) => edge[to] === place).map((edge) => jump(program().nodes[found.nodes[edge[from]]])));
  const foreign = node.inputs.map((name) => {
    const input = found?.inputs.find(([known]) => known === name);
    return code(input ? `${input[0]} : ${input[1]}${input[2] ? `\n  made by ${input[2]}` : ""}` : name);
  });
  aside.replaceChildren(
    element("h4", { text: `${node.name} ${node.label}` }),
    badge(node.precision === "none" ? "no product" : node.precision),
    facts([["operator", element("code", { text: node.target })], ["module", element("code", { text: path || "(model)" })], ["value", element("code", { text: node.type })]]),
    ...(linear && node.reads.length ? [element("h5", { text: "the linear" }), linearFacts(linear, path)] : []),
    ...list("arguments", [code(node.args)]),
    ...list("stored tensors", node.reads.map(code)),
    ...list("from outside the region", foreign),
    ...list("reads", around(0, 1)),
    ...list("read by", around(1, 0)),
  );
}

function linearFacts(linear, path) {
  const input = inputs[view.expert].get(path);
  return facts([
    ["weight", `${linear.out_features} × ${linear.in_features}`], ["how", how(linear)], ["because", linear.reason],
    ["mask", span(linear.mask_min, linear.mask_max)], ["SQNR", linear.sqnr === null ? "" : `${decibels(linear.sqnr)} dB`],
    ["input max", input ? `${figure(input.maximum)} (${figure(input.ratios.at(-1))} × 99.9 %)` : ""],
    ["bytes", `${bytes(linear.bytes)} (bf16 ${bytes(linear.bf16_bytes)})`],
    ["", element("button", { class: "link", text: "histograms", on: { click: () => { choose(path); byId("histograms").scrollIntoView(); } } })],
  ]);
}

const reveal = () => viewer.querySelector('[data-node][aria-pressed="true"]')?.scrollIntoView({ block: "center", inline: "center", behavior: "instant" });

// ---- search --------------------------------------------------------------------------------------------------------

const matches = (region, node) => {
  if (!node) return false;
  const text = `${modulePath(region, node)} ${node.target}`.toLowerCase();
  return view.words.every((word) => text.includes(word));
};

/** [region, node] of every hit, region by region. */
function hits() {
  if (!view.words.length) return [];
  return [...regions.children].flatMap(({ dataset: { region } }) => nodesOf(structure(region)).filter((node) => matches(region, node)).map((node) => [region, node]));
}

function search() {
  view.words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = hits(), counts = new Map();
  for (const [region] of found) counts.set(region, (counts.get(region) ?? 0) + 1);
  for (const details of regions.children) {
    const count = counts.get(details.dataset.region) ?? 0, hit = details.querySelector(".hits");
    hit.hidden = !count;
    hit.textContent = String(count);
    details.hidden = view.words.length > 0 && !count && details.dataset.region !== view.region;
  }
  byId("search-count").textContent = view.words.length ? `${found.length} nodes in ${counts.size} regions` : "";
  byId("search-previous").disabled = byId("search-next").disabled = !found.length;
  if (view.region !== null) mark();
}

function goToHit(by) {
  const found = hits();
  if (!found.length) return;
  const at = found.findIndex(([region, node]) => region === view.region && node.name === view.node);
  const [region, node] = found[(at < 0 ? (by > 0 ? 0 : found.length - 1) : at + by + found.length) % found.length];
  if (region !== view.region) openRegion(region);
  view.node = node.name;
  if (!viewer.querySelector(`[data-node="${CSS.escape(node.name)}"]`)) view.tab = tabs().at(-1);
  show();
  reveal();
}

// ---- beginning -----------------------------------------------------------------------------------------------------

function fillSteps() {
  const names = { captured: "as captured", "graph.json": "the stored program", relax_activations: "the stored bf16 program" };
  const select = byId("step"), passes = program().passes;
  const options = passes.map((one, index) => element("option", { value: index, text: names[one.name] ?? `${index}. ${one.name}${one.changed ? "" : " (no change)"}` }));
  const stored = options.filter((_, index) => passes[index].name in names);
  const changing = options.filter((_, index) => !(passes[index].name in names));
  select.replaceChildren(element("optgroup", { label: "programs" }, ...stored.slice(1), stored[0]), element("optgroup", { label: "before and after a pass" }, ...changing));
  select.value = view.step;
}

function chooseStep(index) {
  view.step = index;
  byId("step").value = index;
  view.tab = tabs()[0];
  byId("passnote").replaceChildren(element("span", { text: step().what }), ...step().notes.map((note) => element("div", { class: "quiet", text: note })));
  byId("pass-previous").disabled = index <= 0;
  byId("pass-next").disabled = index >= program().passes.length - 1;
  fillRegions();
}

function chooseExpert(index) {
  const name = report.programs[view.expert].passes[view.step]?.name ?? "graph.json";
  view.expert = index;
  [...byId("experts").children].forEach((button, at) => button.setAttribute("aria-pressed", String(at === index)));
  const at = program().passes.findIndex((one) => one.name === name);
  view.step = at < 0 ? program().passes.findIndex((one) => one.name === "graph.json") : at;
  fillSteps();
  chooseStep(view.step);
}

if (report.programs.length) {
  edges.place = byId("lines");
  view.step = program().passes.findIndex((one) => one.name === "graph.json");
  byId("experts").append(...report.programs.map((one, index) => element("button", { text: one.expert, on: { click: () => chooseExpert(index) } })));
  byId("step").addEventListener("change", (event) => chooseStep(Number(event.target.value)));
  byId("pass-previous").addEventListener("click", () => chooseStep(view.step - 1));
  byId("pass-next").addEventListener("click", () => chooseStep(view.step + 1));
  byId("search").addEventListener("input", debounced(search));
  byId("search").addEventListener("keydown", (event) => { if (event.key === "Enter") { search(); goToHit(event.shiftKey ? -1 : 1); } });
  byId("search-previous").addEventListener("click", () => goToHit(-1));
  byId("search-next").addEventListener("click", () => goToHit(1));
  chooseExpert(0);
}
