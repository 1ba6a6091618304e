"""The one place that talks to a container engine.

`protocol` is what the pipeline asks of an engine, `docker` asks it over the Docker Engine API, `ssh` is the way to
one on another host, and `wire` turns what is answered into facts. Nothing beyond this package knows aiodocker.
Imports `core` and `settings`.
"""

from eventwatch.engine.docker import DockerEngine

__all__ = ["DockerEngine"]
