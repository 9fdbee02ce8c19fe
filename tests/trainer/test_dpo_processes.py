"""DPO on two processes gives the result of one, also for what the likelihood learns beside the policy.

The test runs this file under a launcher (`torchrun --nproc_per_node 2 test_dpo_processes.py MODEL FOLDER`). It then
trains on each process, and the first process saves the results.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from dpo_training import disco_dpo_trainer
from peft import LoraConfig
from tiny_training import furthest, logged, preferences, weights


pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
SCENARIOS = {
    "all weights": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "adapter": {"peft_config": LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)},
    "scales": {"scale_training": "joint"},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
}


def train(model: str, folder: Path) -> dict:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    found = {}
    for name, options in SCENARIOS.items():
        torch.manual_seed(0)
        data = load_from_disk(str(folder.parent / "rows"))  # TRL caches what it precomputes beside the rows.
        size = options.get("per_device_train_batch_size", 4) // processes
        settings = {"label_noise": None, "train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.2}
        options = {**settings, **options, "per_device_train_batch_size": size}
        trainer = disco_dpo_trainer(folder / name, model=model, train_dataset=data, eval_dataset=data, **options)
        assert trainer.data_collator.share_prefixes
        trainer.train()
        metrics = trainer.evaluate()
        learned = {key: tensor.clone() for key, tensor in trainer.policy_head.state_dict().items()}
        unwrapped = trainer.accelerator.unwrap_model(trainer.model)
        found[name] = {"logs": logged(trainer), "learned": learned, "weights": weights(unwrapped), "metrics": metrics}
    return found


@pytest.mark.skipif(
    not hasattr(__import__("trl.trainer.utils", fromlist=["add_fused_lm_head"]), "add_fused_lm_head"),
    reason="TRL has a fused LM head since release 1.15",
)
def test_two_processes_are_one(tiny_llama_dir, tmp_path):
    data = preferences("conversational", rows=16).add_column("preference_strength", [0, 1, 2, -1] * 4)
    data.save_to_disk(str(tmp_path / "rows"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(
        [*command, __file__, tiny_llama_dir, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-8000:]
    together, alone = torch.load(tmp_path / "found.pt", weights_only=False), train(tiny_llama_dir, tmp_path / "alone")
    for name in SCENARIOS:
        two, one = together[name], alone[name]
        assert one["learned"].keys() >= {f"likelihood.{key}" for key in ("tie_width", "label_noise")}
        assert ("scale.weight" in one["learned"]) == (name == "scales")
        assert furthest(one["learned"], two["learned"]) < 1e-4, name
        assert furthest(one["weights"], two["weights"]) < 1e-5, name
        for log, other in zip(one["logs"], two["logs"], strict=True):
            # (Of an adapter that is not yet trained, rounding decides which answer is ahead.)
            names = [
                key for key in log if key.endswith(("loss", "nll", "prob_chosen", "tie_width", "rewards/margins"))
            ]
            assert {key: log[key] for key in names} == pytest.approx({key: other[key] for key in names}, abs=1e-4), (
                name
            )


if __name__ == "__main__":
    results = train(sys.argv[1], Path(sys.argv[2]) / "together")
    if os.environ["RANK"] == "0":
        torch.save(results, Path(sys.argv[2]) / "found.pt")
