"""`fmcib-ssl import-annotations` from a checkout; `python scripts/import_annotations.py --help` lists keys."""

import sys

from fmcib_ssl.command.import_annotations import main
from fmcib_ssl.io import exit_without_teardown

if __name__ == "__main__":
    with exit_without_teardown():
        main(sys.argv[1:])
