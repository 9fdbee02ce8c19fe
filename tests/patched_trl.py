"""
A stand-in for libraries that patch TRL: they put generated subclasses in the place of its trainers and configs.

As such a library does, `patch_trl` writes a module with the source of TRL's trainer under another name, which imports
what it needs from TRL's module, and puts a subclass of it in every place where TRL has its own. The config is a
subclass with further fields and a constructor written out.

Run as a script (`python patched_trl.py before|after MODEL FOLDER`), it patches before or after disco_trl is imported,
trains one step, and prints what came of it.
"""

import inspect
import json
import sys
import types

import trl
import trl.trainer
from trl.trainer import reward_config, reward_trainer


CONFIG = """
from dataclasses import dataclass, field
from trl.trainer.reward_config import RewardConfig

@dataclass
class PatchedRewardConfig(RewardConfig):
    chunks: int | None = field(default=-1, metadata={"help": "Chunk size to reduce memory usage."})

    def __init__(self, output_dir=None, learning_rate=5e-5, chunks=-1, **kwargs):
        super().__init__(output_dir=output_dir, learning_rate=learning_rate, **kwargs)
        self.chunks = chunks
"""
TRAINER = """
class PatchedRewardTrainer(_PatchedRewardTrainer):
    def __init__(self, model, args=None, data_collator=None, train_dataset=None, eval_dataset=None,
                 processing_class=None, compute_metrics=None, callbacks=None, **kwargs):
        super().__init__(model=model, args=args, data_collator=data_collator, train_dataset=train_dataset,
                         eval_dataset=eval_dataset, processing_class=processing_class,
                         compute_metrics=compute_metrics, callbacks=callbacks, **kwargs)
"""


def patch_trl() -> None:
    """Replace TRL's reward trainer and its config by generated ones, in this process."""
    module = types.ModuleType("patched_cache.PatchedRewardTrainer")
    sys.modules[module.__name__] = module
    source = inspect.getsource(reward_trainer.RewardTrainer).replace("RewardTrainer", "_PatchedRewardTrainer")
    vars(module).update({name: value for name, value in vars(reward_trainer).items() if not name.startswith("__")})
    exec(compile(CONFIG + source + TRAINER, "<generated>", "exec"), vars(module))
    for place in (trl, trl.trainer, reward_trainer):
        place.RewardTrainer = module.PatchedRewardTrainer
    for place in (trl, trl.trainer, reward_trainer, reward_config):
        place.RewardConfig = module.PatchedRewardConfig


def main(order: str, model: str, folder: str) -> None:
    """Patch `before` or `after` the import of disco_trl, and train."""
    if order == "before":
        patch_trl()
    from tiny_training import disco_trainer, preferences

    from disco_trl import DiscoRewardModel

    if order == "after":
        patch_trl()
    trainer = disco_trainer(folder, model=model, train_dataset=preferences(rows=8), max_steps=1)
    trainer.train()
    trainer.save_model(folder)
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {
        "bases": [kind.__name__ for kind in (*type(trainer).__mro__, *type(trainer.args).__mro__)],
        "is_disco": isinstance(trainer.model, DiscoRewardModel),
        "is_adopted": isinstance(DiscoRewardModel.from_pretrained(folder), DiscoRewardModel),
        "loss": entry["loss"],
        "scale_mean": entry["scale_mean"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
