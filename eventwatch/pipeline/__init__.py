"""What decides and acts between an engine and a database; no module here talks to either by itself.

`pipeline` puts the parts together. One event's way: `watcher` reads the stream, `reconciler` orders what is
known of each node (`roster`), and the `writer` writes it. `inspections` are asked for where an event proves too
little; `foresight` asks before a start is told, and the network by `addresses`; `orphans` are containers whose
documents are still to come; `ownership` is the record of whose they are. `sweeper` is the full pass that catches
what the stream missed, `requests` is where one is asked for, `afterlook` the look at what others wrote over,
`disputes` notices who does so again and again. `pulse` asks whether the engine is there at all.

`elector` holds the lease, `proof` tells that its holder is dead, `twins` whether another engine has our
engine's id.

`members` says which documents are this engine's, and `indexes` keeps it cheap to find them; `deletion` which
of vanished containers may go, `idle` which nodes are stopped, and stops them, `essentials` which containers
eventwatch itself lives on; `undocumented` and `fleet` tell what else there is.
"""
