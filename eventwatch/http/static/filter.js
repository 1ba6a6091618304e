// Which nodes a text asks for: words by their beginnings anywhere in a row, or in one field of it; in quotes, exactly.
//
// `exited` finds "exited", `health` does not find "unhealthy"; `status:exited -problem:oom web` are three conditions
// that must all hold. `web-1` finds web-1 and web-10, `"web-1"` what is web-1 and nothing more. A word before a colon
// that names no field is no field, as images have colons too; `unknownFields` tells of those.

import { address } from "./words.js";

const FIELDS = {
  status: (node) => [node.status],
  health: (node) => [node.health],
  problem: (node) => node.problems,
  name: (node) => [node.name],
  image: (node) => [node.image],
  id: (node) => [node.node_id, node.short_id],
  address: (node) => [address(node)],
  reason: (node) => [node.reason],
};
// Of a few values each: the beginning of one is none.
const WHOLE = new Set(["status", "health", "problem"]);
export const NAMES = Object.keys(FIELDS);

function words(text) {
  return text.match(/(?:[^\s"]|"[^"]*"?)+/g) || [];
}

export function parse(text) {
  const conditions = [];
  for (let word of words(text.toLowerCase())) {
    const not = word.length > 1 && word.startsWith("-");
    if (not) word = word.slice(1);
    const [, name, rest] = /^([a-z]+):(.*)$/s.exec(word) || [];
    const field = Object.hasOwn(FIELDS, name) ? name : "";
    const told = field ? rest : word;
    const value = told.replace(/"/g, "");
    if (value) conditions.push({ not, field, word: value, exact: told.startsWith('"') || WHOLE.has(field) });
  }
  return conditions;
}

// What stands before a colon as a field does, and is none.
export function unknownFields(text) {
  const named = words(text.toLowerCase()).map((word) => (/^-?([a-z]+):[^:]/.exec(word) || [])[1]);
  return [...new Set(named.filter((name) => name && !Object.hasOwn(FIELDS, name)))];
}

export function matches(node, conditions) {
  return conditions.every((condition) => holds(node, condition) !== condition.not);
}

function holds(node, { field, word, exact }) {
  const values = () => (field ? FIELDS[field](node) : Object.values(FIELDS).flatMap((value) => value(node)))
    .map((value) => String(value ?? "").toLowerCase());
  if (exact) return values().includes(word);
  if (field) return values().some((value) => begins(value, word));
  node.text ??= values().join("\n");
  return begins(node.text, word);
}

// Whether a word of the text begins so.
function begins(text, word) {
  for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + 1)) {
    if (at === 0 || !/[\p{L}\p{N}]/u.test(text[at - 1])) return true;
  }
  return false;
}

// The text with one condition put in or taken out.
export function toggled(text, condition) {
  const found = words(text);
  return (found.includes(condition) ? found.filter((word) => word !== condition) : [...found, condition]).join(" ");
}
