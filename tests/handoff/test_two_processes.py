"""`DiscoReward` where answers to one prompt are spread over processes.

Run by itself under a launcher (`torchrun --nproc_per_node 2 test_two_processes.py REWARD_MODEL POLICY OUTPUT`) this
file scores and trains on each process, and each writes what it found; the tests do so, once.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from policy_training import by_hand, run, token_ids
from tiny_models import load
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from disco_trl import DiscoReward


pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

# Answers to one prompt lie on both sides of each cut, and one prompt has a single answer.
PROMPTS = ["Do you like it? ", "Who? ", "Do you like it? ", "Why? ", "Who? ", "Do you like it? ", "Who? "]
COMPLETIONS = [
    "a lot",
    "people",
    "not at all",
    "the film is short",
    "a user",
    "the answer is short",
    "some people",
]
TRANSFORMS = ("win_rate", "lower_bound", "sample")
CUTS = {"even": 4, "uneven": 5, "all in the first": 7}


def score(reward, prompts, completions):
    """Rewards, and what was logged."""
    metrics = {}
    return reward(prompts=prompts, completions=completions, log_metric=metrics.__setitem__), metrics


def report_of_a_process(path: str, policy: str, output: Path, process: int) -> dict:
    report = {}
    for name, cut in CUTS.items():
        rows = slice(cut) if process == 0 else slice(cut, None)
        for transform in TRANSFORMS:
            reward = DiscoReward(path, transform=transform)
            report[f"{name}, {transform}"] = score(reward, PROMPTS[rows], COMPLETIONS[rows])
    report["the same rows, sample"] = score(DiscoReward(path, transform="sample"), PROMPTS, COMPLETIONS)
    report["as_scalar"] = load(path).as_scalar("sample")(input_ids=torch.tensor([[5, 6, 2]])).logits.item()

    # Groups of two in batches of three: the second group is shared.
    reward = DiscoReward(path, transform="win_rate")
    settings = {"num_generations": 2, "per_device_train_batch_size": 3, "scale_rewards": "none"}
    result = run(GRPOTrainer, GRPOConfig, policy, reward, output, **settings)
    report["GRPO"] = vars(result)
    return report


@pytest.fixture(scope="module")
def reports(reward_dirs, tiny_llama_dir, tmp_path_factory) -> list[dict]:
    output = tmp_path_factory.mktemp("two-processes")
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    # A machine with one GPU cannot run two processes on it; without a GPU this changes nothing.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", __file__]
    launched = subprocess.run(
        [*command, reward_dirs["adapter"], tiny_llama_dir, str(output)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    # The one prompt with one answer is warned of once for each reward that needs groups, by the first process.
    assert launched.stderr.count("some prompts have one answer only") == len(CUTS)
    return [json.loads((output / f"{process}.json").read_text()) for process in range(2)]


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_rewards_are_those_of_one_process(name, transform, reports, reward_dirs):
    expected, logged = score(DiscoReward(reward_dirs["adapter"], transform=transform), PROMPTS, COMPLETIONS)
    (first, first_logged), (second, second_logged) = (report[f"{name}, {transform}"] for report in reports)
    assert len(first) == CUTS[name]
    # Other batches round otherwise: by parts in 10⁷ of location and scale, of size 3, whose difference may be near 0.
    assert first + second == pytest.approx(expected, rel=1e-5, abs=5e-6)
    assert first_logged == pytest.approx(logged, rel=1e-4, abs=1e-5)
    assert second_logged == first_logged
    if transform == "win_rate":
        assert expected[PROMPTS.index("Why? ")] == 0.5
        assert len({round(reward, 4) for reward in expected}) == len(expected)


def test_draws_differ(reports):
    """Else rows of different processes would share their noise."""
    first, second = (report["the same rows, sample"][0] for report in reports)
    assert all(abs(one - other) > 1e-4 for one, other in zip(first, second, strict=True))
    assert reports[0]["as_scalar"] != reports[1]["as_scalar"]


def test_grpo(reports, reward_dirs):
    result = reports[0]["GRPO"]
    tokenizer = AutoTokenizer.from_pretrained(reward_dirs["adapter"])
    ids = [token_ids(tokenizer, text) for text in result["conversations"]]
    assert len(ids) == 6
    location, scale = by_hand(reward_dirs["adapter"], ids)
    z = (location[::2] - location[1::2]) / torch.hypot(scale[::2], scale[1::2])
    expected = [share for value in z.tolist() for share in (NormalDist().cdf(value), NormalDist().cdf(-value))]
    assert result["rewards"]["disco_win_rate"] == pytest.approx(expected, abs=1e-5)
    assert result["advantages"] == pytest.approx([reward - 0.5 for reward in expected], abs=1e-5)
    assert math.dist(expected, [0.5] * 6) > 0.01
    logged = result["logs"]
    assert logged["rewards/disco_win_rate/mean"] == pytest.approx(0.5)
    assert logged["disco_win_rate/location/mean"] == pytest.approx(location.mean().item(), abs=1e-5)
    assert result["extra"]["disco_win_rate/scale"] == pytest.approx(scale.tolist(), rel=1e-4)


if __name__ == "__main__":
    import conftest  # noqa: F401 (sets the environment of the tests)

    process = int(os.environ["RANK"])
    report = report_of_a_process(sys.argv[1], sys.argv[2], Path(sys.argv[3]), process)
    (Path(sys.argv[3]) / f"{process}.json").write_text(json.dumps(report))
    # Left to the interpreter's end, gloo's threads are now and then still busy, and abort the process.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
