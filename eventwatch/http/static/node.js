// One node's own view, at `#/node/ID`: what it is, why it is so, what happened to it, and what comes next.

import { byId, element, link, setText, svg } from "./dom.js";
import { spans } from "./life.js";
import { entryOf, belongs, extend, isVisible, whatHappened, why } from "./changes.js";
import { healthClass, problemName, statusClass } from "./problems.js";
import { ask } from "./server.js";
import { nodes, now, on, place, shownNow, state, tell } from "./state.js";
import { address, age, clock, count, duration, moment } from "./words.js";

const TALL = 34;
// ms until the history, which is written once a second, holds a change.
const WRITTEN = 1500;

let shown = null;
let told = null;
let past = [];
// Whether it has no document.
let missing = false;
// Whether its changes on record could not be read, which says nothing of whether there are any.
let unread = false;
let back = "#/";
let asked = 0;

const date = (text) => {
  if (!text) return null;
  const made = new Date(/(Z|[+-]\d\d:?\d\d)$/.test(text) ? text.replace(" ", "T") : `${text.replace(" ", "T")}Z`);
  return Number.isNaN(made.getTime()) ? null : made;
};

function since(when) {
  return when ? `${moment(when)} (${age(now() - when.getTime() / 1000)} ago)` : "–";
}

function row() {
  if (nodes.has(shown)) return nodes.get(shown);
  for (const [id, node] of nodes) if (id.startsWith(shown)) return node;
  return null;
}

async function load() {
  const id = shown;
  const number = (asked += 1);
  const [node, changes] = await Promise.allSettled([ask(`api/nodes/${id}`), ask(`api/nodes/${id}/changes`)]);
  if (number !== asked || id !== shown) return;
  if (node.status === "fulfilled") {
    told = node.value;
    missing = false;
  } else if (node.reason.status === 404) {
    missing = true;
  }
  unread = changes.status === "rejected" && changes.reason.status !== 404;
  if (changes.status === "fulfilled") past = changes.value;
  draw();
}

// Changes on record, newest first, in the words of those that come live.
function written() {
  return past.map((change) => ({
    ...change, at_ns: date(change.until).getTime() * 1e6, first_ns: date(change.at).getTime() * 1e6,
  }));
}

function entries() {
  const made = [];
  for (const change of written().filter(isVisible).reverse()) {
    const last = made[made.length - 1];
    if (change.count === 1 && last && belongs(last, change)) {
      extend(last, change);
    } else {
      made.push(entryOf(change));
      made[made.length - 1].first = change.first_ns / 1e6;
    }
    made[made.length - 1].reason = change.reason || made[made.length - 1].reason;
  }
  return made.reverse();
}

// -- parts --------------------------------------------------------------------------------------------------

function fact(list, name, ...values) {
  const value = element("dd");
  value.append(...values.map((each) => (each instanceof Node ? each : document.createTextNode(each))));
  list.append(element("dt", name), value);
}

function facts(node) {
  const list = element("dl", null, "facts");
  fact(list, "Status", element("span", node.status, statusClass({ problems: [], ...node })),
    node.since ? ` for ${duration(shownNow() - node.since)}` : "");
  fact(list, "Health", element("span", node.health, healthClass(node)));
  fact(list, "Address", element("code", address(node) || "–"));
  fact(list, "Image", element("code", node.image || "–"));
  fact(list, "Id", element("code", node.node_id));
  if (!told) return list;
  fact(list, "Created", since(date(told.created_at)));
  fact(list, "Started", since(date(told.started_at)));
  if (told.finished_at) fact(list, "Last ended", since(date(told.finished_at)), told.ran ? `, after ${duration(told.ran)}` : "");
  fact(list, "Restarts", String(told.restart_count ?? "–"), told.restart_count ? " by its restart policy" : "");
  fact(list, "Networks", (told.networks || []).join(", ") || "–");
  fact(list, "Last request", since(date(told.last_req_time)));
  fact(list, "Owner", `engine ${told.engine_id || "nobody yet"}`, told.epoch ? `, epoch ${told.epoch}` : "");
  return list;
}

