"""The kernel of accelerators in `disco_trl.models.varlen_attention`: how it is called, where there is no accelerator
to run it.

Each release of torch from 2.10 on has a stand-in with exactly its signature. It computes what torch documents, with
dense masks: queries and keys in runs, the last query of a run aligned with the last key, a window as (left, right).
"""

import inspect
import logging
import math
import sys

import pytest
import tiny_models
import torch
from forests import padded, random_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn

from disco_trl.data.forest import pack
from disco_trl.models import prefix_sharing, varlen_attention
from disco_trl.models.prefix_sharing import prepare
from disco_trl.models.varlen_attention import VarlenKernel, is_for_kernel, lacking


def documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, enable_gqa):
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q[-1] == len(query)
    assert cu_seq_k[-1] == len(key) == len(value)
    assert max_q == cu_seq_q.diff().max()
    assert max_k == cu_seq_k.diff().max()
    assert enable_gqa or query.shape[1] == key.shape[1]
    groups = query.shape[1] // key.shape[1]
    left, right = window_size
    assert right == 0  # causal
    outputs = []
    for run in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[run] : cu_seq_q[run + 1]]
        k = key[cu_seq_k[run] : cu_seq_k[run + 1]].repeat_interleave(groups, dim=1)
        v = value[cu_seq_k[run] : cu_seq_k[run + 1]].repeat_interleave(groups, dim=1)
        # How many places a query stands behind a key
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        visible = (distance >= 0) & ((distance <= left) | (left == -1))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or 1 / math.sqrt(q.shape[-1]))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -math.inf).softmax(-1), v))
    return torch.cat(outputs)


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    return documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, None, (-1, 0), False)


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, False)


def torch_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    return documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, enable_gqa)


RELEASES = {"2.10": torch_2_10, "2.11": torch_2_11, "2.12 to 2.14": torch_2_12}
ARCHITECTURES = {
    "llama, fewer heads of keys": ("llama", {}),
    "mistral, a window": ("mistral", {"sliding_window": 4}),
    "gemma3, another scale": ("gemma3_text", {"sliding_window": 4, "query_pre_attn_scalar": 32}),
    "gpt2, as many heads": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}),
}
PROMPT = [7, 8, 9, 10, 11, 12, 13]
SEQUENCES = [[*PROMPT, 20, 21, 22, 2], [*PROMPT, 20, 23, 2], [*PROMPT, 24, 2], [30, 31, 2], PROMPT]


def rewards_and_gradients(model, batch):
    model.zero_grad()
    logits = model(**batch).logits
    (logits * torch.arange(1.0, len(logits) + 1)[:, None]).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def as_if_on_cuda(monkeypatch):
    """Have models call this function where they would call the kernel of torch; returns the list of its calls."""

    def install(function):
        calls = []

        def counted(*args, **kwargs):
            calls.append(args)
            return function(*args, **kwargs)

        counted.__signature__ = inspect.signature(function)
        kernel = VarlenKernel(counted)
        monkeypatch.setattr(varlen_attention, "installed_kernel", lambda: kernel)
        monkeypatch.setattr(prefix_sharing, "installed_kernel", lambda: kernel)
        monkeypatch.setattr(prefix_sharing, "is_for_kernel", lambda *args: True)
        return calls

    return install


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_release_gives_what_padded_rows_give(name, release, as_if_on_cuda):
    architecture, options = ARCHITECTURES[name]
    model = random_model(architecture, **options)
    expected, expected_gradients = rewards_and_gradients(model, padded(SEQUENCES))
    assert expected.std() > 0.1
    calls = as_if_on_cuda(RELEASES[release])
    assert prepare(model) is None
    calls.clear()
    rewards, gradients = rewards_and_gradients(model, pack(SEQUENCES, tiny_models.PAD))
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-5)
    for parameter, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-4, atol=1e-4 * gradient.norm().item())
    layers = model.config.num_hidden_layers
    windows = (
        layers
        if architecture == "mistral"
        else sum(kind == "sliding_attention" for kind in getattr(model.config, "layer_types", None) or ())
    )
    # Layers with a window attend node by node where the kernel has none.
    assert len(calls) == (layers - windows if release == "2.10" else layers)


