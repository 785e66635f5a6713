"""Errors of saved models: deepspeed launch/evaluate.py runs/distill/final."""

import sys

from ejmp.train.main import main

if __name__ == "__main__":
    sys.exit(main("evaluate"))
