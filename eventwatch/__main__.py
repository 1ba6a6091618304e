"""`python -m eventwatch`, and the `eventwatch` command."""

import gc
import signal
import sys


def main() -> None:
    """Run the command line. Until a command runs, Ctrl-C ends it as it ends any program: at once and quietly."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.argv[1:] == ["healthcheck"]:
        from eventwatch.http.nearby import ask_nearby  # noqa: PLC0415 - of the product, this alone is needed

        if (said := ask_nearby()) is not None:
            print(said)  # noqa: T201 - a command
            return
    gc.disable()  # until all is imported, of which nothing would be collected: a tenth of the time
    from eventwatch.cli.main import main as run  # noqa: PLC0415 - its imports take time, in which somebody may press it

    run()


if __name__ == "__main__":
    main()
