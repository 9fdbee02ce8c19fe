"""A language model on a forest: log-probabilities of answer tokens, with every shared prefix computed once.

TRL's trainers of policies read these from a fused LM head (`trl.trainer.utils.add_fused_lm_head`), which makes no
logits of a whole sequence. Here the backbone runs on the row of a forest, and the head gets the states that predict
answer tokens alone. What comes out is laid out as that of the padded batch, so that the trainer's losses and metrics
need not know of it. The last token of a prompt predicts the first token of each of its answers: its state is read for
each of them.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..data.forest import Nodes
from .prefix_sharing import as_attention_mask


PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""What a fused LM head may return for each token."""


def run_on_forests(model: PreTrainedModel) -> None:
    """
    Have a language model with TRL's fused LM head take forests, in place.

    Its `forward` then takes what [`~disco_trl.data.dpo_collator.DataCollatorForDiscoDPO`] adds to a batch. Without
    that, or without `fused_lm_head=True`, it is what it was before.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, after `trl.trainer.utils.add_fused_lm_head` and [`~disco_trl.models.prefix_sharing.prepare`].
    """
    of_padded = model.forward

    @functools.wraps(of_padded)
    def forward(
        *args: Any,
        forest_ids: Tensor | None = None,
        forest_positions: Tensor | None = None,
        nodes: Nodes | None = None,
        places: Tensor | None = None,
        targets: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if nodes is None or places is None or targets is None or not kwargs.get("fused_lm_head"):
            return of_padded(*args, **kwargs)
        is_answer = kwargs.pop("labels")[:, 1:] != -100
        for of_padding in ("input_ids", "attention_mask"):
            kwargs.pop(of_padding)

        def keep_answers(_module: Any, _args: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state[:, places]
            return output

        # The head is called by TRL, so that what it does to logits (scaling, softcapping) is done here too.
        handle = model.base_model.register_forward_hook(keep_answers)
        try:
            found = of_padded(
                input_ids=forest_ids,
                position_ids=forest_positions,
                attention_mask=as_attention_mask(nodes, places.device),
                shift_labels=targets[None],
                **kwargs,
            )
        finally:
            handle.remove()
        for name in PER_TOKEN:
            if (value := found.get(name)) is not None:
                found[name] = value.new_zeros(is_answer.shape).masked_scatter(is_answer, value[0])
        found["label_mask"] = is_answer
        return found

    model.forward = forward
