"""What is under deploy/ beside the compose files, as far as it can be looked at without installing it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.kit.images import quadlet
from tests.kit.processes import ROOT, run, system_environment


def test_the_systemd_unit_is_sound_and_narrow(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "eventwatch.service").read_text()
    unit = verified(tmp_path, text, "/opt/eventwatch/bin/eventwatch")
    said = run("systemd-analyze", "security", "--offline=yes", "--threshold=50", unit, check=False).output
    assert "Overall exposure level for eventwatch.service" in said
    assert "UNSAFE" not in said.splitlines()[-1]


def test_the_quadlet_becomes_a_sound_and_narrow_unit(tmp_path: Path) -> None:
    place = {"QUADLET_UNIT_DIRS": str(ROOT / "deploy")}
    said = run(quadlet(), "-dryrun", "-no-kmsg-log", env=system_environment(**place)).stdout
    _, _, text = said.partition("---eventwatch.service---\n")
    [start] = [line for line in text.splitlines() if line.startswith("ExecStart=/usr/bin/podman run ")]
    for option in (
        *("--user 65532:0", "--read-only", "--cap-drop all", "--security-opt=no-new-privileges"),
        *("-v /run/podman:/engine:ro", "--network host", "--health-cmd ", "--pids-limit=100 --memory=256m"),
    ):
        assert f" {option}" in start, start
    assert start.endswith(" localhost/eventwatch:latest")
    # Podman's own socket need not be there.
    verified(tmp_path, text.replace("Requires=podman.socket\n", ""), "/usr/bin/podman")


def test_a_wrong_quadlet_is_found(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "eventwatch.container").read_text()
    (tmp_path / "eventwatch.container").write_text(text.replace("ReadOnly=", "ReadsOnly="))
    env = system_environment(QUADLET_UNIT_DIRS=str(tmp_path))
    refused = run(quadlet(), "-dryrun", "-no-kmsg-log", env=env, check=False)
    assert (refused.code != 0, "ReadsOnly" in refused.output) == (True, True)


def verified(folder: Path, text: str, program: str) -> Path:
    """A unit that systemd takes without a word. The program need not be installed, but must be one."""
    unit = folder / "eventwatch.service"
    unit.write_text(text.replace(program, str(Path(os.environ.get("SHELL", "/bin/sh")).resolve())))
    assert run("systemd-analyze", "verify", "--man=no", unit).output == ""
    return unit
