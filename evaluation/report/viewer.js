// The viewer: rows, replay and details. Every text of a model is set as text, never as markup.
// A deep link: report.html#tree=1&step=4 opens the second tree at its fourth rollout.

const ROW = 30; // pixels, as in report.css
const FIRST = 50; // children shown before "more"
const LONG = 120; // tokens shown in a row
const AUTO = 80; // branches up to which a tree opens expanded

const at = (id) => document.getElementById(id);
const state = { tree: null, metric: "reward", node: 0, open: new Set(), limit: new Map(), rows: [], timer: null };
const records = JSON.parse(at("trees").textContent);
const overview = new Overview(at("overview"), (node) => reveal(node));
let palette = new Palette();

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

// Spaces, tabs and line ends made visible.
function tokenText(node) {
  const { text, terminal } = state.tree.record;
  if (node === 0) return [element("i", "mark", "prompt")];
  if (!text[node]) return [element("i", "mark", terminal[node] ? "end" : "…")];
  const signs = { " ": "·", "\n": "↵", "\t": "⇥", "\r": "␍" };
  const parts = text[node].split(/([ \n\t\r])/).filter(Boolean).map((part) =>
    part in signs ? element("i", "ws", signs[part]) : part);
  if (terminal[node]) parts.push(element("i", "mark", "end"));
  return parts;
}

// ---- rows: a row is a chain of nodes with one child each ----

function chain(head) {
  const nodes = [head];
  let below = state.tree.shown(head);
  while (head !== 0 && below.length === 1) {
    nodes.push(below[0]);
    below = state.tree.shown(below[0]);
  }
  return { nodes, last: nodes[nodes.length - 1], below };
}

function build() {
  const rows = [], stack = [{ head: 0, level: 1, parent: null, place: [1, 1] }];
  while (stack.length) {
    const item = stack.pop();
    if (item.more) { rows.push(item); continue; }
    const row = { ...item, ...chain(item.head) };
    rows.push(row);
    if (!state.open.has(row.last)) continue;
    const limit = state.limit.get(row.last) || FIRST, size = row.below.length;
    if (size > limit) stack.push({ more: size - limit, of: row.last, level: row.level + 1, parent: row });
    row.below.slice(0, limit).map((head, i) => ({ head, level: row.level + 1, parent: row, place: [i + 1, size] }))
      .reverse().forEach((child) => stack.push(child));
  }
  state.rows = rows;
  at("spacer").style.height = `${rows.length * ROW}px`; // before anything scrolls
}

function rowElement(row, index) {
  const made = element("div", "row");
  made.id = `row-${index}`;
  made.dataset.index = index;
  made.style.top = `${index * ROW}px`;
  const indent = `${(row.level - 1) * 18}px`;
  made.setAttribute("role", "treeitem");
  made.setAttribute("aria-level", row.level);
  if (row.more) {
    const twist = element("span", "twist", "+");
    twist.style.marginLeft = indent;
    made.append(element("span", "cells"), twist, element("span", "count", `${row.more} more branches`));
    made.setAttribute("aria-selected", "false");
    return made;
  }
  const { tree, metric } = state;
  const score = element("span", "score", element("i"), number(tree.score(row.last, metric)));
  score.style.setProperty("--c", palette.shade(tree.level(row.last, metric)));
  const open = state.open.has(row.last);
  made.setAttribute("aria-setsize", row.place[1]);
  made.setAttribute("aria-posinset", row.place[0]);
  made.setAttribute("aria-selected", row.nodes.includes(state.node));
  if (row.below.length) made.setAttribute("aria-expanded", open);
  const text = element("span", "text", ...row.nodes.slice(0, LONG).map(tokenElement));
  if (row.nodes.length > LONG) text.append(element("i", "ws", ` … ${row.nodes.length - LONG} more tokens`));
  const probability = row.head === 0 ? "" : percent(Math.exp(tree.record.log_p[row.head]));
  const twist = element("span", "twist", row.below.length ? (open ? "▾" : "▸") : "");
  twist.style.marginLeft = indent;
  made.append(element("span", "cells", element("span", "prob", probability), score), twist, text);
  if (row.below.length && !open) made.append(element("span", "count", `${row.below.length} branches`));
  return made;
}

function tokenElement(node) {
  const { tree, metric } = state;
  const made = element("span", "tok", ...tokenText(node));
  made.dataset.node = node;
  if (node) made.title = `p ${percent(Math.exp(tree.record.log_p[node]))}`;
  made.style.setProperty("--c", palette.shade(tree.level(node, metric)));
  made.classList.toggle("path", tree.onPath.has(node));
  made.classList.toggle("chosen", node === state.node);
  return made;
}

