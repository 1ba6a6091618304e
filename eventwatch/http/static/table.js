// The table of nodes: filtered, sorted, and only the rows that can be seen, so that 5,000 nodes scroll as 50 do.
//
// Rows have one height, and two rows without content stand for what is above and below. A row that stays in sight
// stays the same element, so that focus and selection survive each change.

import { byId, element, link, button, setClass, setText, throttled } from "./dom.js";
import { NAMES, matches, parse, unknownFields } from "./filter.js";
import { healthClass, problemName, statusClass, urgency } from "./problems.js";
import { listAddress, nodes, on, place, shownNow, state, tell } from "./state.js";
import { address, age, clock } from "./words.js";

const COLUMNS = [
  ["name", "Node"], ["status", "Status"], ["health", "Health"], ["address", "Address"], ["idle", "Idle left"],
  ["restarts", "Restarts"],
];
// Characters of a name from which on it is cut in the middle where it has too little room, and those at its end that
// stay: names of one fleet begin alike.
const LONG = 20;
const END = 11;
const MARGIN = 6;
const FRESH = 1500;
// ms.
const ADDRESS_EVERY = 500;
const phone = matchMedia("(max-width: 820px)");
const KEYS = {
  problems: (node) => -urgency(node),
  name: nameOrder,
  image: (node) => inOrder(node.image),
  status: (node) => node.status,
  health: (node) => (node.status === "running" ? "" : "~") + node.health,
  address: (node) => inOrder(address(node)) || "~",
  idle: (node) => node.idle_at ?? Infinity,
  restarts: (node) => node.restarts,
  since: (node) => node.since ?? 0,
};

const drawn = new Map();
let shown = [];
// What was typed and is not in the address yet; null: nothing.
let typed = null;

function height() {
  return phone.matches ? 122 : 46;
}

// A text that sorts as people do: without capitals, and numbers by their size.
function inOrder(text) {
  return String(text).toLowerCase().replace(/\d+/g, (digits) => digits.padStart(12, "0"));
}

function nameOrder(node) {
  node.order ??= inOrder(node.name || node.short_id);
  return node.order;
}

// Sorted by keys that are made once: comparing names as names costs a quarter of a second at 5,000.
function sorted(chosen, sort) {
  const sign = sort.startsWith("-") ? -1 : 1;
  const key = KEYS[sort.replace(/^-/, "")] || KEYS.problems;
  const order = (one, other) => (one === other ? 0 : one < other ? -1 : 1);
  return chosen.map((node) => [key(node), nameOrder(node), node])
    .sort((one, other) => sign * order(one[0], other[0]) || order(one[1], other[1]) || order(one[2].node_id, other[2].node_id))
    .map(([, , node]) => node);
}

// Put what was typed into the address. Not with each key: browsers ignore an address that changes too often.
function keep() {
  if (typed === null) return;
  history.replaceState(null, "", listAddress(typed, place().sort));
  typed = null;
  choose();
}

export function choose() {
  const { sort, words: kept } = place();
  const words = typed ?? kept;
  const conditions = parse(words);
  shown = sorted([...nodes.values()].filter((node) => matches(node, conditions)), sort);
  const none = state.overview && state.overview.listed ? "No nodes." : "";
  setText(byId("shown"), nodes.size === 0 ? none : `${shown.length} of ${nodes.size} nodes shown.`);
  byId("table").setAttribute("aria-rowcount", String(shown.length + 1));
  showEmpty(words);
  draw();
  tell("shown");
}

function showEmpty(words) {
  const where = byId("empty");
  where.hidden = shown.length > 0 || !state.overview;
  byId("table").hidden = !where.hidden;
  if (where.hidden) return;
  const { role, listed, register_label: label } = state.overview;
  const why = nodes.size ? `filter ${words}` : `${role} ${listed} ${label}`;
  if (where.dataset.why === why) return;
  where.dataset.why = why;
  if (nodes.size) {
    const unknown = unknownFields(words);
    const told = unknown.length ? `${unknown.map((name) => `“${name}”`).join(", ")} is no field: there are ${NAMES.join(", ")}.` : "";
    where.replaceChildren(element("p", "No node is like that."), ...(told ? [element("p", told)] : []),
      button("Show all", "plain", () => { location.hash = listAddress("", place().sort); }));
  } else if (role === "standby") {
    where.replaceChildren(element("p", "The nodes are shown by the one that leads."));
  } else if (!listed) {
    where.replaceChildren(element("p", "The nodes are not read yet: see above for what it waits for."));
  } else {
    where.replaceChildren(...advice(state.overview));
  }
}

