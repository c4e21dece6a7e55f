"""`fmcib-ssl train` from a checkout: `python train.py +experiment=NAME [key=value ...]`; `--help` shows the choices."""

import sys

from fmcib_ssl.command import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