// What the next decision about an idle stop will be, and why.
function decision(node) {
  if (node.status === "stopping") {
    const since_ = node.since ? ` since ${clock(new Date((node.since - state.offset) * 1000))}` : "";
    const by = node.stop_by ? `, and is killed at ${clock(new Date((node.stop_by - state.offset) * 1000))} unless it ends before` : "";
    return `It is being stopped${since_}${by}.`;
  }
  if (!told || told.idle_reason === undefined) return "";
  const limit = told.idle_limit ? `Its idle time is ${duration(told.idle_limit)}, by ${told.idle_source}.` : "";
  const at = told.idle_at;  // of one answer with the reason
  if (at === null) return `It will not be stopped as idle: ${told.idle_reason}. ${limit}`;
  const left = at - now();
  const when = clock(new Date((at - state.offset) * 1000));
  return left > 0
    ? `It will be stopped as idle at ${when}, in ${duration(left)}, unless a request comes in. ${limit}`
    : `Its idle time is used up since ${when}: the next sweep stops it unless a request comes in. ${limit}`;
}

function reasons(node) {
  const parts = [];
  const problems = node.problems || [];
  if (problems.length) parts.push(element("p", problems.map(problemName).join(", "), "verdict"));
  const listed = told && told.failures && told.failures.length && /^its last health check /.test(told.reason);
  const reason = told ? told.reason : node.reason;
  if (reason && !listed) parts.push(element("p", reason));
  if (told && told.error) parts.push(element("p", `The engine says: ${told.error}`));
  if (node.disagreement && Object.keys(node.disagreement).length) {
    const said = Object.entries(node.disagreement).map(([name, value]) => `${name} ${value || "–"}`).join(", ");
    parts.push(element("p", `The engine says something else than the document: ${said}`));
  }
  if (told && told.failures && told.failures.length) {
    parts.push(element("h3", "Failed health checks"));
    const list = element("ol", null, "failures");
    for (const failure of told.failures) {
      const item = element("li");
      item.append(element("span", `${since(date(failure.at))}, exit code ${failure.exit_code ?? "–"}`, "why"),
        element("pre", failure.output || "(no output)"));
      list.append(item);
    }
    parts.push(list);
  }
  return parts;
}

