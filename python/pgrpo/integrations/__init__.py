"""Other frameworks' training loops, one module each, over `pgrpo.normalizer` only.

In come a framework's rewards and ids, out go advantages in its own arrays. Nothing of the trainer may
be imported here, nor may anything here import a framework that is not installed.
"""
