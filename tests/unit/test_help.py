"""What `--help` says, word for word, and the exit codes of the command line.

Why: the help is the first text that an operator reads, and nobody sees it change in a review of code. Here a
change of it is a change of a file under `help/`. Renew those by `python -m tests.unit.test_help`.

The texts are compared at 80 columns and without colour. Not promised: that argparse wraps them alike in Pythons
that are not out yet; 3.11 to 3.13 do.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from unittest import mock

import pytest

from eventwatch.cli import main as cli
from tests.kit.mongod import free_address
from tests.kit.processes import Ended, run

FOLDER = Path(__file__).parent / "help"
ROOT = Path(__file__).parents[2]
COMMANDS = (
    "run",
    "sweep",
    "status",
    "top",
    "explain",
    "engines",
    "wait",
    "record",
    "replay",
    "doctor",
    "healthcheck",
    "config",
    "completion",
)
NESTED = {"engines-forget": ("engines", "forget", "--help")}
SHAPE = {"COLUMNS": "80", "NO_COLOR": "1"}


def ends(*words: str) -> tuple[int, str, str]:
    """Run the command line in this process: its exit code, its output and its errors."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, SHAPE),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main(words)
    code = ended.value.code
    return (code if isinstance(code, int) else 0), output.getvalue(), errors.getvalue()


def helps() -> dict[str, tuple[str, ...]]:
    """The words that ask for help, by the name of the file that holds the answer."""
    return {"eventwatch": ("--help",), **{name: (name, "--help") for name in COMMANDS}, **NESTED}


@pytest.mark.parametrize(("name", "words"), helps().items(), ids=helps())
def test_help_says_what_is_on_file(name: str, words: tuple[str, ...]) -> None:
    assert ends(*words) == (0, (FOLDER / f"{name}.txt").read_text(), "")


def test_every_command_is_on_file_and_nothing_else() -> None:
    _, text, _ = ends("--help")
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("    ") and line[4] != " "]
    assert tuple(listed) == COMMANDS
    assert {path.stem for path in FOLDER.iterdir()} == {"eventwatch", *COMMANDS, *NESTED}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param((), "the following arguments are required: COMMAND", id="no command"),
        pytest.param(("sweeep",), "argument COMMAND: invalid choice: 'sweeep'", id="unknown command"),
        pytest.param(("sweep", "--forse"), "unrecognized arguments: --forse", id="unknown option"),
        pytest.param(("--verbose", "run"), "unrecognized arguments: --verbose", id="unknown option before it"),
        pytest.param(("explain",), "the following arguments are required: ID", id="missing argument"),
        pytest.param(("status", "--status", "exitd"), "argument --status: invalid choice: 'exitd'", id="status"),
        pytest.param(("explain", ""), "argument ID: it is empty", id="explain nothing"),
        pytest.param(("wait", " "), "argument NAME: it is empty", id="wait for nothing"),
        pytest.param(("record", "a.jsonl", "--duration", "soon"), "argument --duration: must be", id="bad value"),
        pytest.param(("--env-file", "/nowhere/.env", "config"), "/nowhere/.env: no such file", id="bad settings"),
    ],
)
def test_wrong_usage_and_wrong_settings_end_with_2_and_one_line(words: tuple[str, ...], message: str) -> None:
    code, output, errors = ends(*words)
    assert (code, output) == (2, "")
    *usage, line = errors.splitlines()
    assert message in line
    assert all(text.startswith(("usage: eventwatch", "  ")) for text in usage)


@pytest.mark.parametrize(
    ("words", "code"),
    [(("--help",), 0), (("--version",), 0), (("config",), 0), (("sweeep",), 2), (("run", "--quick"), 2)],
)
def test_a_shell_sees_the_exit_code(words: tuple[str, ...], code: int, tmp_path: Path) -> None:
    assert in_a_shell(*words, cwd=tmp_path).code == code


def test_what_fails_ends_with_1_and_one_line(tmp_path: Path) -> None:
    done = in_a_shell("healthcheck", cwd=tmp_path)
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr.startswith("eventwatch: no eventwatch answers at 127.0.0.1 port ")
    assert done.stderr.count("\n") == 1


def in_a_shell(*words: str, cwd: Path) -> Ended:
    """Run the command line as a program, where nothing answers its health check."""
    environment = {"PYTHONPATH": str(ROOT), "EVENTWATCH_HTTP_LISTEN": free_address()}
    return run(sys.executable, "-m", "eventwatch", *words, cwd=cwd, env=environment, check=False)


def renew() -> None:
    """Write down what the help says now."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.iterdir():
        old.unlink()
    for name, words in helps().items():
        (FOLDER / f"{name}.txt").write_text(ends(*words)[1])


if __name__ == "__main__":
    renew()
