"""Shell completion, in the shells themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.kit.images import RELEASE, fetched
from tests.kit.processes import run

BASH = """
source "$1"
complete -p eventwatch
COMP_WORDS=(eventwatch st) COMP_CWORD=1; COMPREPLY=(); _shtab_eventwatch; echo "${COMPREPLY[@]}"
COMP_WORDS=(eventwatch status --un) COMP_CWORD=2; COMPREPLY=(); _shtab_eventwatch; echo "${COMPREPLY[@]}"
COMP_WORDS=(eventwatch completion z) COMP_CWORD=2; COMPREPLY=(); _shtab_eventwatch; echo "${COMPREPLY[@]}"
"""
ZSH = """
module_path=("$2"/usr/lib/*/zsh/*(/)) fpath=("$2"/usr/share/zsh/functions/**/*(/))
autoload -Uz compinit && compinit -u -D
eval "$(<"$1")"
print -r -- "$_comps[eventwatch]"
whence -w _shtab_eventwatch
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("completion")
    paths = {}
    for shell in ("bash", "zsh"):
        paths[shell] = folder / shell
        paths[shell].write_text(run(sys.executable, "-m", "eventwatch", "completion", shell).stdout)
    return paths


def test_bash_completes_commands_options_and_choices(scripts: dict[str, Path]) -> None:
    said = run("bash", "-c", BASH, "-", scripts["bash"]).output
    registered, *completed = said.splitlines()
    assert registered.endswith(" -F _shtab_eventwatch eventwatch")
    assert completed == ["status", "--unhealthy", "zsh"]


def test_zsh_takes_its_script(scripts: dict[str, Path]) -> None:
    folder = fetched("zsh", RELEASE, "zsh", "zsh-common")
    said = run(folder / "bin/zsh", "-fc", ZSH, "-", scripts["zsh"], folder).output
    assert said.splitlines() == ["_shtab_eventwatch", "_shtab_eventwatch: function"]
