"""R2VPO-OFF on the arithmetic task: every batch is trained on 16 iterations after it was sampled."""

from experiments.configs import arithmetic


def get_config():
    config = arithmetic.get_config()
    config.replay.lag = 16
    return config
