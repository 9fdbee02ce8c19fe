"""`benchmarks/profile_step.py`: what is counted, and that a step of ours does not wait for the device, nor has many
more operators than TRL's.
"""

import pytest
import torch
from tiny_training import preferences

from benchmarks import profile_step
from benchmarks.profile_step import CountOperators, Counts, CountWaits, Timeline, timeline_of


def test_operators_are_counted_and_views_are_not():
    counts = Counts()
    with CountOperators(counts):
        tensor = torch.ones(2, 3)
        (tensor.t()[1:] + 1).mul_(2)
        torch.empty(3)
    assert counts.operators == {"ones": 1, "add": 1, "mul_": 1}


def test_layers_are_told_from_the_rest():
    class SomeDecoderLayer(torch.nn.Module):
        def forward(self, states):
            return states * 2 + 1

    model = torch.nn.Sequential(SomeDecoderLayer(), torch.nn.ReLU(), SomeDecoderLayer())
    counts = Counts()
    operators = CountOperators(counts)
    with operators.inside_layers(model), operators:
        model(torch.ones(3))
    assert (counts.layers, counts.in_layers, counts.a_layer) == (2, 4, 2)
    assert sum(counts.lines.values()) == 2  # the ones, and the ReLU


def test_what_makes_the_host_wait_is_found_by_its_line():
    counts = Counts()
    tensor = torch.arange(4.0)
    with CountWaits(counts):
        tensor.sum().item()
        tensor.tolist()
        tensor[tensor > 1]
        bool(tensor[0] > 0)
        tensor[1:].repeat_interleave(2)
        tensor.repeat_interleave(torch.tensor([1, 2, 3, 4]))
    kinds = {line.split()[-1] for line in counts.waits}
    assert kinds == {"item", "tolist", "__getitem__", "__bool__", "repeat_interleave"}
    assert sum(counts.waits.values()) == 5
    assert all("test_profile_step.py:" in line for line in counts.waits)


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_a_step_of_ours(kind, tiny_llama_dir, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    preferences("conversational", rows=16).to_json(file)
    options = ["--model", tiny_llama_dir, "--dataset", str(file), "--dtype", "float32", "--batch-size", "4"]
    found = {}
    report = profile_step.count_table

    def kept(counts: dict, labels: dict) -> str:
        found.update(counts)
        return report(counts, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile_step, "count_table", kept)
        profile_step.main([kind, *options, "--out", str(tmp_path / "out")])
    table = (tmp_path / "out" / f"{kind}.md").read_text()
    assert table.startswith("| ") and table.strip() in capsys.readouterr().out
    trl, ours = found["trl"], found["default"]
    assert ours.layers > 0 and trl.layers > 0
    assert ours.a_layer <= 1.2 * trl.a_layer
    # (On an accelerator, the likelihood does not ask whether there are ties.)
    waits = [line for line in ours.waits if "disco_trl/" in line and "distributions/likelihood.py" not in line]
    assert not waits


def test_a_timeline_of_overlapping_kernels():
    events = [
        {"name": "cudaLaunchKernel", "cat": "cuda_runtime", "ts": 0.0, "dur": 10.0},
        {"name": "cuLaunchKernelEx", "cat": "cuda_runtime", "ts": 20.0, "dur": 10.0},
        {"name": "cudaStreamSynchronize", "cat": "cuda_runtime", "ts": 900.0, "dur": 100.0},
        {"name": "gemm", "cat": "kernel", "ts": 100.0, "dur": 200.0},
        {"name": "add", "cat": "kernel", "ts": 250.0, "dur": 100.0},  # 50 of it beside the first
        {"name": "Memcpy DtoH", "cat": "gpu_memcpy", "ts": 500.0, "dur": 50.0},
        {"name": "python", "cat": "user_annotation", "ts": -500.0, "dur": 5000.0},
    ]
    assert timeline_of(events) == Timeline(2, 1, 1, 1.0, 0.3)
    assert "nothing runs" in profile_step.timeline_table({"trl": timeline_of(events)}, {"trl": "TRL"})
    assert "70%" in profile_step.timeline_table({"trl": timeline_of(events)}, {"trl": "TRL"})
