"""`python -m eventwatch`, and the `eventwatch` command."""

import signal


def main() -> None:
    """Run the command line. Until a command runs, Ctrl-C ends it as it ends any program: at once and quietly."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from eventwatch.cli import main as run  # noqa: PLC0415 - its imports take time, in which somebody may press it

    run()


if __name__ == "__main__":
    main()
