"""`fmcib-ssl evaluate` from a checkout; `python scripts/evaluate.py --help` shows what can be set."""

import sys

from fmcib_ssl.command.evaluate import main
from fmcib_ssl.io import exit_without_teardown

if __name__ == "__main__":
    with exit_without_teardown():
        main(sys.argv[1:])
