"""Margin losses with static, adaptive and distributed targets, and the experiments of their paper."""

__version__ = "0.1.0"
