"""The kernel of accelerators in `disco_trl.models.prefix_sharing`: what it is given, where there is no accelerator to
run it.

The kernel's contract is torch's own documentation of `torch.nn.attention.varlen.varlen_attn`, written out here with
dense masks: queries and keys in runs, the last query of a run aligned with the last key, a window as (left, right).
"""

import math

import pytest
import tiny_models
import torch
from transformers import AutoModelForSequenceClassification

from disco_trl.data.forest import pack
from disco_trl.models import prefix_sharing
from disco_trl.models.prefix_sharing import prepare
from disco_trl.models.upgrade import upgrade


def documented_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q[-1] == len(query)
    assert cu_seq_k[-1] == len(key) == len(value)
    assert max_q == cu_seq_q.diff().max()
    assert max_k == cu_seq_k.diff().max()
    assert enable_gqa == (query.shape[1] != key.shape[1])
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


PROMPT = [7, 8, 9, 10, 11, 12, 13]
SEQUENCES = [[*PROMPT, 20, 21, 22, 2], [*PROMPT, 20, 23, 2], [*PROMPT, 24, 2], [30, 31, 2], PROMPT]


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", {}), ("mistral", {"sliding_window": 4}), ("gpt2", {})],
)
def test_the_kernel_is_given_each_node_with_the_keys_of_its_path(architecture, options, monkeypatch):
    torch.manual_seed(0)
    config = tiny_models.tiny_config(architecture, num_labels=1, **options)
    model = upgrade(AutoModelForSequenceClassification.from_config(config)).eval()
    for parameter in model.parameters():  # of a spread at which attention is not the same wherever it looks
        torch.nn.init.normal_(parameter, std=0.2)
    assert prepare(model) is None
    batch = pack(SEQUENCES, model.config.pad_token_id)
    with torch.no_grad():
        expected = model(**batch).pooled_hidden_state
        calls = []

        def counted(*args, **kwargs):
            calls.append(args)
            return documented_varlen_attn(*args, **kwargs)

        monkeypatch.setattr(prefix_sharing, "_has_varlen_kernel", lambda *args: True)
        monkeypatch.setattr(prefix_sharing, "_varlen_attn", lambda: counted)
        result = model(**batch).pooled_hidden_state
    assert len(calls) == model.config.num_hidden_layers
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
