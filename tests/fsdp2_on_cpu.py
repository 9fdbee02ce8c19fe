"""FSDP2 on processes without GPUs: the settings of the launch file, and what accelerate has to believe."""

from pathlib import Path


def environment() -> dict[str, str]:
    """Environment variables by which a launcher tells accelerate of `examples/launch/fsdp2.yaml`."""
    import yaml

    settings = yaml.safe_load((Path(__file__).parents[1] / "examples" / "launch" / "fsdp2.yaml").read_text())
    found = {name.upper(): str(value).lower() for name, value in settings["fsdp_config"].items()}
    found["FSDP_STATE_DICT_TYPE"] = settings["fsdp_config"]["fsdp_state_dict_type"]
    found["FSDP_AUTO_WRAP_POLICY"] = settings["fsdp_config"]["fsdp_auto_wrap_policy"]
    return found | {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}


def believe_in_gpus() -> None:
    """Have accelerate support FSDP, which it does on GPUs only, and the Trainer bfloat16, for which it wants one."""
    import transformers.training_args
    from accelerate.state import DistributedType, PartialState

    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def forget_state() -> None:
    """Have the next trainer of this process set up accelerate anew."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def leave() -> None:
    """Wait for the other processes. Otherwise gloo's threads are sometimes busy when the interpreter exits, and abort
    the process.
    """
    import torch

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
