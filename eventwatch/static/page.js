// The status page: reads /readyz and /api/nodes now and then, and /api/changes as it happens. Shows only.
"use strict";

const KEPT = 100;
const STATUSES = ["running", "stopping", "paused", "restarting", "created", "exited", "removing", "dead"];
const nodes = new Map();
const rows = new Map();
const latencies = [];
const $ = (id) => document.getElementById(id);

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const left = Math.max(0, Math.round(seconds));
  if (left >= 3600) return `${Math.floor(left / 3600)} h ${Math.floor((left % 3600) / 60)} min`;
  return left >= 60 ? `${Math.floor(left / 60)} min ${left % 60} s` : `${left} s`;
}

function moment(when) {
  const today = when.toDateString() === new Date().toDateString();
  return today ? when.toLocaleTimeString() : when.toLocaleString();
}

function matches(node, wanted) {
  const text = `${node.node_id} ${node.name || ""} ${node.status} ${node.health} ${node.ip}:${node.port}`;
  return wanted.split(/\s+/).every((word) => text.toLowerCase().includes(word));
}

function fill(row, node) {
  const cells = [
    [node.short_id, ""], [node.status, node.status], [node.health, node.health],
    [node.ip ? `${node.ip}:${node.port}` : "–", ""], [duration(node.idle_left), ""],
  ];
  cells.forEach(([text, className], place) => {
    const cell = row.cells[place] || row.insertCell();
    if (cell.textContent !== text) cell.textContent = text;
    if (cell.className !== className) cell.className = className || "";
  });
  row.title = node.node_id;
}

function showNodes() {
  const wanted = $("filter").value.trim().toLowerCase();
  const counts = new Map();
  let shown = 0;
  for (const [id, row] of rows) {
    if (!nodes.has(id)) { row.remove(); rows.delete(id); }
  }
  for (const [id, node] of nodes) {
    counts.set(node.status, (counts.get(node.status) || 0) + 1);
    let row = rows.get(id);
    if (!row) { row = $("rows").insertRow(); rows.set(id, row); }
    fill(row, node);
    row.hidden = wanted !== "" && !matches(node, wanted);
    shown += row.hidden ? 0 : 1;
  }
  $("shown").textContent = nodes.size === 0 ? "No nodes." : `${shown} of ${nodes.size} nodes shown.`;
  const seen = STATUSES.filter((status) => counts.has(status));
  $("counts").replaceChildren(...seen.map((status) => {
    const item = element("li");
    item.append(element("b", String(counts.get(status))), " ", element("span", status, status));
    return item;
  }));
}

function showChange(change, live) {
  const item = element("li");
  const fields = Object.entries(change.new).filter(([name]) => name !== "epoch" && name !== "engine_id");
  const what = change.deleted ? "document deleted"
    : fields.map(([name, value]) => `${name} ${change.old[name] || "–"} → ${value || "–"}`).join(", ") || "owner recorded";
  const when = new Date(change.at_ns / 1e6);
  const delay = change.latency === null ? "" : `, ${(change.latency * 1000).toFixed(1)} ms after the event`;
  item.append(element("code", change.short_id), ` ${what} `,
    element("span", `${moment(when)}, by ${change.cause}${delay}`, "why"));
  $("changes").prepend(item);
  while ($("changes").childElementCount > KEPT) $("changes").lastElementChild.remove();
  if (change.latency !== null) {
    latencies.push(change.latency * 1000);
    if (latencies.length > 200) latencies.shift();
    plot();
  }
  if (!live) return;
  if (change.deleted) nodes.delete(change.node_id);
  else if (nodes.has(change.node_id)) Object.assign(nodes.get(change.node_id), change.new);
  else refresh();
  showNodes();
  const row = rows.get(change.node_id);
  if (row) { row.classList.add("fresh"); setTimeout(() => row.classList.remove("fresh"), 1500); }
}

function plot() {
  const height = (ms) => 110 - (Math.log10(Math.min(10000, Math.max(1, ms))) / 4) * 100;
  const parts = [];
  for (const ms of [1, 10, 100, 1000, 10000]) {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    line.setAttribute("x1", 0); line.setAttribute("x2", 400);
    line.setAttribute("y1", height(ms)); line.setAttribute("y2", height(ms));
    const text = document.createElementNS("http://www.w3.org/2000/svg", "text");
    text.setAttribute("x", 3); text.setAttribute("y", height(ms) - 2);
    text.textContent = ms < 1000 ? `${ms} ms` : `${ms / 1000} s`;
    parts.push(line, text);
  }
  latencies.forEach((ms, place) => {
    const dot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    dot.setAttribute("cx", 40 + place * (355 / 200)); dot.setAttribute("cy", height(ms)); dot.setAttribute("r", 2);
    parts.push(dot);
  });
  $("plot").replaceChildren(...parts);
  if (latencies.length === 0) return;
  const sorted = [...latencies].sort((a, b) => a - b);
  const at = (part) => sorted[Math.min(sorted.length - 1, Math.floor(part * sorted.length))].toFixed(1);
  $("plot-text").textContent = `from the engine's event to the acknowledged write: half within ${at(0.5)} ms, ` +
    `99 % within ${at(0.99)} ms, of the last ${sorted.length}`;
}

// An address of ours without the user and password that the page's own may have, which fetch() refuses.
function at(path) {
  return new URL(path, location.origin + location.pathname).href;
}

async function everyNode() {
  const all = [];
  let page = at("api/nodes");
  while (page) {
    const answer = await fetch(page);
    if (!answer.ok) throw new Error(`${answer.status}`);
    all.push(...await answer.json());
    const next = /<\/([^>]*)>; rel="next"/.exec(answer.headers.get("Link") || "");
    page = next ? at(next[1]) : null;
  }
  return all;
}

async function refresh() {
  try {
    const fresh = await everyNode();
    nodes.clear();
    for (const node of fresh) nodes.set(node.node_id, node);
    showNodes();
    const answer = await fetch(at("readyz"));
    const lines = await answer.json();
    $("readiness").className = answer.ok ? "good" : "bad";
    const trusted = "Ready: the documents can be trusted";
    const text = !answer.ok ? `Not ready: ${lines.join("; ")}` :
      lines.length ? `${trusted}, but for this: ${lines.join("; ")}` : trusted;
    if ($("readiness").textContent !== text) $("readiness").textContent = text;
  } catch (error) {
    $("readiness").className = "bad";
    $("readiness").textContent = "eventwatch does not answer";
  }
}

function follow() {
  const changes = new EventSource(at("api/changes"));
  const opened = Date.now();
  changes.addEventListener("missed", () => { $("changes").replaceChildren(); latencies.length = 0; plot(); });
  changes.onmessage = (message) => {
    const change = JSON.parse(message.data);
    showChange(change, change.at_ns / 1e6 > opened - 5000);
  };
}

$("filter").addEventListener("input", showNodes);
plot();
refresh().then(follow);
setInterval(refresh, 3000);
