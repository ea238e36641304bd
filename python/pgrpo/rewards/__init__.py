"""Raw rewards: the built-in reward plugins, and the scorer that calls any of them.

In come rollouts, out come raw rewards, one float each; normalising them is somebody else's work.
"""
