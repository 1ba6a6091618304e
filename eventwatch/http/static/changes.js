// The changes as they come, newest first. What happens to one node again and again is one entry that is counted.

import { byId, element, link, setText, throttled } from "./dom.js";
import { nodes, on } from "./state.js";
import { duration, milliseconds, moment } from "./words.js";

const KEPT = 1000;
// Entries that are shown, after what happened to many nodes alike is one of them, and nodes of such a one.
const SHOWN = 100;
const ALIKE = 6;
const NAMED = 200;
const EXPLAINED = new Set(["exited", "dead", "restarting", "stopping"]);
// Changes of a node that follow one another this closely (ms) are told together.
const TOGETHER = 30000;
const STEPS = 5;

let entries = [];
const open = new Map();
const items = new Map();
const groupItems = new WeakMap();

// The entry that begins with this change: what became of each field, step by step.
export function entryOf(change) {
  const entry = {
    node_id: change.node_id, short_id: change.short_id, first: change.at_ns / 1e6, last: 0, count: 0, runs: 0, restarts: 0,
    name: "", reason: "", deleted: false, registered: change.cause === "register", paths: new Map(), cause: "", latency: null,
  };
  extend(entry, change);
  return entry;
}

// Whether a change is about what people see of a node.
export function isVisible(change) {
  return change.deleted || Object.keys(change.new).some((name) => name !== "epoch" && name !== "engine_id");
}

export function belongs(entry, change) {
  return !entry.deleted && change.at_ns / 1e6 - entry.last < TOGETHER && change.cause !== "register";
}

export function extend(entry, change) {
  const times = change.count || 1;
  entry.last = change.at_ns / 1e6;
  entry.count += times;
  entry.deleted = change.deleted;
  entry.cause = change.cause;
  entry.latency = change.latency;
  entry.name = change.name || entry.name;
  entry.reason = change.reason || entry.reason;
  if (change.new.status === "running" && ["exited", "restarting", "dead"].includes(change.old.status)) entry.runs += times;
  if (change.new.status === "restarting") entry.restarts += times;
  for (const [name, value] of Object.entries(change.new)) {
    if (name === "epoch" || name === "engine_id") continue;
    if (!entry.paths.has(name)) entry.paths.set(name, [change.old[name]]);
    const path = entry.paths.get(name);
    if (path[path.length - 1] !== value) path.push(value);
  }
}

export function whatHappened(entry) {
  const told = [];
  const starts = Math.max(entry.runs, entry.restarts);  // a short run is not seen to run
  if (starts > 1) told.push(`restarted ${starts} x in ${duration((entry.last - entry.first) / 1000)}`);
  for (let [name, path] of entry.paths) {
    if (starts > 1 && name !== "status") continue;
    if (entry.registered) path = path.slice(1);
    if (entry.registered && (name === "port" || path.join("") === "")) continue;
    const steps = path.length > STEPS ? [path[0], "…", ...path.slice(-2)] : path;
    told.push(`${name} ${steps.map((value) => (value === "" || value === null || value === undefined ? "–" : value)).join(" → ")}`);
  }
  if (entry.registered) told.unshift("registered");
  if (entry.deleted) told.push("document deleted");
  return told.join(", ");
}

export function why(entry) {
  const delay = entry.latency === null ? "" : `, ${milliseconds(entry.latency)} after the event`;
  const many = entry.count > 1 ? `, ${entry.count} changes` : "";
  return `${moment(new Date(entry.last))}, by ${entry.cause}${delay}${many}`;
}

function take(change) {
  if (!isVisible(change)) return;
  let entry = open.get(change.node_id);
  if (entry && belongs(entry, change)) {
    extend(entry, change);
    entries.splice(entries.indexOf(entry), 1);
  } else {
    entry = entryOf(change);
    open.set(change.node_id, entry);
  }
  entries.unshift(entry);
  for (const old of entries.splice(KEPT)) {
    if (open.get(old.node_id) === old) open.delete(old.node_id);
    items.delete(old);
  }
}

