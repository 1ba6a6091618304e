"""The HTTP server, its pages and its own client: nothing here reads the engine or the database.

`server` has the pages, `rows`, `series` and `feed` what is on them, `access` decides who is answered (host
names, other sites, token, TLS), `answers` makes each answer once however many ask for it, `connections`
accepts, counts and closes connections. `nearby` and `probe` ask, as a health check does. `static` is the status
page.
"""
