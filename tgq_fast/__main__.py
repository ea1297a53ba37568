"""`python -m tgq_fast`: what `tgq-fast` is, where no script is installed."""

from tgq_fast.app.cli import main

if __name__ == "__main__":
    main()