function nameOf(entry) {
  return (nodes.get(entry.node_id) || {}).name || entry.name || entry.short_id;
}

// Why: as its row tells, where that is about the same change, since an inspection explains an end after it is written.
function reasonOf(entry) {
  const node = nodes.get(entry.node_id);
  if (!node || !node.reason || open.get(entry.node_id) !== entry) return entry.reason;
  const now = (name) => (entry.paths.get(name) || []).at(-1);
  const same = (EXPLAINED.has(node.status) && now("status") === node.status) ||
    (node.health === "unhealthy" && now("health") === "unhealthy");
  return same ? node.reason : entry.reason;
}

function itemOf(entry) {
  let item = items.get(entry);
  if (!item) {
    item = element("li");
    item.append(link("", `#/node/${entry.node_id}`), " ", element("span", null, "what"), " ", element("span", null, "reason"),
      " ", element("span", null, "why"));
    items.set(entry, item);
  }
  setText(item.children[0], nameOf(entry));
  item.children[0].title = entry.short_id;
  setText(item.children[1], whatHappened(entry));
  setText(item.children[2], reasonOf(entry));
  setText(item.children[3], why(entry));
  return item;
}

// What happened to a node, where the same may have happened to others at the same time; empty where it is its own.
function kind(entry) {
  if (entry.deleted) return "document deleted";
  if (entry.registered) return "registered";
  const path = entry.paths.get("status");
  return path && path.length === 2 ? `status ${path.join(" → ")}` : "";
}

// The entries in groups, mostly of one; what happened to many nodes within seconds is one group.
function grouped() {
  const groups = [];
  for (const entry of entries) {
    const group = groups[groups.length - 1];
    const alike = group && kind(entry) && group.kind === kind(entry) && group.last - entry.last < TOGETHER;
    if (alike) {
      group.entries.push(entry);
      group.last = entry.last;
    } else {
      groups.push({ kind: kind(entry), last: entry.last, entries: [entry] });
    }
  }
  return groups.flatMap(({ entries: some, kind: what }) =>
    (some.length < ALIKE ? some.map((entry) => itemOf(entry)) : [groupItem(some, what)]));
}

function groupItem(some, what) {
  const oldest = some[some.length - 1];
  let item = groupItems.get(oldest);
  if (!item) {
    item = element("li");
    const details = element("details");
    const summary = element("summary");
    summary.append(element("b"), " ", element("span"));
    details.append(summary, element("ul"));
    details.addEventListener("toggle", () => draw());
    item.append(details, element("span", null, "why"));
    groupItems.set(oldest, item);
  }
  const [details, when] = item.children;
  setText(details.firstChild.children[0], `${some.length} nodes`);
  setText(details.firstChild.children[1], what);
  setText(when, `${moment(new Date(oldest.last))} to ${moment(new Date(some[0].last))}, by ${some[0].cause}`);
  const list = details.lastChild;
  if (details.open && list.children.length !== Math.min(some.length, NAMED)) {
    list.replaceChildren(...some.slice(0, NAMED).map((entry) => {
      const each = element("li");
      each.append(link(nameOf(entry), `#/node/${entry.node_id}`), " ", element("span", reasonOf(entry), "reason"));
      return each;
    }));
  }
  return item;
}

function draw() {
  const list = byId("changes");
  const wanted = grouped().slice(0, SHOWN);
  const keep = new Set(wanted);
  for (const item of [...list.children]) if (!keep.has(item)) item.remove();
  wanted.forEach((item, at) => {
    if (list.children[at] !== item) list.insertBefore(item, list.children[at] || null);
  });
}

export function begin() {
  const soon = throttled(draw, 250);
  on("change", ({ change }) => { take(change); soon(); });
  on("nodes", soon);
  on("missed", () => { entries = []; open.clear(); items.clear(); soon(); });
}
