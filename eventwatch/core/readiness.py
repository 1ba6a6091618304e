"""What the lines of `/readyz` mean: one standing by is as it should be, a note is no doubt.

Needs nothing but Python itself: the health check of a container starts with little else.
"""

#: What the one doubt of a standby begins with.
STANDBY = "lease: standing by,"
#: What begins a line that is no doubt.
NOTES = ("clock:", "nodes:", "fleet:")


def standing_by(manager_id: str) -> str:
    """The doubt of a standby."""
    return f"{STANDBY} checker {manager_id} watches this engine"


def is_standby(reasons: list[str]) -> bool:
    """Whether the only doubt is that another checker leads, which is as it should be."""
    doubts = [reason for reason in reasons if not reason.startswith(NOTES)]
    return len(doubts) == 1 and doubts[0].startswith(STANDBY)


def summary(ready: bool, reasons: list[str]) -> str:
    """What a health check says of an eventwatch that is ready, or else standing by."""
    return "; ".join(["ready", *reasons] if ready else reasons)
