"""What everything else is made of: nothing here reads an engine, a database, a settings file or a socket.

`facts` are events, observations and changes; `policy` is every decision, as a pure function, and `listing` what a
list of containers proves; `details` and `reasons` tell why a node ended; `clock`, `backoff`, `workqueue` and
`durations` are about time; `metrics`, `readiness`, `errors`, `logs`, `text` and `version` are about what is told.
Imports nothing beside itself.
"""