def test_the_installed_release_has_a_signature_that_is_tried_here():
    known = [list(inspect.signature(function).parameters) for function in RELEASES.values()]
    assert list(inspect.signature(varlen_attn).parameters) in known


# What the kernel is not for


@pytest.fixture
def without_varlen(monkeypatch):
    """As with torch 2.6 to 2.9."""
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    varlen_attention.installed_kernel.cache_clear()
    yield
    varlen_attention.installed_kernel.cache_clear()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_torch_without_the_function_attends_node_by_node(name, without_varlen, monkeypatch):
    assert varlen_attention.installed_kernel() is None
    monkeypatch.setattr(prefix_sharing, "is_for_kernel", lambda *args: True)
    architecture, options = ARCHITECTURES[name]
    model = random_model(architecture, **options)
    expected, _ = rewards_and_gradients(model, padded(SEQUENCES))
    assert prepare(model) is None
    rewards, _ = rewards_and_gradients(model, pack(SEQUENCES, tiny_models.PAD))
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def warnings_of(caplog):
    caplog.set_level(logging.WARNING, logger="disco_trl")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_torch_that_lacks_something_is_named_with_the_fix(without_varlen, as_if_on_cuda, monkeypatch, warnings_of):
    monkeypatch.setattr(prefix_sharing, "is_for_kernel", lambda *args: True)
    assert prepare(random_model("llama")) is None
    (message,) = warnings_of()
    assert message.endswith(
        f"the same numbers and is slow: torch {torch.__version__} has no torch.nn.attention.varlen. "
        "Install torch>=2.12."
    )


@pytest.mark.parametrize(
    ("function", "window", "reason"),
    [
        (torch_2_10, None, None),
        (torch_2_10, 4, "has no sliding window"),
        (torch_2_11, 4, None),
        (torch_2_12, 4, None),
        (lambda query, key, value, lengths: None, None, "has a signature that is not known here"),
    ],
)
def test_what_a_release_lacks(function, window, reason, as_if_on_cuda):
    as_if_on_cuda(function)
    found = lacking(window)
    assert found is None if reason is None else found.endswith(reason)


def test_which_tensors_are_for_the_kernel(monkeypatch):
    capability = (9, 0)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def is_for(device="cuda", dtype=torch.bfloat16, size=64, **options):
        varlen_attention._has_flash_attention.cache_clear()
        with FakeTensorMode():
            query = torch.empty(1, 4, 10, size, dtype=dtype, device=device)
            return is_for_kernel(query, query, options)

    assert is_for()
    assert is_for(dtype=torch.float16, dropout=0.0, softcap=None, scaling=0.1, sliding_window=4)
    assert not is_for(device="cpu")
    assert not is_for(dtype=torch.float32)
    assert not is_for(size=320)
    assert not is_for(size=20)
    assert not is_for(dropout=0.1)
    assert not is_for(softcap=50.0)
    assert not is_for(s_aux=torch.zeros(4))
    capability = (7, 5)
    assert not is_for()
    varlen_attention._has_flash_attention.cache_clear()


# A kernel that fails


def torch_of_the_future(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, backend
):
    raise AssertionError("is not called without `backend`")


def of_another_build(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    raise RuntimeError("no kernel image is available for execution on the device")


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (torch_of_the_future, "TypeError: torch_of_the_future() missing 1 required keyword-only argument: 'backend'"),
        (of_another_build, "RuntimeError: no kernel image is available for execution on the device"),
    ],
)
def test_an_error_of_the_kernel_is_not_taken_for_the_architectures(function, error, as_if_on_cuda):
    as_if_on_cuda(function)
    model = random_model("llama")
    refusal = prepare(model)
    assert refusal.startswith(f"trying it failed, which need not be the model's fault ({error}, in ")
    assert "up to three times as many tokens" in refusal
    assert "try another release of torch or another attn_implementation" in refusal
    assert "does not take a forest" not in refusal
    assert model.config._attn_implementation == "sdpa"
