"""Several runs that answer one question, and what a run would cost.

In comes a config with what to vary; out go run folders and one report over them, or a plan.
"""
