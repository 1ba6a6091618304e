"""The one place that keeps documents in MongoDB.

`documents` are the Beanie documents, `nodes` reads and writes them, `history` keeps the last changes of each
node, `embedded` runs a mongod of our own. Imports `core` and `settings`.
"""
