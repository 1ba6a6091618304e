"""What the start of a command leaves undone: it would take time, in which documents are wrong after a crash."""

from __future__ import annotations

import sys
from typing import Final

from tests.kit.processes import run

IMPORTS: Final = """
import gc, os, ssl, sys
from eventwatch.__main__ import main

def load(self, purpose=None):
    print("authorities are read from", os.environ.get("SSL_CERT_FILE"), file=sys.stderr)

ssl.SSLContext.load_default_certs = load
sys.argv[1:] = ["completion", "bash"]
main()
frozen = min(gc.get_freeze_count(), 50_000)
print("afterwards from", os.environ.get("SSL_CERT_FILE"), "with", frozen, "frozen", file=sys.stderr)
"""


def test_no_authorities_are_read_as_a_command_is_imported_and_what_was_imported_is_no_garbage() -> None:
    done = run(sys.executable, "-c", IMPORTS, env={"SSL_CERT_FILE": "/its/own.pem"})
    assert done.stderr.splitlines() == [
        "authorities are read from /dev/null",
        "afterwards from /its/own.pem with 50000 frozen",
    ]
