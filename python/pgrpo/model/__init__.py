"""The language model: loading, precision, attention that computes each prompt once, choices.

In come token ids, out go hidden states and logits. How rollouts are sampled or losses computed is
not known here.
"""
