"""`eventwatch record` overwrites nothing unless it is told to."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from eventwatch.cli.replays import record_file
from eventwatch.core.errors import ConfigError, EngineError
from eventwatch.settings.model import Settings


@pytest.mark.parametrize("name", ["a.jsonl", "a.expected.json"])
async def test_a_recording_that_is_there_is_overwritten_only_by_force(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    settings = Settings(_env_file=None, docker_host=f"unix://{tmp_path}/none.sock")
    arguments = Namespace(file=tmp_path / "a.jsonl", duration=0.1, force=False)
    with pytest.raises(ConfigError, match=f"{name}: is there already: choose another name, or use --force"):
        await record_file(arguments, settings)
    arguments.force = True
    with pytest.raises(EngineError, match="no such socket"):  # it went on
        await record_file(arguments, settings)
    assert (tmp_path / name).read_text() == "precious"
