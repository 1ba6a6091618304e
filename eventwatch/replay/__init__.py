"""Event streams on file.

`recorder` makes a `recording`, `player` runs the pipeline over one, with an `engine` that answers from it and a
`timeline` for a clock. It stands beside `app`: a replay is composed of the same parts.
"""
