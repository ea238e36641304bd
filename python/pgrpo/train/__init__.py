"""The update, and the loop around it.

In comes a config and a run folder; out go weights, checkpoints and the records of `pgrpo.runs`.
"""
