"""The errors that a user of eventwatch can meet.

Every message is one line: what is wrong, and what to do about it. The command line prints that line and
exits with the error's `exit_code`; a traceback therefore always means a bug. No message may carry a secret:
whoever raises one of these masks credentials first.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

#: How often something failed in this process, by what: the engine, the database, or a bug of our own (`internal`).
FAILURES: Final = Counter({"engine": 0, "database": 0, "internal": 0})


class EventwatchError(Exception):
    """Base of all errors that are the environment's fault, not a bug. Exit code 1."""

    exit_code = 1


class ConfigError(EventwatchError):
    """A setting, argument or input file is wrong; waiting cannot help. Exit code 2."""

    exit_code = 2


class EngineError(EventwatchError):
    """The engine did not answer as asked, nor said that there is no such container (which is an answer).

    `status` is the HTTP status, 0 when there was no answer. Never a reason to delete a document.
    `unreachable`: there was no connection at all, so no other call can succeed now. `permanent`: waiting does
    not help either (no permission on the socket).
    """

    def __init__(
        self, message: str, *, status: int = 0, unreachable: bool = False, permanent: bool = False
    ) -> None:
        super().__init__(message)
        FAILURES["engine"] += 1
        self.status = status
        self.unreachable = unreachable
        self.permanent = permanent
        if permanent:
            self.exit_code = ConfigError.exit_code


class StoreError(EventwatchError):
    """The database did not answer as asked: unreachable, timed out, refused the login or the write.

    `permanent`: waiting does not help (wrong credentials, missing rights). `timed_out`: it took the call and did
    not answer in time, so that asking again soon would make it slower still.
    """

    def __init__(self, message: str, *, permanent: bool = False, timed_out: bool = False) -> None:
        super().__init__(message)
        FAILURES["database"] += 1
        self.permanent = permanent
        self.timed_out = timed_out
        if permanent:
            self.exit_code = ConfigError.exit_code


class DocumentError(EventwatchError):
    """A node's document does not validate, so everything skips it until somebody corrects it."""


class LeaseLostError(EventwatchError):
    """A write was refused because the lease is no longer certainly ours."""


class CheckerDeletedError(EventwatchError):
    """An operator deleted our NodeChecker document, which is how a checker is told to stop."""


class EngineChangedError(EventwatchError):
    """Behind the same address there is another engine now: what is known of the nodes is void."""


class NodeError(EventwatchError):
    """What was waited for will not come. The message names the node and tells why."""


class WaitTimeoutError(NodeError, TimeoutError):
    """What was waited for did not come in time."""


class NodeGoneError(NodeError):
    """The node has no document, or has none any more. Exit code 3."""

    exit_code = 3


class NodeDiedError(NodeError):
    """The node ended before it became what was waited for. Exit code 3."""

    exit_code = 3


class ChangesLostError(EventwatchError):
    """A reader of changes was too slow, and has missed some."""
