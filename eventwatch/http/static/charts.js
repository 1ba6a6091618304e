// The last hour by minutes: latency (p50 and p99), events a second, writes by cause.

import { byId, element, setText, svg } from "./dom.js";
import { on, state } from "./state.js";
import { clock, milliseconds } from "./words.js";

const TALL = 66;
const MINUTES = 60;
const CAUSES = [
  ["hint", "written at once by an event"], ["settle", "by an inspection once quiet"], ["sweep", "by a full pass"],
  ["look", "after another's write"], ["idle", "by an idle stop"], ["register", "registered"], ["delete", "deleted"],
];

function chart(id, title) {
  const figure = element("figure");
  const caption = element("figcaption");
  caption.append(element("b", title), element("span", null, "figures"));
  caption.lastChild.id = `${id}-text`;
  const plot = svg("svg", { id, role: "img", "aria-labelledby": `${id}-text`, height: TALL });
  figure.append(caption, plot);
  byId("charts").append(figure);
  return plot;
}

function x(place, count, wide) {
  return wide - ((count - place) * wide) / MINUTES;
}

// One area for each minute that tells its figures when it is pointed at.
function hovers(count, wide, text) {
  const series = state.series;
  return [...Array(count).keys()].map((place) => {
    const area = svg("rect", { class: "hover", x: x(place, count, wide), y: 0, width: wide / MINUTES, height: TALL });
    const back = (count - 1 - place) * series.seconds;
    const end = new Date((series.now - back) * 1000);
    area.append(svg("title", {}, `${clock(end)}: ${text(place)}`));
    return area;
  });
}

function latency(plot, wide) {
  const { latency_p50: half, latency_p99: most } = state.series;
  const values = most.filter((value) => value !== null);
  const top = Math.max(0.1, ...values) * 1.3;
  const bottom = 0.001;
  const y = (value) => 4 + (TALL - 18) * (1 - Math.log10(Math.max(bottom, value) / bottom) / Math.log10(top / bottom));
  const parts = [];
  for (const mark of [0.001, 0.01, 0.1, 1, 10, 100].filter((each) => each <= top)) {
    parts.push(svg("line", { class: "grid", x1: 0, x2: wide, y1: y(mark), y2: y(mark) }),
      svg("text", { class: "mark", x: 2, y: Math.min(TALL - 2, y(mark) + 10) }, mark < 1 ? `${mark * 1000} ms` : `${mark} s`));
  }
  for (const [name, line] of [["p99", most], ["p50", half]]) {
    let path = "";
    let before = false;
    line.forEach((value, place) => {
      if (value === null) { before = false; return; }
      const at = x(place, line.length, wide) + wide / MINUTES / 2;
      path += `${before ? "L" : "M"}${at.toFixed(1)} ${y(value).toFixed(1)}`;
      before = true;
      parts.push(svg("circle", { class: name, cx: at, cy: y(value), r: 1.8 }));
    });
    if (path) parts.push(svg("path", { class: name, d: path }));
  }
  plot.replaceChildren(...parts, ...hovers(half.length, wide, (place) =>
    half[place] === null ? "no change by an event" : `half within ${milliseconds(half[place])}, 99 % within ${milliseconds(most[place])}`));
  const last = half.findLastIndex((value) => value !== null);
  setText(byId("latency-text"), last < 0 ? "no change by an event yet"
    : `p50 ${milliseconds(half[last])}, p99 ${milliseconds(most[last])}`);
}

function events(plot, wide) {
  const { events: rates } = state.series;
  const top = Math.max(1, ...rates) * 1.1;
  const bars = rates.map((rate, place) => {
    const tall = ((TALL - 6) * rate) / top;
    return svg("rect", { class: "bar", x: x(place, rates.length, wide) + 0.5, width: Math.max(1, wide / MINUTES - 1), y: TALL - tall, height: tall });
  });
  plot.replaceChildren(...bars, svg("text", { class: "mark", x: 2, y: 10 }, `${top.toFixed(top < 10 ? 1 : 0)} a second`),
    ...hovers(rates.length, wide, (place) => `${rates[place].toFixed(2)} events a second`));
  setText(byId("events-text"), `${rates[rates.length - 1].toFixed(1)} a second now`);
}

function writes(plot, wide) {
  const { writes: byCause } = state.series;
  const count = state.series.events.length;
  const known = CAUSES.filter(([cause]) => byCause[cause]);
  const sums = [...Array(count).keys()].map((place) => known.reduce((sum, [cause]) => sum + byCause[cause][place], 0));
  const top = Math.max(1, ...sums) * 1.1;
  const parts = [];
  for (let place = 0; place < count; place += 1) {
    let base = TALL;
    for (const [cause] of known) {
      const tall = ((TALL - 6) * byCause[cause][place]) / top;
      if (!tall) continue;
      base -= tall;
      parts.push(svg("rect", { class: `w-${cause}`, x: x(place, count, wide) + 0.5, width: Math.max(1, wide / MINUTES - 1), y: base, height: tall }));
    }
  }
  plot.replaceChildren(...parts, svg("text", { class: "mark", x: 2, y: 10 }, `${Math.round(top)} a minute`),
    ...hovers(count, wide, (place) => known.filter(([cause]) => byCause[cause][place])
      .map(([cause]) => `${byCause[cause][place]} ${cause}`).join(", ") || "none"));
  const totals = known.map(([cause]) => [cause, byCause[cause].reduce((sum, value) => sum + value, 0)]).filter(([, sum]) => sum);
  setText(byId("writes-text"), totals.length ? totals.map(([cause, sum]) => `${cause} ${sum}`).join(", ") : "none yet");
  legend(new Set(totals.map(([cause]) => cause)));
}

function legend(present) {
  const list = byId("causes");
  const wanted = CAUSES.filter(([cause]) => present.has(cause));
  if (list.children.length === wanted.length) return;
  list.replaceChildren(...wanted.map(([cause, meaning]) => {
    const item = element("li", cause, `w-${cause}`);
    item.title = meaning;
    return item;
  }));
}

export function begin() {
  const plots = [[chart("latency", "Latency"), latency], [chart("events", "Events"), events], [chart("writes", "Writes"), writes]];
  const list = element("ul", null, "legend");
  list.id = "causes";
  byId("charts").append(list);
  const draw = () => {
    if (!state.series || byId("list").hidden) return;
    for (const [plot, make] of plots) {
      const wide = plot.clientWidth || 400;
      plot.setAttribute("viewBox", `0 0 ${wide} ${TALL}`);
      make(plot, wide);
    }
  };
  on("series", draw);
  on("place", draw);
  addEventListener("resize", draw);
}
