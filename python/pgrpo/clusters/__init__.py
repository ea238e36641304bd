"""Who belongs together: clusterers, and what they found.

In come users with features, out goes a cluster for each; nothing else decides whose rewards share a
history.
"""
