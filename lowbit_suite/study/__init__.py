"""The study: the long trainings by which the claims are judged, as a queue that many sessions and machines work off.

`plan` reads ``notebooks/study.yaml``. A training is one arm of one table with one seed and one budget (`training`). Its
result is one line in ``results/journals/study/<table>.jsonl`` (`queue`). The lines become the tables that
``lowbit claims`` reads (`tables`), and they choose the learning rates of single arms (`rates`). `worker` is the process
that works, and ``lowbit study`` its command (`cli`).
"""
