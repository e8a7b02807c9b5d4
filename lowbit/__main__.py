"""``python -m lowbit``, the form that torchrun starts: ``torchrun --nproc-per-node=2 -m lowbit train CONFIG.yaml``."""

import sys
from importlib.metadata import entry_points

if __name__ == "__main__":
    (command,) = entry_points(group="console_scripts", name="lowbit")
    sys.argv[0] = "lowbit"
    command.load()()
