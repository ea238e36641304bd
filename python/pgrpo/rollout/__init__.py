"""From examples to scored groups: prompts, engines, and the collector that runs them.

In come examples and the policy's weights; out come groups with rewards and advantages. Nothing here
changes a weight.
"""
