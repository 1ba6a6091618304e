// The changes as they come, newest first. What happens to one node again and again is one entry that is counted.

import { byId, element, link, setText, throttled } from "./dom.js";
import { nodes, on } from "./state.js";
import { duration, milliseconds, moment } from "./words.js";

const KEPT = 100;
// Changes of a node that follow one another this closely (ms) are told together.
const TOGETHER = 30000;
const STEPS = 5;

let entries = [];
const open = new Map();
const items = new Map();

// The entry that begins with this change: what became of each field, step by step.
export function entryOf(change) {
  const entry = {
    node_id: change.node_id, short_id: change.short_id, first: change.at_ns / 1e6, last: 0, count: 0, runs: 0, restarts: 0,
    deleted: false, registered: change.cause === "register", paths: new Map(), cause: "", latency: null,
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

function itemOf(entry) {
  let item = items.get(entry);
  if (!item) {
    item = element("li");
    item.append(link("", `#/node/${entry.node_id}`), " ", element("span", null, "what"), " ", element("span", null, "why"));
    items.set(entry, item);
  }
  const name = (nodes.get(entry.node_id) || {}).name;
  setText(item.children[0], name || entry.short_id);
  item.children[0].title = entry.short_id;
  setText(item.children[1], whatHappened(entry));
  setText(item.children[2], why(entry));
  return item;
}

function draw() {
  const list = byId("changes");
  const wanted = entries.map(itemOf);
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
