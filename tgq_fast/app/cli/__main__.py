"""`python -m tgq_fast.app.cli`."""

from tgq_fast.app.cli import main

if __name__ == "__main__":
    main()
