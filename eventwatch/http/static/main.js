// The status page: shows what eventwatch knows, and changes nothing. Each module is one part of it.

import * as changes from "./changes.js";
import * as charts from "./charts.js";
import * as fleet from "./fleet.js";
import * as head from "./head.js";
import * as node from "./node.js";
import * as server from "./server.js";
import { byId } from "./dom.js";
import { place, tell } from "./state.js";
import * as table from "./table.js";

let before = "#/";

function go() {
  const { view } = place();
  if (view === "node") {
    tell("left", before);
  } else {
    before = location.hash || "#/";
  }
  byId("list").hidden = view === "node";
  tell("place");
}

head.begin();
table.begin();
changes.begin();
charts.begin();
node.begin();
addEventListener("hashchange", go);
addEventListener("keydown", (event) => {
  const typing = event.target instanceof HTMLElement && event.target.closest("input, select, textarea");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    if (byId("list").hidden) location.hash = before;
    byId("filter").focus();
    byId("filter").select();
  }
});
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("filter").focus();
});
go();
server.begin();
fleet.begin();