// Only the rows in sight are elements, so the size of the tree does not matter.
function paint() {
  const box = at("rows");
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 8);
  const shown = state.rows.slice(first, first + Math.ceil(box.clientHeight / ROW) + 16);
  at("spacer").replaceChildren(...shown.map((row, i) => rowElement(row, first + i)));
  const index = selectedRow();
  if (index >= first && index < first + shown.length) box.setAttribute("aria-activedescendant", `row-${index}`);
  else box.removeAttribute("aria-activedescendant");
}

const selectedRow = () => state.rows.findIndex((row) => !row.more && row.nodes.includes(state.node));

function render() {
  const scale = state.tree.range[state.metric];
  at("column").textContent = state.metric;
  at("low").textContent = scale ? number(scale[0]) : "";
  at("high").textContent = scale ? number(scale[1]) : "";
  build();
  paint();
  describe();
  overview.draw(state.tree, state.metric, state.node, palette);
}

// ---- selection ----

function select(node, scroll = true) {
  state.node = node;
  const index = selectedRow(), box = at("rows");
  if (scroll && index >= 0) {
    const top = index * ROW;
    if (top < box.scrollTop + ROW) box.scrollTop = Math.max(0, top - ROW);
    else if (top + 2 * ROW > box.scrollTop + box.clientHeight) box.scrollTop = top + 2 * ROW - box.clientHeight;
  }
  render();
}

// Opens all branches above a node and selects it.
function reveal(node) {
  for (const above of [0, ...state.tree.path(node)].slice(0, -1)) {
    state.open.add(above);
    const place = state.tree.shown(above).findIndex((child) => isAbove(child, node));
    if (place >= (state.limit.get(above) || FIRST)) state.limit.set(above, place + 1);
  }
  build();
  select(node);
}

function isAbove(child, node) {
  while (node > child) node = state.tree.record.parent[node];
  return node === child;
}

function describe() {
  const { tree, node } = state, record = tree.record;
  const facts = [["depth", tree.depth[node]]];
  if (node) {
    facts.push(["p given the text before", percent(Math.exp(record.log_p[node]))],
      ["log p", number(record.log_p[node])], ["log p from the prompt", number(tree.logProb[node])]);
  }
  facts.push(["finished rollouts", tree.through[node]], ["best reward below", number(tree.best[node])]);
  if (record.value) {
    facts.push(["soft value, at the end", number(record.value[node])], ["visits", record.visits[node]],
      ["paths sent through", record.entered[node]]);
  }
  if (record.reward[node] !== null && tree.best[node] !== null) facts.push(["reward", number(record.reward[node])]);
  if (record.earned[node] !== null) facts.push(["earned so far", number(record.earned[node])]);
  if (record.upper[node] !== null) facts.push(["upper bound", number(record.upper[node])]);
  if (!record.terminal[node] && tree.children[node].length) {
    const known = tree.children[node].reduce((sum, child) => sum + Math.exp(record.log_p[child]), 0);
    const left = 1 - known - record.unexplored[node];
    facts.push(["branches", tree.children[node].length], ["p of untried tokens", percent(record.unexplored[node])]);
    if (left > 1e-4) facts.push(["p of branches not in this file", percent(left)]);
  }
  facts.push(["node number", record.created[node]]);
  const list = element("dl");
  for (const [name, value] of facts) list.append(element("dt", "", name), element("dd", "", String(value)));
  const before = tree.path(record.parent[node]).map((above) => record.text[above]).join("");
  const text = element("pre", "", before, node ? element("mark", "", record.text[node]) : "");
  at("node").replaceChildren(element("h3", "", ...tokenText(node)), list, element("h4", "", "Text so far"), text);
}

// ---- replay ----

function replay(step) {
  const { rollouts } = state.tree.record;
  state.tree.replay(step);
  at("step").value = step === null ? rollouts.length : step + 1;
  at("back").disabled = step === 0 || !rollouts.length;
  at("next").disabled = step === null || step === rollouts.length - 1;
  at("whole").disabled = step === null;
  if (step === null) {
    at("state").textContent = `All ${rollouts.length} rollouts`;
    return render();
  }
  const { reward, best_so_far: best, leaf, nodes } = rollouts[step];
  const known = leaf === null ? ", path not in this file" : "";
  at("state").textContent =
    `Rollout ${step + 1} of ${rollouts.length}: reward ${number(reward)}, best ${number(best)}, ${nodes} nodes${known}`;
  reveal(leaf === null ? 0 : leaf);
}

function move(by) {
  const { step, record } = state.tree;
  const target = step === null ? record.rollouts.length - 1 + Math.min(by, 0) : step + by;
  if (target >= 0 && target < record.rollouts.length) replay(target);
}

