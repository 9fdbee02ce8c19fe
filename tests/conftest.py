"""Shared fixtures: a tokenizer and a Llama small enough to train in a test, both built in code without network.

The tokenizer is a byte-level BPE, which has no unknown tokens. Its chat template is ChatML with tools. The models are
random, with a fixed seed.
"""

import contextlib
import copy
import functools
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Set before any test module imports torch or a Hugging Face library, which read these variables only once. The private
# HF_HOME isolates the tests from the user's caches, tokens and `accelerate config`.
_hf_home = tempfile.TemporaryDirectory(prefix="disco-trl-tests-")
os.environ.update(
    HF_HOME=_hf_home.name,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)
# For tiny matrices, distributing work to threads costs more than it saves. Subprocesses inherit the setting.
os.environ.setdefault("OMP_NUM_THREADS", "1")

CORPUS = [
    "The capital of France is Paris, and the answer to the question is short.",
    "A user asks for help; the assistant writes a careful reply.",
    "Some people like this film a lot, other people do not like it at all.",
    "What is the best way to learn the piano? Practise a little every day.",
]

CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] or '' }}
{%- for call in message['tool_calls'] or [] %}{{ '\\n' + (call['function'] | tojson) }}{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE of about 400 tokens, with `<|pad|>` for padding and `<|im_end|>` for end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def _session_tokenizer() -> "PreTrainedTokenizerFast":
    return build_tokenizer()


@pytest.fixture
def tiny_tokenizer(_session_tokenizer) -> "PreTrainedTokenizerFast":
    """The tests' tokenizer. Each test gets its own copy, because trainers modify their tokenizer."""
    return copy.deepcopy(_session_tokenizer)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory, _session_tokenizer) -> str:
    """Directory with a random Llama causal LM (2 layers, hidden size 16) and the tests' tokenizer. Read-only."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path: Path = tmp_path_factory.mktemp("tiny-llama")
    # The seed is local, because a fixture that reseeds the process would hide tests that set no seed.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(_session_tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=2048,
                bos_token_id=None,
                eos_token_id=_session_tokenizer.eos_token_id,
                pad_token_id=_session_tokenizer.pad_token_id,
            )
        )
    model.save_pretrained(path)
    _session_tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def sharp_llama_dir(tmp_path_factory, tiny_llama_dir) -> str:
    """The tiny Llama with weights ten times as large, and as wide as the blocks that bitsandbytes packs. Read-only."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = tmp_path_factory.mktemp("sharp-llama")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "initializer_range": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_llama_dir, **sizes)).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def widened_llama_dir(tmp_path_factory, tiny_llama_dir) -> Callable[[int], str]:
    """`widened_llama_dir(64)` is the same with hidden size 64 and intermediate size 64. Read-only.

    64 is the size of the blocks in which bitsandbytes packs weights for the CPU.
    """

    @functools.cache
    def make(intermediate_size: int) -> str:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        path: Path = tmp_path_factory.mktemp("widened-llama")
        sizes = {"hidden_size": 64, "intermediate_size": intermediate_size, "head_dim": 32}
        config = AutoConfig.from_pretrained(tiny_llama_dir, **sizes)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(path)
        AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(path)
        return str(path)

    return make


@pytest.fixture(scope="session")
def wider_llama_dir(widened_llama_dir) -> str:
    """The smallest widened Llama."""
    return widened_llama_dir(64)


# Checkpoints of `tiny_models`, created once for each architecture that a test requests. Tests must not modify them.


@pytest.fixture(scope="session")
def base_model_dir(tmp_path_factory) -> Callable[[str], str]:
    """`base_model_dir("llama")` is a directory with a tiny random base language model of this architecture."""

    @functools.cache
    def make(architecture: str) -> str:
        from tiny_models import base_model

        path = tmp_path_factory.mktemp(f"base-{architecture}")
        base_model(architecture).save_pretrained(path)
        return str(path)

    return make


@pytest.fixture(scope="session")
def disco_dir(base_model_dir, tmp_path_factory) -> Callable[[str], str]:
    """`disco_dir("llama")` is a directory with a disco checkpoint whose head is randomized."""

    @functools.cache
    def make(architecture: str, **settings) -> str:
        import torch
        from tiny_models import randomize_heads

        from disco_trl import DiscoRewardModel

        path = tmp_path_factory.mktemp(f"disco-{architecture}")
        # Some classifiers have a layer before the head that the base model lacks. It is initialized at random.
        with torch.random.fork_rng():
            torch.manual_seed(4)
            model = DiscoRewardModel.from_pretrained(base_model_dir(architecture), **settings)
        randomize_heads(model).save_pretrained(path)
        return str(path)

    return make


@pytest.fixture(scope="session")
def reward_dir(tiny_llama_dir, _session_tokenizer, tmp_path_factory) -> Callable[..., str]:
    """`reward_dir()` is a directory with a disco checkpoint, whose head is randomized, and its tokenizer."""

    @functools.cache
    def make(**settings) -> str:
        from tiny_models import randomize_heads

        from disco_trl import DiscoRewardModel

        path = tmp_path_factory.mktemp("reward")
        model = DiscoRewardModel.from_pretrained(tiny_llama_dir, **settings)
        randomize_heads(model).save_pretrained(path)
        _session_tokenizer.save_pretrained(path)
        return str(path)

    return make


@pytest.fixture(scope="session")
def scalar_dir(base_model_dir, tmp_path_factory) -> Callable[[str], str]:
    """`scalar_dir("llama")` is a directory with a Bradley–Terry reward model, saved by the stock class."""

    @functools.cache
    def make(architecture: str) -> str:
        import torch
        from transformers import AutoModelForSequenceClassification

        path = tmp_path_factory.mktemp(f"scalar-{architecture}")
        with torch.random.fork_rng():
            torch.manual_seed(2)
            model = AutoModelForSequenceClassification.from_pretrained(base_model_dir(architecture), num_labels=1)
        model.save_pretrained(path)
        return str(path)

    return make


@pytest.fixture(scope="session")
def reward_dirs(tiny_llama_dir, _session_tokenizer, tmp_path_factory) -> dict[str, str]:
    """Reward models with tokenizers: `full`, `adapter` (LoRA, with other weights), and `merged` (from `adapter`)."""
    from tiny_models import load, lora, randomize_heads, save_adapter

    root = tmp_path_factory.mktemp("rewards")
    paths = {kind: root / kind for kind in ("full", "adapter", "merged")}
    randomize_heads(load(tiny_llama_dir)).save_pretrained(paths["full"])
    adapter = lora(load(tiny_llama_dir))
    save_adapter(adapter, paths["adapter"])
    adapter.merge_and_unload().save_pretrained(paths["merged"])
    for path in paths.values():
        _session_tokenizer.save_pretrained(path)
    return {kind: str(path) for kind, path in paths.items()}


@pytest.fixture
def runs_in_this_process(monkeypatch) -> None:
    """The runs of `disco-trl compare` are not processes of their own, of which each takes seconds to start. For tests
    that are not about that.
    """
    from disco_trl.evaluation import compare, compare_run

    def run(command: list[str], log: Any) -> int:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                compare_run.main(next(word for word in command if word.endswith(compare.RUN_FILE)))
            except Exception:
                traceback.print_exc()
                return 1
        return 0

    monkeypatch.setattr(compare, "run_child", run)
