// A node's life as spans of time, each with the one status that it had, or with several that took turns.
//
// The history counts what comes again and again, with the times of the first and of the last: these two are known,
// and what lies between them is a mix of all that was counted meanwhile.

// From changes of status ({status, from, until, count, reason}; times in ms), to the end of what is shown. `present`
// is what is known of the node apart from them ({status, since}), or null.
export function spans(changes, end, present) {
  const points = changes.flatMap(({ status, from, until, count, reason }) =>
    (count > 1 ? [{ at: from, status, reason: "" }, { at: until, status, reason }] : [{ at: from, status, reason }]));
  points.sort((one, other) => one.at - other.at);
  const last = points[points.length - 1];
  if (present && last && present.status !== last.status && last.status !== "removed") {
    points.push({ at: Math.max(last.at, Math.min(present.since ?? end, end)), status: present.status, reason: "" });
  }
  const counted = changes.filter(({ count }) => count > 2);
  const made = [];
  points.forEach(({ at, status, reason }, place) => {
    const to = place + 1 < points.length ? points[place + 1].at : Math.max(at, end);
    const turns = counted.filter(({ from, until }) => from <= at && to <= until);
    const statuses = turns.length > 1 ? [...new Set(turns.map((each) => each.status))].sort() : [status];
    const times = turns.length > 1 ? Math.max(...turns.map(({ count }) => count)) : 1;
    const before = made[made.length - 1];
    if (before && before.statuses.join() === statuses.join()) {
      Object.assign(before, { to, reason: reason || before.reason, times: Math.max(before.times, times) });
    } else {
      made.push({ from: at, to, statuses, times, reason });
    }
  });
  return made;
}
