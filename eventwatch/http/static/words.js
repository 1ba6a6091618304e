// Times and lengths of time in words.

export function duration(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "–";
  const left = Math.max(0, Math.round(seconds));
  if (left >= 172800) return two(left / 86400, "d", (left % 86400) / 3600, "h");
  if (left >= 3600) return two(left / 3600, "h", (left % 3600) / 60, "min");
  return left >= 60 ? two(left / 60, "min", left % 60, "s") : `${left} s`;
}

function two(large, unit, small, smaller) {
  const rest = Math.floor(small);
  return rest ? `${Math.floor(large)} ${unit} ${rest} ${smaller}` : `${Math.floor(large)} ${unit}`;
}

// The largest unit alone: for a place where a column must not jitter.
export function age(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "";
  const left = Math.max(0, Math.round(seconds));
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (left >= size * (unit === "d" ? 2 : 1)) return `${Math.floor(left / size)} ${unit}`;
  }
  return `${left} s`;
}

export function moment(when) {
  const today = when.toDateString() === new Date().toDateString();
  return today ? clock(when) : `${when.toLocaleDateString("en-CA")} ${clock(when)}`;
}

export function clock(when) {
  return when.toLocaleTimeString("en-GB");
}

export function milliseconds(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const ms = seconds * 1000;
  if (ms >= 10000) return `${Math.round(ms / 1000)} s`;
  if (ms >= 1000) return `${(ms / 1000).toFixed(1)} s`;
  return ms >= 100 ? `${Math.round(ms)} ms` : `${ms.toFixed(1)} ms`;
}

export function count(number, one, many = `${one}s`) {
  return `${number} ${number === 1 ? one : many}`;
}

export function address(node) {
  return node.ip ? `${node.ip}:${node.port}` : "";
}
