"""Who belongs together: clusterers, and what they found.

In come users with features, out goes a cluster for each; nothing else decides whose rewards share a
history. `membership.Membership` is the one owner of who is where, `assignment.cluster_users` asks a
clusterer, and `description.describe` tells what it found.
"""
