"""Prefix sharing on several processes: each shares within its own batches, and the run is that without sharing.

DDP is tested with the trainer. FSDP is not: accelerate leaves it out on a CPU. It is tested with torch's own
`fully_shard`, which is what accelerate calls for FSDP2, and a loop by hand.

Run by itself under a launcher (`torchrun --nproc_per_node 2 test_prefix_sharing_processes.py ddp|fsdp2 FOLDER`) this
file trains on each process with sharing and without, and the first one saves what came of it; the tests do so.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forests import padded, pairs, random_model
from test_prefix_sharing_training import STEPS, TOLERANCE, distance, train
from tiny_models import EOS, PAD
from tiny_training import logged, weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from disco_trl.data.forest import pack
from disco_trl.models.prefix_sharing import prepare


pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

Run = dict[str, Any]


def run_ddp(folder: Path, sharing: bool) -> Run:
    import conftest

    tokenizer = conftest.build_tokenizer()
    tokenizer.pad_token_id = PAD
    processes = int(os.environ.get("WORLD_SIZE", 1))
    trainer, start = train(
        folder,
        sharing,
        model=lambda: random_model("llama"),
        processing_class=tokenizer,
        # Eight pairs a step, whatever the number of processes; in evaluation the last batches have to be evened out.
        eval_dataset=pairs(rows=13, seed=1),
        eval_strategy="steps",
        eval_steps=10,
        per_device_train_batch_size=8 // processes,
        learning_rate=0.02,
    )
    logs = [{name: log[name] for name in log if not name.endswith("num_tokens")} for log in logged(trainer)]
    return {
        "processes": trainer.accelerator.num_processes,
        "logs": logs,
        "start": start,
        "end": weights(trainer.model),
    }


def run_fsdp2(folder: Path, sharing: bool) -> Run:
    """
    Gradient descent by hand, with each layer, the head and the rest sharded by themselves; it writes nothing. What the
    likelihood learns can be had from the output only: in the head it is in shards.
    """
    model = random_model("llama")
    model.score.add_likelihood({"location_error": True, "tie_width": "learned"})
    start = weights(model)
    processes, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    if processes > 1:
        mesh = init_device_mesh("cpu", (processes,))
        for module in (*model.model.layers, model.score, model):
            fully_shard(module, mesh=mesh)
    # Made first, as a forward without gradients leaves FSDP2's outermost parameters whole for a while.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    if sharing:
        assert prepare(model) is None  # of a model in pieces
    model.train()
    data = pairs(rows=8 * STEPS)
    logs = []
    for step in range(STEPS):
        rows = data[8 * step + rank : 8 * (step + 1) : processes]
        sequences = [*rows["chosen_ids"], *rows["rejected_ids"]]
        output = model(**(pack(sequences, EOS) if sharing else padded(sequences)))
        reward, tie_width = model.rewards_of(output), model.responses_of(output).tie_width
        chosen, rejected = reward[: len(reward) // 2], reward[len(reward) // 2 :]
        loss = -chosen.log_prob_greater(rejected).mean() + (tie_width - 1).square().mean()
        loss.backward()
        gradients = [p.grad.full_tensor() if processes > 1 else p.grad for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach() / processes
        if processes > 1:
            torch.distributed.all_reduce(loss)
        logs.append({"loss": loss.item(), "grad_norm": torch.nn.utils.get_total_norm(gradients).item()})
    end = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in model.state_dict().items()
    }
    return {"processes": processes, "logs": logs, "start": start, "end": end}


STRATEGIES = {"ddp": run_ddp, "fsdp2": run_fsdp2}


@pytest.fixture(scope="module", params=STRATEGIES)
def runs(request, tmp_path_factory) -> tuple[dict[str, Run], Run]:
    """Of two processes, with sharing and without; and of one, with sharing."""
    folder = tmp_path_factory.mktemp(request.param)
    here = Path(__file__)
    paths = [str(here.parents[1]), str(here.parents[2]), os.environ.get("PYTHONPATH", "")]
    # A machine with one GPU cannot run two processes on it; without a GPU this changes nothing.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", __file__]
    launched = subprocess.run(
        [*command, request.param, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert "prefix_sharing is off" not in launched.stderr
    return torch.load(folder / "runs.pt", weights_only=True), STRATEGIES[request.param](folder, True)


def assert_same_run(one: Run, other: Run, evaluated: bool = True) -> None:
    for log, other_log in zip(one["logs"], other["logs"], strict=True):
        if evaluated or "loss" in log:
            assert log == pytest.approx(other_log, rel=1e-4, abs=1e-4)
    way = distance(other["end"], other["start"])
    assert way > 0.01
    assert distance(one["end"], other["end"]) < TOLERANCE * way


def test_with_sharing_and_without(runs):
    both, _ = runs
    assert {run["processes"] for run in both.values()} == {2}
    assert sum("loss" in log for log in both["plain"]["logs"]) == STEPS
    assert_same_run(both["shared"], both["plain"])


def test_what_the_likelihood_learns_is_learned_in_shards(runs):
    both, alone = runs
    names = [name for name in alone["end"] if ".likelihood." in name]  # none with DDP, whose data are forced choices
    for run in (*both.values(), alone):
        assert all((run["end"][name] - run["start"][name]).abs().min() > 1e-3 for name in names)


def test_on_two_processes_and_on_one(runs):
    both, alone = runs
    assert alone["processes"] == 1
    # TRL's metrics of an evaluation count the rows that even the last batches out (those of ours do not).
    assert_same_run(both["shared"], alone, evaluated=False)


if __name__ == "__main__":
    strategy, folder = sys.argv[1], Path(sys.argv[2])
    if strategy == "fsdp2":
        torch.distributed.init_process_group("gloo")
    results = {name: STRATEGIES[strategy](folder, name == "shared") for name in ("shared", "plain")}
    if int(os.environ["RANK"]) == 0:
        torch.save(results, folder / "runs.pt")
    # Left to the interpreter's end, gloo's threads are now and then still busy, and abort the process.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
