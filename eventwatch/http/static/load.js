// Loads the page's modules, and the page again when one of them is lost on the way: browsers give up what is under
// way whenever a network comes or goes, as with each container on the same machine, and never ask twice for a module.
"use strict";

import("./main.js").then(
  () => sessionStorage.removeItem("loads"),
  (error) => {
    const loads = Number(sessionStorage.getItem("loads") || 0) + 1;
    sessionStorage.setItem("loads", String(loads));
    if (loads <= 20) {
      setTimeout(() => location.reload(), 200);
      return;
    }
    document.getElementById("readiness").textContent = `The page cannot be loaded: ${error.message}`;
  },
);
