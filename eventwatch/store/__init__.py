"""The one place that keeps documents in MongoDB.

`connection` leads from a URL to a `Store`, which has what the others have: `nodes` (the node documents and the
claims on them), `owners`, `leases`, `fleet`, `changes` (the last changes of each node) and `indexes`. `base` is
what they have in common, `rows` how rows are read whatever is in them, `documents` the Beanie documents.
`history` collects changes and writes them beside everything else, `embedded` runs a mongod of our own. Imports
`core` and `settings`.
"""
