"""The pages on clusters: their commands are complete, and their files, options and keys exist."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest

from msvae.config import valid_keys

from ..conftest import ROOT

PAGES = [ROOT / "docs" / f"{name}.md" for name in ("slurm", "kubernetes", "skypilot", "machines")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_use_existing_files_options_and_keys(page):
    text = page.read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert blocks
    node_options = set(re.findall(r"^  (--[a-z]+)", (ROOT / "launch" / "node.sh").read_text(), re.MULTILINE))
    for block in blocks:
        assert subprocess.run(["bash", "-n"], input=block, text=True).returncode == 0, block
        words = shlex.split(block.replace("\\\n", " "), comments=True)
        words += [word for quoted in words if " " in quoted for word in shlex.split(quoted)]
        for word in words:
            if re.fullmatch(r"(launch|train|configs)/[\w./-]+", word):
                assert (ROOT / word).is_file(), word
        for word, nextone in zip(words, [*words[1:], ""], strict=True):
            if word.startswith("--") and "." in word:
                assert word.removeprefix("--") in valid_keys(), word
            if word == "launch/node.sh" and nextone.startswith("--"):
                assert nextone in node_options | {"--help"}
    for option in re.findall(r"`(--(?:nodes|at|engine|interface|wait|processes|restarts)\b)", text):
        assert option in node_options
    for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text):
        assert (page.parent / link).is_file(), link
