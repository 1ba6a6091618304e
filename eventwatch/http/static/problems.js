// What asks for attention, in the order in which an operator wants to know, and what else is counted.

export const PROBLEMS = [
  ["crash-looping", "crash-looping", "restarted again and again within minutes"],
  ["oom", "out of memory", "ended since it used more memory than it may"],
  ["died", "died", "ended though nobody asked for that, with an error"],
  ["unhealthy", "unhealthy", "runs, and its health check fails"],
  ["stuck", "stuck", "is still there minutes after it ought to have been killed"],
  ["disagreeing", "disagreeing", "the document says something else than the engine, or the engine does not answer for it"],
];
const NAMES = new Map(PROBLEMS.map(([key, name]) => [key, name]));
export const STATUSES = ["running", "stopping", "paused", "restarting", "created", "exited", "removing", "dead"];

export function problemName(key) {
  return NAMES.get(key) || key;
}

// How badly a node wants to be looked at; 0 for not at all.
export function urgency(node) {
  let sum = 0;
  PROBLEMS.forEach(([key], place) => { if (node.problems.includes(key)) sum += 1 << (PROBLEMS.length - place); });
  return sum;
}

// The class of a status: what ended calmly is no alarm.
export function statusClass(node) {
  const bad = node.problems.some((key) => key === "died" || key === "oom" || key === "crash-looping");
  return `status ${node.status}${bad ? " bad" : ""}`;
}

export function healthClass(node) {
  return node.status === "running" ? `health ${node.health}` : "health calm";
}