// Stripes of all statuses that took turns.
function stripes(statuses) {
  const wide = 5 * statuses.length;
  const made = svg("pattern", { id: `turns-${statuses.join("-")}`, width: wide, height: wide, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
  statuses.forEach((status, at) => made.append(svg("rect", { class: `t-${status}`, x: at * 5, y: 0, width: 5, height: wide })));
  return made;
}

function inWords({ from, to, statuses, times, reason }) {
  const what = statuses.length > 1 ? `${statuses.slice(0, -1).join(", ")} and ${statuses[statuses.length - 1]} by turns, ${times} times` : statuses[0];
  const until = statuses.length > 1 ? ` to ${moment(new Date(to))}` : "";
  return `${what}, from ${moment(new Date(from))}${until}${reason ? `: ${reason}` : ""}`;
}

function timeline(wide, known) {
  const steps = written().filter((change) => change.deleted || change.new.status !== undefined).map((change) => ({
    status: change.deleted ? "removed" : change.new.status, from: change.first_ns / 1e6, until: change.at_ns / 1e6,
    count: change.count, reason: change.reason,
  }));
  if (!steps.length) return null;
  const end = shownNow() * 1000;
  const life = spans(steps, end, known && { status: known.status, since: known.since && known.since * 1000 });
  const begin = life[0].from;
  const x = (at) => ((at - begin) / Math.max(1, end - begin)) * wide;
  const plot = svg("svg", { class: "timeline", role: "img", viewBox: `0 0 ${wide} ${TALL}`, height: TALL });
  const patterns = new Set();
  for (const span of life) {
    const several = span.statuses.length > 1;
    const key = span.statuses.join("-");
    if (several && !patterns.has(key)) plot.append(stripes(span.statuses));
    patterns.add(key);
    const bar = svg("rect", { class: several ? "turns" : `t-${key}`, x: x(span.from), y: 2, width: Math.max(1.5, x(span.to) - x(span.from)),
      height: TALL - 16, ...(several ? { fill: `url(#turns-${key})` } : {}) });
    bar.append(svg("title", {}, inWords(span)));
    plot.append(bar);
  }
  const removed = life[life.length - 1].statuses[0] === "removed";
  plot.append(svg("text", { class: "mark", x: 0, y: TALL - 2 }, moment(new Date(begin))),
    svg("text", { class: "mark end", x: wide, y: TALL - 2 }, removed ? "now, removed" : "now"));
  plot.setAttribute("aria-label", `Its life: ${life.slice(-6).map(inWords).join("; ")}`);
  const legend = element("ul", null, "legend");
  for (const status of new Set(life.flatMap(({ statuses }) => statuses))) legend.append(element("li", status, `t-${status}`));
  if (life.some(({ statuses }) => statuses.length > 1)) legend.append(element("li", "stripes: by turns", "quietly"));
  const whole = element("div");
  whole.append(plot, legend);
  return whole;
}

function labels() {
  const pairs = Object.entries((told && told.labels) || {});
  if (!pairs.length) return null;
  const list = element("ul", null, "labels");
  list.append(...pairs.map(([key, value]) => element("li", value ? `${key}=${value}` : key)));
  return list;
}

function changes() {
  const list = element("ol", null, "past");
  list.append(...entries().map((entry) => {
    const item = element("li");
    item.append(element("span", whatHappened(entry)), " ", element("span", why(entry), "why"));
    if (entry.reason) item.append(element("span", entry.reason, "reason"));
    return item;
  }));
  return list;
}

function part(title, ...content) {
  const made = element("section");
  made.append(element("h3", title), ...content.filter(Boolean));
  return made;
}

function draw() {
  const where = byId("node");
  if (where.hidden) return;
  const known = row();
  const up = link("← All nodes", back, "back");
  if (missing && !past.length && !known) {
    const title = element("h2", shown.slice(0, 12));
    title.id = "node-title";
    title.tabIndex = -1;
    renew(where, [up, title, element("p", "Nothing is known of such a node: it has no document, and no change of it is on record.", "verdict")]);
    return;
  }
  const last = past[0] || {};
  const node = { node_id: shown, name: last.name, image: last.image, status: missing ? "removed" : "–", health: "–", problems: [],
    ...(told || {}), ...(known || {}) };
  const title = element("h2", node.name || node.short_id || shown.slice(0, 12));
  title.id = "node-title";
  title.tabIndex = -1;
  const line = timeline(Math.max(240, where.clientWidth - 4), known);
  const next = missing ? "" : decision(node);
  renew(where, [up, title, ...(missing ? [element("p", "It has no document any more.", "verdict")] : []),
    ...[
      reasons(node).length ? part("Why", ...reasons(node)) : null,
      part("What it is", facts(node)),
      next ? part("What comes next", element("p", next)) : null,
      line ? part("Its life", line) : null,
      labels() ? part("Labels", labels()) : null,
      part(past.length ? `Changes on record (${count(past.length, "entry", "entries")})`
        : unread ? "Its changes on record cannot be read now" : "No changes on record",
        past.length ? changes() : null),
    ].filter(Boolean)]);
}

// Put in only what differs: what is selected, focused or read aloud stays.
function renew(where, parts) {
  parts.forEach((made, at) => {
    const there = where.children[at];
    if (!there) where.append(made);
    else if (!there.isEqualNode(made)) there.replaceWith(made);
  });
  while (where.children.length > parts.length) where.lastElementChild.remove();
}

function open() {
  const { node } = place();
  byId("node").hidden = !node;
  if (!node) {
    const left = shown;
    shown = null;
    if (left) tell("returned", left);
    return;
  }
  if (node === shown) return;
  shown = node;
  told = null;
  past = [];
  missing = unread = false;
  draw();
  setText(byId("shown"), "");
  const title = byId("node-title");
  if (title) title.focus({ preventScroll: true });
  scrollTo(0, 0);
  load();
}

export function begin() {
  on("place", open);
  on("left", (address_) => { back = address_; });
  on("change", ({ change, live }) => {
    if (!live || !shown || !(change.node_id.startsWith(shown) || shown.startsWith(change.node_id))) return;
    load();
    setTimeout(() => { if (shown) load(); }, WRITTEN);
  });
  setInterval(() => { if (shown) draw(); }, 1000);
  setInterval(() => { if (shown) load(); }, 10000);
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && shown) location.hash = back;
  });
}

