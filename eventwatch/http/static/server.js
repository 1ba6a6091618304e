// Asking eventwatch: its head and rows every other second, changes as they happen, the last hour now and then.
//
// A change is shown at once from the stream; what else is in its row follows with the next answer about rows. An
// answer that may be older than a change does not undo it. A page that is hidden holds no stream: browsers keep six
// connections to one server for all their tabs, and six streams would leave none for anything else.

import { nodes, state, tell } from "./state.js";

const EVERY = 2000;
const SERIES_EVERY = 10000;
const DEADLINE = 4000;
// ms after which an answer about rows is certainly newer than a change: the server keeps one for half a second.
const NEWER = 700;
const LIVE = ["status", "health", "ip", "port"];

let stream = null;
// The number of the last change that was seen.
let last = 0n;
let version = "";
let incoming = null;
let asking = null;
let again = false;
let later = null;

// An address of ours without the user and password that the page's own may have, which fetch() refuses.
export function at(path) {
  return new URL(path, location.origin + location.pathname).href;
}

export async function ask(path) {
  const options = { signal: AbortSignal.timeout(DEADLINE), cache: "no-store" };
  // Once more at once: browsers give up what is under way whenever a network comes or goes, as with each container.
  const answer = await fetch(at(path), options).catch((error) => {
    if (error instanceof TypeError) return fetch(at(path), options);
    throw error;
  });
  if (!answer.ok) throw Object.assign(new Error(`${answer.status}`), { status: answer.status });
  return answer.json();
}

function answered() {
  state.answered = new Date();
  if (state.silent) {
    state.silent = state.refused = false;
    tell("silent");
  }
}

function failed(error) {
  const refused = Boolean(error) && error.status === 401;
  if (!state.silent || state.refused !== refused) {
    state.silent = true;
    state.refused = refused;
    tell("silent");
  }
}

async function takeRows() {
  let more = true;
  while (more) {
    const asked = performance.now();
    const answer = await ask(`api/rows?since=${encodeURIComponent(version)}`);
    if (answer.reset) incoming = new Map();
    const into = incoming || nodes;
    for (const id of answer.gone) into.delete(id);
    for (const row of answer.rows) {
      const old = nodes.get(row.node_id);
      if (old && old.touched && asked - old.touched < NEWER) {
        for (const name of LIVE) row[name] = old[name];
        row.touched = old.touched;
      }
      into.set(row.node_id, row);
    }
    version = answer.version;
    more = answer.more;
    if (!more && incoming) {
      nodes.clear();
      for (const [id, row] of incoming) nodes.set(id, row);
      incoming = null;
      tell("nodes");
    } else if (answer.rows.length || answer.gone.length) {
      tell("nodes");
    }
  }
}

async function look() {
  const overview = await ask("api/overview");
  state.overview = overview;
  state.offset = overview.now - Date.now() / 1000;
  answered();
  tell("overview");
  await takeRows();
}

// Ask now; if that is under way already, once more afterwards.
export function refresh() {
  if (asking) {
    again = true;
    return asking;
  }
  asking = look().catch(failed).finally(() => {
    asking = null;
    if (again) {
      again = false;
      refresh();
    }
  });
  return asking;
}

function refreshLater() {
  if (later === null) later = setTimeout(() => { later = null; refresh(); }, NEWER);
}

async function takeSeries() {
  try {
    state.series = await ask("api/series");
    tell("series");
  } catch {
    // The next look at the head tells whether anybody answers.
  }
}

function take(change, live) {
  const node = nodes.get(change.node_id);
  if (live && change.deleted) {
    nodes.delete(change.node_id);
    tell("nodes");
  } else if (live && node) {
    for (const name of LIVE) if (Object.hasOwn(change.new, name)) node[name] = change.new[name];
    if (Object.hasOwn(change.new, "status")) node.since = (change.event_ns || change.at_ns) / 1e9;
    node.touched = performance.now();
    node.text = undefined;
    tell("nodes");
  }
  tell("change", { change, live });
  if (live) refreshLater();
}

// A stream that is opened anew begins with all changes that are kept: those that were seen are left out, and where
// none of them was, some may have been missed.
function follow() {
  const changes = new EventSource(at("api/changes"));
  stream = changes;
  const opened = Date.now() / 1000 + state.offset;
  const before = last;
  let joined = before === 0n;
  const missed = () => {
    joined = true;
    last = 0n;
    tell("missed");
  };
  changes.addEventListener("missed", missed);
  changes.onmessage = (message) => {
    const number = BigInt(message.lastEventId || 0);
    if (!joined && number > before) missed();
    joined = true;
    if (number <= last) return;
    last = number;
    const change = JSON.parse(message.data);
    take(change, change.at_ns / 1e9 > opened - 5);
  };
  changes.onerror = () => {
    refresh();
    if (changes.readyState === EventSource.CLOSED) setTimeout(() => { if (stream === changes) follow(); }, 1000);
  };
}

function followWhileSeen() {
  if (document.hidden) {
    if (stream) stream.close();
    stream = null;
  } else if (!stream) {
    refresh();
    follow();
  }
}

export async function begin() {
  await refresh();
  followWhileSeen();
  document.addEventListener("visibilitychange", followWhileSeen);
  takeSeries();
  setInterval(refresh, EVERY);
  setInterval(takeSeries, SERIES_EVERY);
}
