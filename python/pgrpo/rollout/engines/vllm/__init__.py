"""Generation by vLLM, in this process or in servers.

`engine` makes rollouts of what a `backend` returns, `groups` says what is asked of it, and `probe`
proves that it computes with the policy's weights. There are two backends: `local`, and `servers`, each
a `server`. Weights leave by `sender`, go to the `clients` that take them, and arrive at `receiver`.
`settings` is the section of the config, and `launch` what vLLM is started with.

No code stands here: vLLM's own processes import `receiver` from this package, and need nothing else.
"""