function advice(overview) {
  const list = element("ol");
  const label = overview.register_label;
  const steps = label
    ? [`Start a container with the label ${label}: it gets a document at once.`]
    : [`Have the manager start a node: it makes the document, in the collection ToolServerNode of the database ${overview.database}.`,
      "Or, without a manager, set EVENTWATCH_REGISTER_LABEL=tool-server.node and start a container with that label."];
  steps.push("If there should be nodes already, run eventwatch doctor: it tells what is missing.");
  list.append(...steps.map((text) => element("li", text)));
  return [element("h3", "No node has a document yet"), list];
}

// -- drawing ------------------------------------------------------------------------------------------------

function spacer() {
  const row = element("tr", null, "spacer");
  row.setAttribute("aria-hidden", "true");
  row.append(element("td"));
  row.firstChild.colSpan = COLUMNS.length;
  return row;
}

const above = spacer();
const below = spacer();

function makeRow(node) {
  const row = element("tr");
  row.dataset.id = node.node_id;
  for (const [key, name] of COLUMNS) {
    const cell = element("td", null, `c-${key}`);
    cell.dataset.name = name;
    row.append(cell);
  }
  const open = link("", `#/node/${node.node_id}`);
  open.append(element("span", null, "begin"), element("span", null, "end"));
  const lower = element("span", null, "lower");
  lower.append(element("code"), " ", element("span", null, "image"));
  row.cells[0].append(open, lower);
  const why = element("span", null, "lower");
  why.append(element("b", null, "badges"), " ", element("span", null, "because"));
  row.cells[1].append(element("span"), element("span", null, "age"), why);
  row.cells[2].append(element("span"));
  row.addEventListener("click", (event) => {
    if (!event.target.closest("a") && !String(getSelection())) location.hash = open.hash;
  });
  return row;
}

function fill(row, node, at) {
  const [name, status, health, where, idle, restarts] = row.cells;
  const told = node.name || node.short_id;
  const cut = told.length > LONG ? told.length - END : told.length;
  setText(name.firstChild.firstChild, told.slice(0, cut));
  setText(name.firstChild.lastChild, told.slice(cut));
  const [id, image] = name.lastChild.children;
  setText(id, node.short_id);
  setText(image, node.image);
  name.title = [node.name, node.image, node.node_id].filter(Boolean).join("\n");
  const [badges, because] = status.lastChild.children;
  setText(badges, node.problems.filter((key) => key !== "unhealthy").map(problemName).join(" · "));
  setText(because, reasonOf(node));
  status.title = reasonOf(node);
  setText(status.children[0], node.status);
  setClass(status.children[0], statusClass(node));
  setText(status.children[1], node.since ? age(shownNow() - node.since) : "");
  setText(health.children[0], node.health);
  setClass(health.children[0], healthClass(node));
  setText(where, address(node) || "–");
  setText(idle, node.idle_at === null || node.idle_at === undefined ? "–" : age(node.idle_at - shownNow()));
  setText(restarts, node.restarts ? String(node.restarts) : "–");
  row.setAttribute("aria-rowindex", String(at + 2));
  const fresh = node.touched && performance.now() - node.touched < FRESH;
  row.classList.toggle("fresh", Boolean(fresh));
  row.classList.toggle("alarm", node.problems.length > 0);
}

// Why it is so, and of what is being stopped by when it is over at the latest.
function reasonOf(node) {
  const by = node.stop_by ? `is killed at ${clock(new Date((node.stop_by - state.offset) * 1000))}; ` : "";
  return `${by}${node.reason || ""}`;
}

