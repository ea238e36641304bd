"""Several runs that answer one question, two policies judged pair by pair, and what a run would cost.

In comes a config with what to vary, or two runs and who judges them; out go run folders and one report
over them, a judgement, or a plan.
"""
