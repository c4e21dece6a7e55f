"""`python -m fmcib_ssl VERB key=value ...` is `fmcib-ssl VERB key=value ...`."""

from fmcib_ssl.command import main

if __name__ == "__main__":
    main()
