"""Pre-train: deepspeed launch/pretrain.py."""

import sys

from ejmp.train.main import main

if __name__ == "__main__":
    sys.exit(main("pretrain"))
