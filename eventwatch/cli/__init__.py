"""The `eventwatch` command.

`main` parses, configures logging, and turns what went wrong into one line and an exit code; `run` is the
watcher itself, `commands` the others, which `doctor`, `engines`, `nodes`, `replays` and `top` carry out;
`output` prints.
"""
