"""Judgements on two processes: rankings and pairs in one dataset, and the run is that of one process.

Run under a launcher (`torchrun --nproc_per_node 2 test_judgements_processes.py MODEL FOLDER`) this file trains, and
the first process writes what came of it; the test does so.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_training import SMALL_RUN, logged

from disco_trl import DiscoRewardConfig, DiscoRewardTrainer


def train_and_report(model: str, output: Path, batch_size: int) -> dict:
    from test_judgements import mixed_rows

    options = {**SMALL_RUN, "per_device_train_batch_size": batch_size, "max_steps": 6}
    trainer = DiscoRewardTrainer(
        model, DiscoRewardConfig(str(output), **options), train_dataset=Dataset.from_list(mixed_rows() * 2)
    )
    trainer.train()
    head = trainer.accelerator.unwrap_model(trainer.model).score
    report = {
        "processes": trainer.accelerator.num_processes,
        "losses": [float(log["loss"]) for log in logged(trainer) if "loss" in log],
        "weights": {name: value.flatten().tolist() for name, value in head.state_dict().items()},
    }
    if trainer.is_world_process_zero():
        (output / "report.json").write_text(json.dumps(report))
    return report


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_process_and_two(tiny_llama_dir, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", __file__]
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run = subprocess.run(
        [*command, tiny_llama_dir, str(tmp_path / "two")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    one = train_and_report(tiny_llama_dir, tmp_path / "one", 8)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["losses"]) == 6
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert any(one["weights"]["likelihood.location_error"])
    # The mean hidden state that centres the scales is one over the pairs that are computed, and on two processes those
    # of short rankings are repeated; six steps move a weight by 6e-3.
    tolerances = {
        "weight": 2e-4,
        "scale.weight": 1e-3,
        "likelihood.location_error": 2e-3,
        "likelihood.tie_width": 2e-3,
    }
    for name, tolerance in tolerances.items():
        assert two["weights"][name] == pytest.approx(one["weights"][name], abs=tolerance), name


if __name__ == "__main__":
    import conftest  # noqa: F401  (sets the environment of the tests)

    train_and_report(sys.argv[1], Path(sys.argv[2]), 4)
