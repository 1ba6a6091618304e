// What the page knows, and who wants to hear when it changes.

export const nodes = new Map();
export const state = {
  overview: null,
  series: null,
  // The server's clock minus ours, in s.
  offset: 0,
  // When eventwatch last answered, and whether it does.
  answered: null,
  silent: false,
  // Whether it does not answer since it wants another token than the browser has.
  refused: false,
};

const listeners = new Map();

export function on(what, listener) {
  if (!listeners.has(what)) listeners.set(what, []);
  listeners.get(what).push(listener);
}

export function tell(what, value) {
  for (const listener of listeners.get(what) || []) listener(value);
}

// The server's time, in s.
export function now() {
  return Date.now() / 1000 + state.offset;
}

// When what is shown of the nodes was last certainly true (by the server's clock, in s); null: it is now.
export function asOf() {
  const told = state.overview ? state.overview.as_of : null;
  if (state.silent && state.answered) return told ?? state.answered.getTime() / 1000 + state.offset;
  return told ?? null;
}

// The time that ages of nodes are counted to: what is not known to be true any more does not grow older.
export function shownNow() {
  return asOf() ?? now();
}

// The address of this view: `#/?q=WORDS&sort=KEY`, or `#/node/ID`.
export function place() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const asked = new URLSearchParams(query || "");
  const node = /^node\/([0-9a-f]{4,64})$/.exec(path);
  return { view: path.split("/")[0] || "", node: node && node[1], words: asked.get("q") || "", sort: asked.get("sort") || "problems" };
}

export function listAddress(words, sort) {
  const asked = new URLSearchParams();
  if (words) asked.set("q", words);
  if (sort && sort !== "problems") asked.set("sort", sort);
  const text = asked.toString();
  return text ? `#/?${text}` : "#/";
}
