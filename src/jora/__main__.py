"""`python -m jora` is `jora`."""

from jora.cli.main import main

if __name__ == "__main__":
    main()