function draw() {
  if (byId("list").hidden) return;
  const scroll = byId("scroll");
  const tall = height();
  const top = Math.max(0, scroll.scrollTop - (phone.matches ? 0 : tall));
  const first = Math.max(0, Math.min(shown.length, Math.floor(top / tall) - MARGIN));
  const last = Math.min(shown.length, Math.ceil((top + scroll.clientHeight) / tall) + MARGIN);
  const keep = new Set();
  const rows = [above];
  for (let at = first; at < last; at += 1) {
    const node = shown[at];
    keep.add(node.node_id);
    let row = drawn.get(node.node_id);
    if (!row) {
      row = makeRow(node);
      drawn.set(node.node_id, row);
    }
    fill(row, node, at);
    rows.push(row);
  }
  rows.push(below);
  above.style.height = `${first * tall}px`;
  below.style.height = `${(shown.length - last) * tall}px`;
  arrange(rows);
  for (const id of [...drawn.keys()]) if (!keep.has(id)) drawn.delete(id);
}

// Put rows in order and move none that is in place: an element that is moved loses the focus.
function arrange(rows) {
  const body = byId("rows");
  const wanted = new Set(rows);
  for (const row of [...body.children]) if (!wanted.has(row)) row.remove();
  const active = document.activeElement && document.activeElement.closest("#rows tr");
  rows.forEach((row, at) => {
    if (body.children[at] !== row) body.insertBefore(row, body.children[at] || null);
  });
  if (active && active.isConnected && !active.contains(document.activeElement)) active.querySelector("a").focus();
}

// -- what people do -----------------------------------------------------------------------------------------

function showHeadings() {
  const { sort } = place();
  if (!byId("headings").children.length) {
    byId("headings").append(...COLUMNS.map(([key, name]) => {
      const heading = element("th", null, `c-${key}`);
      heading.scope = "col";
      heading.append(button(name, "", () => {
        const before = place();
        location.hash = listAddress(before.words, before.sort === key ? `-${key}` : key);
      }));
      return heading;
    }));
  }
  COLUMNS.forEach(([key], at) => {
    const order = sort === key ? "ascending" : sort === `-${key}` ? "descending" : "none";
    byId("headings").children[at].setAttribute("aria-sort", order);
  });
  const select = byId("sort");
  if (![...select.options].some((option) => option.value === sort)) {
    const option = element("option", `${sort.replace("-", "")}, ${sort.startsWith("-") ? "descending" : "ascending"}`);
    option.value = sort;
    select.append(option);
  }
  select.value = sort;
}

function move(by) {
  const row = document.activeElement && document.activeElement.closest("#rows tr");
  const from = row ? shown.findIndex((node) => node.node_id === row.dataset.id) : -1;
  goTo(Math.max(0, Math.min(shown.length - 1, from + by)));
}

function goTo(at) {
  if (!shown.length) return;
  const tall = height();
  const scroll = byId("scroll");
  const top = at * tall;
  if (top < scroll.scrollTop + tall) scroll.scrollTop = Math.max(0, top - tall);
  if (top + 2 * tall > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = top + 3 * tall - scroll.clientHeight;
  draw();
  const next = drawn.get(shown[at].node_id);
  if (next) next.querySelector("a").focus({ preventScroll: true });
}

function onKey(event) {
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 15, PageUp: -15, Home: -Infinity, End: Infinity };
  if (!Object.hasOwn(steps, event.key) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  move(Number.isFinite(steps[event.key]) ? steps[event.key] : Math.sign(steps[event.key]) * shown.length);
}

export function begin() {
  on("returned", (id) => {
    const at = shown.findIndex((node) => node.node_id.startsWith(id) || id.startsWith(node.node_id));
    if (at >= 0) goTo(at);
  });
  const soon = throttled(choose, 200);
  const redraw = throttled(draw);
  const settle = throttled(keep, ADDRESS_EVERY);
  on("nodes", soon);
  on("overview", () => { if (nodes.size === 0) soon(); });
  on("place", () => {
    showHeadings();
    const { words } = place();
    typed = null;
    if (document.activeElement !== byId("filter") && byId("filter").value !== words) byId("filter").value = words;
    choose();
  });
  byId("scroll").addEventListener("scroll", redraw, { passive: true });
  byId("scroll").addEventListener("keydown", onKey);
  byId("filter").addEventListener("input", () => {
    typed = byId("filter").value;
    choose();
    settle();
  });
  byId("filter").addEventListener("change", keep);
  byId("filter").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") {
      event.preventDefault();
      move(1);
    }
  });
  byId("sort").addEventListener("change", () => { location.hash = listAddress(place().words, byId("sort").value); });
  phone.addEventListener("change", redraw);
  addEventListener("resize", redraw);
  setInterval(redraw, 1000);
  showHeadings();
}
