"""What a manager calls instead of polling and saving: wait for a node, mark it as used, follow changes.

`waiting` decides when a wait is over, `follower` reads the documents that are waited for, `changes` passes the
changes of the watcher in this process on, which `here` names, `use` writes `last_req_time`. They run in the
manager's process, inside `watch()` or without it, and need an initialised Beanie (`watch()` and `init_beanie`
both do that).
"""
