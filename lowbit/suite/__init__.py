"""The suite: runs the course's notebooks, collects their numbers, compares them with the accepted ones.

`lowbit.suite.record` is what notebooks call; it imports nothing heavy. The rest serves the commands
``lowbit run``, ``lowbit check``, ``lowbit accept`` and ``lowbit doctor``.
"""
