"""Reward models to hand off: one and the same, saved whole, as an adapter, and with the adapter merged."""

import pytest


@pytest.fixture(scope="session")
def reward_dirs(tiny_llama_dir, _session_tokenizer, tmp_path_factory) -> dict[str, str]:
    """Directories, each with the tokenizer: `full`, `adapter` (LoRA, on another base model) and `merged`."""
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
