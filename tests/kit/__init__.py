"""What the tests are made of, once each; no test lives here, and nothing of eventwatch decides what is true.

- `waiting`: how to wait for something, with a deadline that knows of slow machines.
- `processes`: how to run a program, to its end or beside the test; `eventwatch` runs ours.
- `engines`, `rootless`, `podman`, `debian`: engines of the test's own, and where they come from; `lacks`: what one
  cannot do; `ssh`: the way to one; `images` for containers.
- `mongod`: databases of the test's own.
- `nodes`: ToolServer nodes; `world` has them with documents and a watcher, in the test's own process.
- `truth`: what a document has to say, from the engine's own answers; `seen`: what happened to it, and the log.
- `fakes`, `fleet`, `listed`, `certificates`: answers, rows and files that are made up.
"""
