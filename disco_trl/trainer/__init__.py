"""Training: `DiscoRewardTrainer`, its config, and what is fitted, checked and saved around it."""
