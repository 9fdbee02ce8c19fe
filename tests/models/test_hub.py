"""Pushing to the Hub and loading from it, against a stand-in on the loopback that speaks its API."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub import USER, Hub, hub_on_loopback


@pytest.fixture
def hub():
    with hub_on_loopback() as hub:
        yield hub


def run(hub: Hub, home: Path, *arguments: object) -> dict[str, Any]:
    """What `push_and_load.py` prints, in a process with a cache of its own that takes the stand-in for the Hub."""
    script = Path(__file__).parents[1] / "push_and_load.py"
    result = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env=os.environ | hub.environment() | {"HF_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_what_is_pushed_at_the_end_loads_from_the_hub_everywhere(kind, hub, tiny_llama_dir, tmp_path):
    repo = f"{USER}/reward-{kind}"
    pushed = run(hub, tmp_path / "home", "push", kind, repo, tiny_llama_dir, tmp_path / "run", "end")

    (*_, last) = hub.repos[repo]
    card = last.files["README.md"].decode()
    assert f'path = "{repo}"' in card  # so that it can be copied from the Hub's page
    assert "someone/preferences" in card
    assert not [name for name in last.files if "checkpoint" in name or name == "predictions.safetensors"]

    loaded = run(hub, tmp_path / "other-home", "load", repo)
    assert loaded["location"] == pytest.approx(pushed["location"], abs=1e-6)
    assert loaded["scale"] == pytest.approx(pushed["scale"], abs=1e-6)
    assert loaded["scalar"] == pytest.approx(pushed["location"], abs=1e-6)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_what_is_pushed_while_training_goes_on_loads_as_well(kind, hub, tiny_llama_dir, tmp_path):
    repo = f"{USER}/reward-{kind}"
    pushed = run(hub, tmp_path / "home", "push", kind, repo, tiny_llama_dir, tmp_path / "run", "checkpoint")

    assert {commit.message for commit in hub.repos[repo]} == {
        "initial commit",
        "Training in progress, step 2",
        "Training in progress, step 2, checkpoint",
    }
    assert "last-checkpoint/trainer_state.json" in hub.repos[repo][-1].files
    loaded = run(hub, tmp_path / "other-home", "load", repo)
    assert loaded["location"] == pytest.approx(pushed["location"], abs=1e-6)
    assert loaded["scale"] == pytest.approx(pushed["scale"], abs=1e-6)
