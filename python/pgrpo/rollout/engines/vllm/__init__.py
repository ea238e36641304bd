"""Generation by vLLM: `engine` over a vLLM in this process (`local`) or others (`servers`), `weights`
that get there, and the `settings` it is started with.

Kept empty: vLLM's own processes import `weights` from here, and need nothing else.
"""
