"""``python -m lowbit``, the form that torchrun starts: ``torchrun --nproc-per-node=2 -m lowbit train CONFIG.yaml``."""

from lowbit.cli import app

if __name__ == "__main__":
    app(prog_name="lowbit")
