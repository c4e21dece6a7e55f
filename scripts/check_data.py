"""`fmcib-ssl check-data` from a checkout; `python scripts/check_data.py --help` shows what can be set."""

import sys

from fmcib_ssl.command.check_data import main
from fmcib_ssl.io import exit_without_teardown

if __name__ == "__main__":
    with exit_without_teardown():
        main(sys.argv[1:])
