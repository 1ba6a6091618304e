// The head of the page: whether the documents can be trusted, who watches what, and what asks for attention.

import { button, byId, element, link, setClass, setText } from "./dom.js";
import { PROBLEMS, STATUSES, problemName } from "./problems.js";
import { asOf, listAddress, nodes, on, place, state } from "./state.js";
import { toggled } from "./filter.js";
import { age, clock, count, duration } from "./words.js";

function counted() {
  const problems = new Map();
  const statuses = new Map();
  for (const node of nodes.values()) {
    statuses.set(node.status, (statuses.get(node.status) || 0) + 1);
    for (const key of node.problems) problems.set(key, (problems.get(key) || 0) + 1);
  }
  return { problems, statuses };
}

// Chips stay the same elements while their numbers change, so that focus stays where it is.
function chips(where, wanted) {
  const there = new Map([...where.children].map((item) => [item.dataset.key, item]));
  const items = wanted.map(({ key, number, name, title, className, condition }) => {
    let item = there.get(key);
    if (!item) {
      item = element("li");
      item.dataset.key = key;
      item.append(button("", "", () => {
        const { words, sort } = place();
        location.hash = listAddress(toggled(words, condition), sort);
      }));
      item.firstChild.append(element("b"), " ", element("span"));
    }
    const [figure, , label] = item.firstChild.childNodes;
    setText(figure, String(number));
    setText(label, name);
    item.firstChild.title = title;
    setClass(item.firstChild, className);
    item.firstChild.setAttribute("aria-pressed", place().words.split(/\s+/).includes(condition));
    return item;
  });
  if (items.length !== where.children.length || items.some((item, at) => where.children[at] !== item)) {
    where.replaceChildren(...items);
  }
}

function showChips() {
  const { problems, statuses } = counted();
  const pressed = place().words;
  const shown = PROBLEMS.filter(([key]) => problems.has(key) || pressed.includes(`problem:${key}`));
  chips(byId("problems"), shown.map(([key, name, title]) => ({
    key, name, title, number: problems.get(key) || 0, className: "chip alarm", condition: `problem:${key}`,
  })));
  const others = [...statuses.keys()].filter((status) => !STATUSES.includes(status));
  chips(byId("counts"), [...STATUSES.filter((status) => statuses.has(status)), ...others].map((status) => ({
    key: status, name: status, number: statuses.get(status), title: `show what is ${status}`,
    className: `chip ${status}`, condition: `status:${status}`,
  })));
  showTitle(problems);
}

function showTitle(problems) {
  const told = PROBLEMS.filter(([key]) => problems.has(key)).map(([key]) => `${problems.get(key)} ${problemName(key)}`);
  const overview = state.overview;
  let text = told.length ? `${told.join(", ")} · eventwatch` : `${count(nodes.size, "node")} · eventwatch`;
  if (overview && overview.role === "standby") text = "standby · eventwatch";
  else if (overview && !overview.ready) text = `not ready · ${text}`;
  if (state.silent) text = `${state.refused ? "token refused" : "no answer"} · eventwatch`;
  if (document.title !== text) document.title = text;
}

function readiness() {
  const overview = state.overview;
  if (state.refused) return ["eventwatch refuses this page's token: reload it, and give the present one", "bad"];
  if (state.silent) return ["eventwatch does not answer", "bad"];
  if (!overview) return ["asking …", ""];
  if (overview.role === "standby") return ["Standing by", "calm"];
  if (!overview.ready) return [`Not ready: ${overview.reasons.join("; ")}`, "bad"];
  const trusted = "Ready: the documents can be trusted";
  return [overview.notes.length ? `${trusted}, but for this: ${overview.notes.join("; ")}` : trusted, "good"];
}

function roleOf(overview) {
  const role = overview.role === "starting" && overview.as_of !== null ? "leads no more, and begins again" : overview.role;
  return overview.dry_run ? `${role}, dry run` : role;
}

function facts(overview) {
  const { engine } = overview;
  const told = [
    ["host", overview.host],
    ["engine", engine ? `Docker ${engine.version} on ${engine.name}` : "not reached yet"],
    ["database", overview.database],
    ["role", roleOf(overview)],
  ];
  if (overview.role !== "standby") {
    told.push(
      ["sweep", overview.sweep_age === null ? "none yet" : `${age(overview.sweep_age)} ago`],
      ["stream", overview.stream_age === null ? "not connected" : `for ${age(overview.stream_age)}`],
      ["drift", String(overview.drift)],
      ["idle stop", overview.idle_timeout > 0 ? `after ${duration(overview.idle_timeout)}` : "off"],
    );
  }
  told.push(["version", overview.version]);
  return told;
}

function showHead() {
  const [text, className] = readiness();
  setText(byId("readiness"), text);
  setClass(byId("readiness"), className);
  const when = asOf();
  document.body.classList.toggle("silent", state.silent);
  document.body.classList.toggle("stale", when !== null);
  byId("as-of").hidden = !state.silent && when === null;
  setText(byId("as-of"), when === null ? "it has not answered yet"
    : `${state.silent ? "" : "nodes "}as of ${clock(new Date((when - state.offset) * 1000))}`);
  const overview = state.overview;
  if (!overview) return;
  const items = [...byId("head").children];
  const told = facts(overview);
  if (items.length !== told.length) {
    byId("head").replaceChildren(...told.map(() => {
      const item = element("li");
      item.append(element("span"), " ", element("b"));
      return item;
    }));
  }
  told.forEach(([name, value], at) => {
    const item = byId("head").children[at];
    setText(item.children[0], name);
    setText(item.children[1], value);
  });
  const standby = byId("standby");
  const { leader } = overview;
  standby.hidden = overview.role !== "standby" || !leader;
  document.body.classList.toggle("standing-by", overview.role === "standby");
  if (!standby.hidden) {
    const who = `Checker ${leader.checker.slice(0, 12)} on host ${leader.host} (pid ${leader.pid}) leads and keeps ` +
      "the documents true; this one takes over when that one ends.";
    if (standby.dataset.who !== `${who}${leader.page}`) {
      standby.dataset.who = `${who}${leader.page}`;
      standby.replaceChildren(who);
      standby.append(" ", leader.page ? link("Its page", leader.page) : "Its page can be reached on that host only, if it has one.");
    }
  }
}

export function begin() {
  on("overview", showHead);
  on("silent", showHead);
  on("silent", showChips);
  on("overview", showChips);
  on("shown", showChips);
  on("place", showChips);
}