function play(on) {
  clearInterval(state.timer);
  state.timer = null;
  at("play").textContent = on ? "Pause" : "Play";
  at("play").setAttribute("aria-pressed", on);
  if (!on) return;
  const last = state.tree.record.rollouts.length - 1;
  if (state.tree.step === null || state.tree.step >= last) replay(0);
  state.timer = setInterval(() => (state.tree.step >= last ? play(false) : move(1)), 900);
}

// ---- start ----

function show(index, step = null) {
  play(false);
  const record = records[index], tree = new SearchTree(record);
  state.tree = tree;
  state.limit.clear();
  at("choice").value = index;
  at("metric").disabled = !record.value;
  if (!record.value) at("metric").value = state.metric = "reward";
  at("step").max = Math.max(record.rollouts.length, 1);
  at("play").disabled = at("step").disabled = !record.rollouts.length;
  const { kept, total } = record.nodes;
  at("about").textContent = `${total} nodes, depth ${tree.maxDepth}` + (kept < total
    ? `. This file keeps the ${kept} nodes on the paths of the best ${record.rollouts_kept} of ${record.rollouts.length} rollouts.`
    : ".") + (record.value ? ` Soft values are those at the end of the search, λ = ${record.reward_scale}.` : "");
  const branches = tree.children.flatMap((list, node) => (list.length > 1 || node === 0 ? [node] : []));
  state.open = new Set(branches.length <= AUTO ? branches : [0]);
  state.node = 0;
  at("rows").scrollTop = 0;
  replay(record.rollouts[step] ? step : null);
}

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const index = selectedRow(), row = state.rows[index];
  const go = (to) => {
    const target = state.rows[Math.min(Math.max(to, 0), state.rows.length - 1)];
    select(target.more ? target.parent.last : target.last);
  };
  const actions = {
    ArrowDown: () => go(index + 1),
    ArrowUp: () => go(index - 1),
    Home: () => go(0),
    End: () => go(state.rows.length - 1),
    ArrowRight: () => row && (row.below.length && !state.open.has(row.last) ? toggle(row) : row.below.length && go(index + 1)),
    ArrowLeft: () => row && (row.below.length && state.open.has(row.last) ? toggle(row) : row.parent && select(row.parent.last)),
    Enter: () => row && toggle(row),
    " ": () => row && toggle(row),
    ",": () => move(-1),
    ".": () => move(1),
  };
  if (event.shiftKey && row) {
    const place = row.nodes.indexOf(state.node);
    actions.ArrowLeft = () => place > 0 && select(row.nodes[place - 1]);
    actions.ArrowRight = () => place + 1 < row.nodes.length && select(row.nodes[place + 1]);
  }
  if (!(event.key in actions)) return;
  event.preventDefault();
  actions[event.key]();
}

function toggle(row) {
  if (state.open.has(row.last)) state.open.delete(row.last);
  else if (row.below.length) state.open.add(row.last);
  select(row.last);
}

function onClick(event) {
  const line = event.target.closest(".row");
  if (!line) return;
  const row = state.rows[line.dataset.index], token = event.target.closest(".tok");
  if (row.more) {
    state.limit.set(row.of, (state.limit.get(row.of) || FIRST) + FIRST);
    render();
  } else if (event.target.closest(".twist")) toggle(row);
  else select(token ? Number(token.dataset.node) : row.last, false);
}

function openLink() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const index = Number(asked.get("tree")), step = Number(asked.get("step"));
  if (!asked.has("tree") || !records[index]) return false;
  show(index, step > 0 ? step - 1 : null);
  at("viewer").scrollIntoView();
  return true;
}

records.forEach((record, index) => {
  const name = [record.id, record.method, record.model, record.dataset, `seed ${record.seed}`, ...(record.oracle ? ["oracle reward"] : [])].join(" · ");
  at("choice").append(new Option(name, index));
});
at("choice").addEventListener("change", () => show(Number(at("choice").value)));
at("metric").addEventListener("change", () => { state.metric = at("metric").value; render(); });
at("expand").addEventListener("click", () => {
  state.open = new Set(state.tree.children.flatMap((list, node) => (list.length ? [node] : [])));
  render();
});
at("collapse").addEventListener("click", () => { state.open = new Set([0]); select(0); });
at("step").addEventListener("input", () => { play(false); replay(Number(at("step").value) - 1); });
at("back").addEventListener("click", () => { play(false); move(-1); });
at("next").addEventListener("click", () => { play(false); move(1); });
at("whole").addEventListener("click", () => { play(false); replay(null); });
at("play").addEventListener("click", () => play(state.timer === null));
at("rows").addEventListener("scroll", paint);
at("rows").addEventListener("keydown", onKey);
at("rows").addEventListener("click", onClick);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { palette = new Palette(); render(); });
new ResizeObserver(() => render()).observe(at("overview").parentElement);
addEventListener("hashchange", openLink);
if (!openLink()) show(0);
