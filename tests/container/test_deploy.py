"""What is under deploy/ beside the compose files, as far as it can be looked at without installing it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.container.standin import ROOT, sh


def test_the_systemd_unit_is_sound_and_narrow(tmp_path: Path) -> None:
    unit = tmp_path / "eventwatch.service"
    # The program need not be installed, but must be one.
    program = Path(os.environ.get("SHELL", "/bin/sh")).resolve()
    text = (ROOT / "deploy" / "eventwatch.service").read_text()
    unit.write_text(text.replace("/opt/eventwatch/bin/eventwatch", str(program)))
    assert sh("systemd-analyze", "verify", "--man=no", unit) == (0, "")
    _, said = sh("systemd-analyze", "security", "--offline=yes", "--threshold=50", unit, check=False)
    assert "Overall exposure level for eventwatch.service" in said
    assert "UNSAFE" not in said.splitlines()[-1]
