"""What decides and acts between an engine and a database; no module here talks to either by itself.

`deletion` decides which documents of vanished containers may go, `twins` whether another engine has our engine's
id, `idle` which nodes are stopped, and stops them, `essentials` which containers eventwatch itself lives on.
"""
