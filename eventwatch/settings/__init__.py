"""Every setting.

`model` has the fields and their rules, `sources` says where each was written (environment, file, secret),
`docker_context` finds the engine as the `docker` command does. Imports `core` alone.
"""

from eventwatch.settings.model import Settings

__all__ = ["Settings"]
