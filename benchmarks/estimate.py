"""Compare `disco-trl estimate` with the memory that real training steps take.

Run as:

    OMP_NUM_THREADS=1 python -m benchmarks.estimate       # 15 minutes on one core

Each run is a process of its own. It first trains a tiny model, so that libraries, thread pools and kernel buffers are
allocated before anything is counted. Then it creates the trainer and takes two steps, the first of which allocates the
optimizer state. The figure is the peak of the process's anonymous memory (`RssAnon`) above what it held before the
model was loaded. The weights are copied once: those of a checkpoint are pages of its file until they are written to,
and no accelerator has such pages. Glibc is told to give each tensor pages of its own (see `MALLOC`), so that gaps in
its heap are not measured; `--gaps` leaves its defaults.
"""

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from disco_trl import DiscoRewardConfig, DiscoRewardTrainer
from disco_trl.cli.estimate import LABELS
from disco_trl.trainer.dataless_model import METHODS, Settings
from disco_trl.trainer.estimate import estimate

from .downloads import small_chat_lm
from .peak_memory import PeakMemory, held_bytes, in_fresh_process
from .speed_counts import Pair
from .speed_train import quieten


@dataclass(frozen=True)
class Setting:
    """What is varied: pairs in a batch, tokens in an answer, and gradient checkpointing."""

    batch_size: int
    length: int
    gradient_checkpointing: bool


SETTINGS = (Setting(2, 64, False), Setting(1, 160, True))
PROMPT_SHARE = 0.5
# Glibc raises its mmap threshold to 32 MiB by itself and does not return smaller blocks that are freed: small tensors
# that stay alive, such as an adapter's gradients, hold the pages around them. A run of a 30-layer model held 400 MiB
# of such gaps.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


def settings_of(setting: Setting, is_shared: bool, dtype: str = "float32") -> Settings:
    """Settings of the estimate that correspond to a measured run."""
    return Settings(
        length=setting.length,
        prompt_share=PROMPT_SHARE,
        prefix_sharing=is_shared,
        dtype=dtype,
        activation_checkpointing=setting.gradient_checkpointing,
        device="cpu",
    )


def random_pairs(number: int, length: int, vocabulary: int) -> list[Pair]:
    """Pairs of random tokens of full length. Both sides share `PROMPT_SHARE` of it, and no two pairs begin alike."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, vocabulary, (number, 2, length), generator=generator)
    tokens[:, :, 0] = torch.arange(number)[:, None] + 10
    prompt = round(PROMPT_SHARE * length)
    tokens[:, 1, :prompt] = tokens[:, 0, :prompt]
    tokens[:, 1, prompt] = 10 + (tokens[:, 0, prompt] - 9) % (vocabulary - 10)  # differs from the chosen side's
    return [(chosen.tolist(), rejected.tolist()) for chosen, rejected in tokens]


def make_trainer(
    model: str, tokenizer: Any, method: str, setting: Setting, is_shared: bool, folder: str, dtype: str
) -> Any:
    """Creates the trainer of a run of two steps."""
    weight_dtype = "bfloat16" if dtype == "bfloat16" else "float32"
    vocabulary = AutoConfig.from_pretrained(model).vocab_size
    pairs = random_pairs(2 * setting.batch_size, setting.length, vocabulary)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, weight_dtype),
    )
    return DiscoRewardTrainer(
        model,
        DiscoRewardConfig(
            folder,
            max_steps=2,
            per_device_train_batch_size=setting.batch_size,
            max_length=None,
            prefix_sharing=is_shared,
            gradient_checkpointing=setting.gradient_checkpointing,
            model_init_kwargs={"dtype": weight_dtype},
            bf16=dtype != "float32",
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(
            {"chosen_ids": [chosen for chosen, _ in pairs], "rejected_ids": [rejected for _, rejected in pairs]}
        ),
        processing_class=tokenizer,
        quantization_config=quantization if method == "qlora" else None,
        peft_config=None if method == "full" else LoraConfig(r=16, target_modules="all-linear"),
    )


def measure(model: str, method: str, setting: Setting, is_shared: bool, dtype: str) -> int:
    """Peak memory of two steps in bytes. It has to be called in a process of its own."""
    quieten()
    tokenizer = AutoTokenizer.from_pretrained(model)  # shared by both trainers, so not part of the measured memory
    with tempfile.TemporaryDirectory() as folder:
        tiny = str(Path(folder, "tiny"))
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 1024}
        AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **heads)).save_pretrained(tiny)
        make_trainer(tiny, tokenizer, method, setting, is_shared, folder, dtype).train()
        _give_back()
        before = held_bytes()
        trainer = make_trainer(model, tokenizer, method, setting, is_shared, folder, dtype)
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.clone()
        _give_back()
        built = held_bytes()
        with PeakMemory() as memory:
            trainer.train()
    return built - before + memory.peak_bytes


def _give_back() -> None:
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def main() -> None:
    """Measures the runs that the command line selects, and prints a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.estimate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", help="Local folder or Hub id of the model (default: a small chat LM from the package index)."
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="Ways to train (default: all)."
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "mixed", "bfloat16"),
        default="float32",
        help="Dtype of weights and computation; `mixed` is float32 weights under bfloat16 autocast "
        "(default: %(default)s).",
    )
    parser.add_argument("--gaps", action="store_true", help="Measure with glibc's default settings.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/memory"), help="Folder for the figures (default: %(default)s)."
    )
    args = parser.parse_args()
    model = args.model or str(small_chat_lm())
    config = AutoConfig.from_pretrained(model)
    if not args.gaps:
        os.environ.update(MALLOC)  # Glibc reads it when a process starts: it acts on those that are started below.
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [(method, setting, shared) for method in args.methods for setting in SETTINGS for shared in (False, True)]
    rows = []
    for method, setting, is_shared in tqdm(runs, unit="run"):
        expected = estimate(config, model, method, settings_of(setting, is_shared, args.dtype), setting.batch_size)
        measured = in_fresh_process(measure, model, method, setting, is_shared, args.dtype)
        rows.append({**vars(setting), "method": method, "shared": is_shared} | vars(expected) | {"measured": measured})
        with (args.out / "memory.jsonl").open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")

    print("| | pairs × tokens | checkpointing | batch | estimate, MiB | measured, MiB | estimate / measured |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {LABELS[row['method']]} | {row['batch_size']} × {row['length']} "
            f"| {'on' if row['gradient_checkpointing'] else 'off'} | {'shared' if row['shared'] else 'padded'} "
            f"| {row['total'] / 2**20:,.0f} | {row['measured'] / 2**20:,.0f} | {row['total'] / row['measured']:.2f} |"
        )


if __name__ == "__main__":
    main()
