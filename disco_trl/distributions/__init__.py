"""The mathematics of random rewards, on tensors alone: no language model, no tokenizer, no trainer.

- `families/`: what a family of distributions is, a module for each, and the registry that lists them;
- `reward_distribution`: a batch of rewards, and what can be asked of it;
- `joint`, `correlation`: rewards for several attributes of an answer, weighted sums of them, and how people correlate;
- `judgements`, `likelihood`, `ratings`: what people said about a batch, and how likely that is;
- `transforms`: the one number that an optimizer of policies takes;
- `numerics`: the few functions of probabilities in logs that these share.
"""
