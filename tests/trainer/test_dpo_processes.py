"""DPO on two processes, with DDP and FSDP2, gives the result of one, also for what is learned beside the policy.

The tests run this file under a launcher (`torchrun --nproc_per_node 2 test_dpo_processes.py ddp|fsdp2 MODEL FOLDER`).
It then trains on each process, and the first process saves the results.
"""

import os
import subprocess
import sys
from pathlib import Path

import fsdp2_on_cpu
import pytest
import torch
from datasets import load_from_disk
from dpo_training import disco_dpo_trainer
from peft import LoraConfig
from tiny_training import furthest, logged, preferences, weights


pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(__import__("trl.trainer.utils", fromlist=["add_fused_lm_head"]), "add_fused_lm_head"),
        reason="TRL has a fused LM head since release 1.15",
    ),
]
FIXED = {"label_noise": 0.1, "tie_width": 0.5, "strength_levels": 1}
LEARNED = {"label_noise": None}
SCENARIOS = {
    "ddp": {
        "all weights": {},
        "precomputed": {"precompute_ref_log_probs": True},
        "adapter": {"peft_config": LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)},
        "scales": {"scale_training": "joint"},
        "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    },
    "fsdp2": {"all weights": FIXED, "precomputed": {**FIXED, "precompute_ref_log_probs": True}},
}


def train(kind: str, model: str, folder: Path) -> dict:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    found = {}
    for name, options in SCENARIOS[kind].items():
        torch.manual_seed(0)
        data = load_from_disk(str(folder.parent / "rows"))  # TRL caches what it precomputes beside the rows.
        size = options.get("per_device_train_batch_size", 4) // processes
        settings = {**LEARNED, "train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.2}
        if kind == "fsdp2" and processes > 1:
            settings["use_cpu"] = False
        options = {**settings, **options, "per_device_train_batch_size": size}
        trainer = disco_dpo_trainer(folder / name, model=model, train_dataset=data, eval_dataset=data, **options)
        assert trainer.data_collator.share_prefixes
        trainer.train()
        metrics = trainer.evaluate()
        learned = {key: tensor.clone() for key, tensor in trainer.policy_head.state_dict().items()}
        if kind == "fsdp2":
            end = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        else:
            end = weights(trainer.accelerator.unwrap_model(trainer.model))
        found[name] = {
            "is_fsdp2": getattr(trainer.accelerator, "is_fsdp2", False),
            "logs": logged(trainer),
            "learned": learned,
            "weights": {key: tensor.detach().clone() for key, tensor in end.items()},
            "metrics": metrics,
        }
        if processes > 1:
            fsdp2_on_cpu.forget_state()
    if kind == "fsdp2" and processes > 1:
        with pytest.raises(ValueError, match=r"FSDP optimizes .* \(likelihood\.label_noise\); give numbers"):
            disco_dpo_trainer(folder / "learned", model=model, train_dataset=data, **settings | FIXED | LEARNED)
    return found


@pytest.mark.parametrize("kind", SCENARIOS)
def test_two_processes_are_one(kind, tiny_llama_dir, tmp_path):
    data = preferences("conversational", rows=16).add_column("preference_strength", [0, 1, 2, -1] * 4)
    data.save_to_disk(str(tmp_path / "rows"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    environment |= fsdp2_on_cpu.environment() if kind == "fsdp2" else {}
    result = subprocess.run(
        [*command, __file__, kind, tiny_llama_dir, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-8000:]
    together = torch.load(tmp_path / "found.pt", weights_only=False)
    alone = train(kind, tiny_llama_dir, tmp_path / "alone")
    for name in SCENARIOS[kind]:
        two, one = together[name], alone[name]
        assert two["is_fsdp2"] == (kind == "fsdp2")
        learned = {f"likelihood.{key}" for key in ("tie_width", "label_noise")} if kind == "ddp" else set()
        assert one["learned"].keys() >= learned
        assert ("scale.weight" in one["learned"]) == (name == "scales")
        assert not learned or furthest(one["learned"], two["learned"]) < 1e-4, name
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
    kind, model, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if kind == "fsdp2":
        fsdp2_on_cpu.believe_in_gpus()
    results = train(kind, model, folder / "together")
    if os.environ["RANK"] == "0":
        torch.save(results, folder / "found.pt")
    fsdp2_on_cpu.leave()
