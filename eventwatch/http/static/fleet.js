// The engines of a fleet, those that need somebody first; the nodes of each other one are asked for when wanted.
//
// Hidden where there is one engine alone. Nothing of it is followed: the database is asked, and rarely.

import { ask } from "./server.js";
import { button, byId, element, setText } from "./dom.js";
import { age, address, count, milliseconds } from "./words.js";

const EVERY = 10000;
const SHOWN = 20;
const PAGE = 50;
const CLASSES = { ready: "good", unready: "warn", away: "warn", dead: "bad", unwatched: "calm" };

const opened = new Map();
let all = false;
let told = "";

function nodeCounts(nodes) {
  const parts = Object.entries(nodes).sort().map(([status, number]) => `${number} ${status}`);
  return parts.length ? parts.join(", ") : "no nodes";
}

function facts(engine) {
  const parts = [nodeCounts(engine.nodes)];
  if (engine.state !== "ready" && engine.age !== null) parts.push(`seen ${age(engine.age)} ago`);
  if (engine.latency_p99 !== null) parts.push(`p99 ${milliseconds(engine.latency_p99)}`);
  if (engine.standbys.length) parts.push(count(engine.standbys.length, "standby", "standbys"));
  if (engine.drift) parts.push(`drift ${engine.drift}`);
  return parts.join(" · ");
}

async function more(engine, list, after) {
  const query = new URLSearchParams({ engine: engine.engine_id, limit: PAGE });
  if (after) query.set("after", after);
  const last = list.lastElementChild;
  try {
    const rows = await ask(`api/nodes?${query}`);
    if (last && last.matches(".more")) last.remove();
    for (const node of rows) {
      const item = element("li");
      item.append(element("code", node.node_id), ` ${node.status} `, element("span", `${node.health} ${address(node)}`));
      list.append(item);
    }
    if (rows.length < PAGE) return;
    const next = element("li", null, "more");
    next.append(button("More", "plain", () => more(engine, list, rows[rows.length - 1].node_id)));
    list.append(next);
  } catch {
    if (!list.children.length) list.append(element("li", "Its nodes cannot be read now"));
  }
}

function toggle(engine) {
  if (opened.delete(engine.engine_id)) return show(engine);
  const list = element("ol", null, "of-engine");
  opened.set(engine.engine_id, list);
  more(engine, list, "");
  return show(engine);
}

let engines = [];

function show() {
  const place = byId("engines");
  const focused = document.activeElement && document.activeElement.dataset.engine;
  const rows = all ? engines : engines.slice(0, SHOWN);
  place.replaceChildren(...rows.map((engine) => {
    const item = element("li");
    item.append(element("b", engine.host || engine.engine_id), " ");
    item.append(element("span", engine.state, `state ${CLASSES[engine.state] || ""}`), " ");
    item.append(element("span", facts(engine), "numbers"));
    if (engine.own) {
      item.append(" ", element("span", "shown below", "numbers"));
    } else {
      const open = opened.get(engine.engine_id);
      const act = button(open ? "Hide its nodes" : "Its nodes", "plain", () => toggle(engine));
      act.dataset.engine = engine.engine_id;
      act.setAttribute("aria-expanded", String(Boolean(open)));
      act.title = `Engine ${engine.engine_id}`;
      item.append(" ", act);
      if (open) item.append(open);
    }
    for (const reason of engine.state === "unready" ? engine.reasons : []) item.append(element("p", reason, "why"));
    if (engine.state === "dead") {
      item.append(element("p", `Nobody keeps its documents true. Start eventwatch there, or, if the host is gone for good: eventwatch engines forget ${engine.engine_id}`, "why"));
    }
    return item;
  }));
  if (engines.length > rows.length) {
    const rest = element("li");
    rest.append(button(`Show all ${engines.length}`, "plain", () => { all = true; show(); }));
    place.append(rest);
  }
  const again = focused && [...place.querySelectorAll("button")].find((each) => each.dataset.engine === focused);
  if (again) again.focus();
}

function summary() {
  const numbers = new Map();
  for (const engine of engines) numbers.set(engine.state, (numbers.get(engine.state) || 0) + 1);
  return [...numbers].map(([state, number]) => `${number} ${state}`).join(", ");
}

async function look() {
  if (document.hidden) return;
  try {
    engines = await ask("api/engines");
  } catch {
    return;  // the head tells whether anybody answers
  }
  byId("fleet").hidden = engines.length < 2;
  setText(byId("fleet-summary"), summary());
  const said = JSON.stringify(engines, (key, value) => (key === "age" || key === "seen_at" || key === "sweep_age" ? 0 : value));
  if (said !== told || engines.some((engine) => engine.state !== "ready")) show();
  told = said;
}

export function begin() {
  look();
  setInterval(look, EVERY);
  document.addEventListener("visibilitychange", look);
}
