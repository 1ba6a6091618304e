"""What the HTTP server is made of, beside the pages themselves: nothing here reads the engine or the database.

`access` decides who is answered (host names, other sites, token, TLS), `answers` makes each answer once however
many ask for it, `connections` accepts, counts and closes connections.
"""
