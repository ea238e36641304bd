"""Several runs that answer one question.

In comes a config with what to vary; out go run folders and one report over them.
"""
