"""The mathematics: families of reward distributions, likelihoods and transforms, on tensors alone."""
