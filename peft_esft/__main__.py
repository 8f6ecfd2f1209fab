"""Makes `python -m peft_esft` the command `peft-esft`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
