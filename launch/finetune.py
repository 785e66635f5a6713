"""Fine-tune: deepspeed launch/finetune.py --demo rmd17."""

import sys

from ejmp.train.main import main

if __name__ == "__main__":
    sys.exit(main("finetune"))
