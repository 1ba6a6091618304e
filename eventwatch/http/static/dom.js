// Making elements. Whatever comes from outside becomes text, never markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

export function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  if (className) made.className = className;
  return made;
}

export function link(text, href, className) {
  const made = element("a", text, className);
  made.href = href;
  return made;
}

export function button(text, className, act) {
  const made = element("button", text, className);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

export function svg(name, attributes = {}, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Write only what differs: screen readers tell of each change, and the browser lays each one out.
export function setText(where, text) {
  if (where.textContent !== text) where.textContent = text;
}

export function setClass(where, className) {
  if (where.className !== className) where.className = className;
}

// Call `act` soon, once for however many calls, and not more often than every `gap` ms.
export function throttled(act, gap = 0) {
  let last = -Infinity;
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    const run = () => { waiting = false; last = performance.now(); act(); };
    const left = last + gap - performance.now();
    if (left > 0) setTimeout(run, left);
    else requestAnimationFrame(run);
  };
}
