// Which nodes a text asks for: whole words (or beginnings of them) anywhere in a row, or in one field of it.
//
// `exited` finds "exited", `health` does not find "unhealthy"; `status:exited -problem:oom web` are three conditions
// that must all hold. A word before a colon that names no field is no field: images have colons too.

import { address } from "./words.js";

const EXACT = {
  status: (node) => [node.status],
  health: (node) => [node.health],
  problem: (node) => node.problems,
};
const WITHIN = {
  name: (node) => node.name,
  image: (node) => node.image,
  id: (node) => node.node_id,
  address: (node) => address(node),
};

export function parse(text) {
  const conditions = [];
  for (let word of text.toLowerCase().split(/\s+/).filter(Boolean)) {
    const not = word.length > 1 && word.startsWith("-");
    if (not) word = word.slice(1);
    const colon = word.indexOf(":");
    const field = word.slice(0, Math.max(0, colon));
    const value = word.slice(colon + 1);
    if (Object.hasOwn(EXACT, field) || Object.hasOwn(WITHIN, field)) {
      if (value) conditions.push({ not, field, word: value });
    } else {
      conditions.push({ not, field: "", word });
    }
  }
  return conditions;
}

export function matches(node, conditions) {
  return conditions.every((condition) => holds(node, condition) !== condition.not);
}

function holds(node, { field, word }) {
  if (Object.hasOwn(EXACT, field)) return EXACT[field](node).some((value) => String(value).toLowerCase() === word);
  if (Object.hasOwn(WITHIN, field)) return begins(String(WITHIN[field](node)).toLowerCase(), word);
  node.text ??= [node.name, node.image, node.status, node.health, address(node), ...node.problems, node.node_id]
    .join(" ").toLowerCase();
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
  const words = text.split(/\s+/).filter(Boolean);
  return (words.includes(condition) ? words.filter((word) => word !== condition) : [...words, condition]).join(" ");
}
