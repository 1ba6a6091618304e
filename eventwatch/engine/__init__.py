"""The one place that talks to a container engine.

`docker` speaks the Docker Engine API; nothing beyond it knows aiodocker. Imports `core` and `settings`.
"""
