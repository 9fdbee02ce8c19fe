"""The trial of prefix sharing: what it sees in adapters and gates that do nothing yet, what it leaves as it was, and
how it tells an error from a model that cannot."""

import copy
import functools
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from forests import padded, random_model
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny_models import PAD

from disco_trl.data.forest import pack
from disco_trl.models import prefix_sharing
from disco_trl.models.prefix_sharing import KNOWN_ADAPTERS, prepare
from disco_trl.models.prefix_trial import constants_filled


PROMPT = [*range(7, 18)]
SEQUENCES = [[*PROMPT, *range(20, 20 + length), 2] for length in (7, 3, 9, 1)] + [[*range(30, 43), 2]]

# Adapters: all kinds of PEFT that take a sequence classifier

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
KINDS = {
    **dict.fromkeys(
        (
            *("ADAMSS", "DEFT", "DELORA", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "LOHA", "LOKR", "LORA", "OSF"),
            *("PEANUT", "PVERA", "RANDLORA", "SUPERTUNING", "TINYLORA", "UNILORA", "VERA"),
        ),
        ATTENTION,
    ),
    "ADALORA": {**ATTENTION, "total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2, "target_modules": "self_attn"},
    "BEFT": {"target_modules": ["v_proj"]},
    "BOFT": {**ATTENTION, "boft_block_size": 4},
    "C3A": {**ATTENTION, "block_size": 8},
    "FOURIERFT": {**ATTENTION, "n_frequency": 50},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "MISS": {**ATTENTION, "r": 2},
    "OFT": {**ATTENTION, "oft_block_size": 8},
    "PSOFT": {**ATTENTION, "r": 4},
    "ROAD": {**ATTENTION, "group_size": 8},
    "SHIRA": {**ATTENTION, "r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [7, 8, 9], "target_modules": ["embed_tokens"]},
    "VBLORA": {**ATTENTION, "vector_length": 8, "num_vectors": 16},
    "WAVEFT": {**ATTENTION, "n_frequency": 50},
}
MIXING = {"LILY": ATTENTION, "SHADOW": {}}


@functools.cache
def config_class(kind: str):
    """PEFT's class for a kind of adapter, or a skip where the installed release does not have it yet."""
    classes = {
        getattr(peft_type, "value", peft_type): found for peft_type, found in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    return classes.get(kind)


def fresh(kind: str, options: dict, dtype: torch.dtype = torch.float32):
    if config_class(kind) is None:
        pytest.skip(f"PEFT {peft.__version__} has no {kind}")
    model = random_model("qwen2" if kind == "BEFT" else "llama").to(dtype)  # the former has biases
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(model, config_class(kind)(task_type="SEQ_CLS", **options)).eval()


def as_if_trained(model):
    """Move every parameter that is trained by about what a long run would."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def rewards(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_that_passes_is_right_once_it_is_trained(kind):
    model = fresh(kind, KINDS[kind])
    before = rewards(model, padded(SEQUENCES))
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    assert prepare(model) is None
    # What the trial filled is as it was, and nothing that was computed from it is left.
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(torch.equal(parameter, state[name]) for name, parameter in model.named_parameters())
    assert torch.equal(rewards(model, padded(SEQUENCES)), before)

    expected = rewards(as_if_trained(model), padded(SEQUENCES))
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(rewards(model, pack(SEQUENCES, PAD)), expected, rtol=1e-4, atol=1e-4)


def test_kinds_that_are_trusted_in_pieces_are_tried_here():
    assert {*KNOWN_ADAPTERS} == {*KINDS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MIXING)
def test_a_fresh_adapter_that_mixes_tokens_is_refused(kind, dtype):
    model = fresh(kind, MIXING[kind], dtype)
    reasons = {
        "LILY": "it mixes the tokens of a batch, rows of padded batches too .* a reward depends on what else is in",
        "SHADOW": "the same hidden states in both ways|mixes the tokens of different sequences",
    }
    assert re.search(reasons[kind], prepare(model))
    assert model.get_base_model().config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", MIXING)
def test_an_adapter_is_tried_though_the_model_below_was_ready(kind):
    base = random_model("llama")
    assert prepare(base) is None
    if config_class(kind) is None:
        pytest.skip(f"PEFT {peft.__version__} has no {kind}")
    model = as_if_trained(get_peft_model(base, config_class(kind)(task_type="SEQ_CLS", **MIXING[kind])).eval())
    # A forest gives other rewards.
    difference = rewards(model, pack(SEQUENCES, PAD)) - rewards(model, padded(SEQUENCES))
    assert difference.abs().max() > 0.1
    assert prepare(model) is not None
    assert base.config._attn_implementation == "sdpa"


def test_another_adapter_is_tried_again():
    model = random_model("llama")
    assert prepare(model) is None
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS"))
    assert prepare(model) is None
    if config_class("LILY") is None:
        pytest.skip(f"PEFT {peft.__version__} has no Lily")
    mixed = get_peft_model(model.merge_and_unload(), config_class("LILY")(task_type="SEQ_CLS", **ATTENTION))
    assert prepare(mixed) is not None
    assert prepare(mixed.unload()) is None


def test_an_adapter_in_pieces_is_trusted_if_its_kind_is_known():
    """On the meta device there is nothing to try."""
    reasons = {}
    for kind, options in {"LORA": ATTENTION, **MIXING}.items():
        if config_class(kind) is not None:
            with torch.device("meta"):
                model = get_peft_model(
                    random_model("llama").to("meta"), config_class(kind)(task_type="SEQ_CLS", **options)
                )
            reasons[kind] = prepare(model)
    assert reasons.pop("LORA") is None
    for kind, reason in reasons.items():
        assert reason == f"its weights are in pieces, and nobody has tried an adapter of the kind {kind} whole"


# Full models with parts that do nothing yet


def gated(dtype=torch.float32, value=0.0):
    """A Llama of which one layer adds the mean of the whole row to each token, through a gate."""
    model = random_model("llama").to(dtype)
    layer = model.model.layers[1]
    layer.gate = torch.nn.Parameter(torch.tensor([value], dtype=dtype))

    def mix(module, args, output):
        return output + module.gate * output.mean(dim=1, keepdim=True)

    layer.register_forward_hook(mix)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_that_is_closed_is_seen_through(dtype):
    model = gated(dtype)
    assert prepare(model) is not None
    assert model.model.layers[1].gate.item() == 0
    assert model.model.layers[1].gate.dtype == dtype


def test_a_gate_that_stays_closed_is_let_be():
    model = gated()
    model.model.layers[1].gate.requires_grad_(False)
    assert prepare(model) is None
    torch.testing.assert_close(
        rewards(model, pack(SEQUENCES, PAD)), rewards(model, padded(SEQUENCES)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_pass_in_half_precision(model_type):
    more = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    assert prepare(random_model(model_type, **more).to(torch.bfloat16)) is None


# What is filled, and what is left


class Parameters(torch.nn.Module):
    """One parameter of each sort."""

    def __init__(self):
        super().__init__()
        self.zeros = torch.nn.Parameter(torch.zeros(3, 4))
        self.ones = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        self.number = torch.nn.Parameter(torch.tensor(-2.0))
        self.minus_zero = torch.nn.Parameter(torch.tensor([0.0, -0.0]))
        self.varied = torch.nn.Parameter(torch.tensor([1.0, 1.0, 2.0]))
        self.empty = torch.nn.Parameter(torch.zeros(0, 2))
        self.frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
        self.whole = torch.nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
        self.register_buffer("buffer", torch.zeros(3))


FILLED = {"zeros", "ones", "number", "minus_zero"}


def bits(module) -> dict[str, bytes]:
    return {
        name: tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in module.state_dict().items()
    }


def test_trainable_constants_get_values_for_a_while():
    module = Parameters()
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    before, kept = bits(module), dict(module.named_parameters())
    versions = {name: parameter._version for name, parameter in kept.items()}
    state = torch.get_rng_state()
    within = []
    with pytest.raises(KeyboardInterrupt), constants_filled(module):
        within.append(copy.deepcopy(module.state_dict()))
        raise KeyboardInterrupt
    changed = {name for name, tensor in within[0].items() if not torch.equal(tensor, module.state_dict()[name])}
    assert changed == FILLED
    for name in FILLED:
        values = within[0][name]
        difference = (values - module.state_dict()[name]).abs()
        assert (difference >= 0.04).all()
        assert values.numel() == 1 or values.unique().numel() > 1
    assert bits(module) == before
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in module.named_parameters():
        assert parameter is kept[name]
        assert parameter._version == versions[name]
        assert parameter.grad is None or (parameter.grad == 1).all()


def test_the_values_are_the_same_in_every_process():
    within = []
    for _ in range(2):
        module = Parameters()
        torch.rand(1)
        with constants_filled(module):
            within.append(bits(module))
    assert within[0] == within[1]


def test_an_optimizer_goes_on_as_without_a_trial():
    ends = []
    for tries in (True, False):
        model = get_peft_model(random_model("llama"), LoraConfig(task_type="SEQ_CLS", **ATTENTION))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(3)
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for step in range(2):
            loss = model(**padded(SEQUENCES)).logits.square().mean()
            if tries and step:  # between forward and backward, where a change of a weight in place would be an error
                assert prepare(model) is None
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(bits(model))
    assert ends[0] == ends[1]


def test_threads_that_score_with_one_model_try_it_once(monkeypatch):
    model = get_peft_model(random_model("llama"), LoraConfig(task_type="SEQ_CLS", **ATTENTION))
    before, trials = bits(model), []
    whole = prefix_sharing.try_forest
    monkeypatch.setattr(prefix_sharing, "try_forest", lambda *args: trials.append(args) or whole(*args))
    together = threading.Barrier(4)

    def ask(_):
        together.wait()
        return prepare(model)

    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(ask, range(4))] == [None] * 4
    assert len(trials) == 1
    assert bits(model) == before


# Errors


def test_a_model_that_cannot_run_at_all_is_not_blamed_on_forests():
    if config_class("POLY") is None:
        pytest.skip(f"PEFT {peft.__version__} has no Poly")
    model = fresh("POLY", {**ATTENTION, "r": 2, "n_tasks": 1})  # wants to be told the task of each row
    assert prepare(model) == (
        "a few tokens do not go through it in a padded batch either (ValueError: task_ids should not be None.)"
    )


@pytest.mark.parametrize(
    ("pad_token_id", "error"),
    [
        (None, "ValueError: Cannot handle batch sizes > 1 if no padding token is defined"),
        (64, "IndexError: index out"),
    ],
)
def test_a_padding_token_that_is_none_is_not_blamed_on_forests(pad_token_id, error):
    model = random_model("llama")
    model.config.pad_token_id = pad_token_id
    assert prepare(model).startswith(f"a few tokens do not go through it in a padded batch either ({error}")


def test_weights_that_are_not_finite_are_not_blamed_on_forests():
    model = random_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    assert prepare(model) == "its hidden states are not finite, in a padded batch either"


@pytest.mark.parametrize("kind", [TypeError, AttributeError, KeyError, AssertionError, torch.OutOfMemoryError])
def test_an_error_that_no_architecture_makes_is_told_as_one(kind):
    model = random_model("llama")

    def fail_on_a_forest(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dtype == torch.int64:
            raise kind("broken")

    model.model.layers[2].register_forward_pre_hook(fail_on_a_forest, with_kwargs=True)
    refusal = prepare(model)
    assert refusal.startswith("trying it failed, which need not be the model's fault")
    assert re.search(rf"\({kind.__name__}: '?broken'?, in fail_on_a_forest, test_prefix_trial.py:\d+\)", refusal)
    assert model.config._attn_implementation == "sdpa"


def test_the_attention_that_is_asked_for_again_is_tried_again():
    model = random_model("llama")
    model.set_attn_implementation("flex_attention")
    assert "flex_attention" in prepare(model)
    model.set_attn_implementation("eager")
    assert prepare(model) is None
