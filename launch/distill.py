"""Prune and distil: deepspeed launch/distill.py --blocks 4."""

import sys

from ejmp.train.main import main

if __name__ == "__main__":
    sys.exit(main("distill"))
